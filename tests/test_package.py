"""The package as a whole: what importing costs, the wheel, every supported Python, style, and the files beside the code."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import memzoo

ROOT = Path(__file__).parents[1]
SUPPORTED = ("3.10", "3.11", "3.12", "3.13")


def tracked_files():
    """Every file of the project that exists: git's list, else (an unpacked archive) everything outside dotted and built folders."""
    git = shutil.which("git")
    listed = git and subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed and listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        skipped = re.compile(r"(^|/)(\.(?!ci|gitignore)[^/]*|__pycache__|[^/]*\.egg-info|build|dist|runs|results)(/|$)")
        paths = [path for path in ROOT.rglob("*") if not skipped.search(path.relative_to(ROOT).as_posix())]
    return sorted(path for path in paths if path.is_file())


def python_files():
    return [path for path in tracked_files() if path.suffix == ".py"]


def run_python(code, *arguments, path=None, **variables):
    """A fresh interpreter away from the checkout, without this run's settings for Triton."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")} | variables
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True)


def test_importing_kernels_loads_torch_and_nothing_heavy():
    code = """
import sys
import memzoo.kernels
heavy = {"transformers", "datasets", "triton", "lm_eval", "accelerate", "tokenizers", "huggingface_hub", "pandas", "matplotlib"}
print(sorted(heavy & set(sys.modules)))
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_kernels_costs_little_more_than_torch():
    """At most 1.3 times `import torch`: the fastest of several alternating runs each, in processor time, which neighbours disturb least."""
    code = "import time; import {}; print(time.process_time())"
    seconds = {"torch": [], "memzoo.kernels": []}
    for _ in range(6):
        for module, times in seconds.items():
            done = run_python(code.format(module))
            assert done.returncode == 0, done.stderr
            times.append(float(done.stdout))
        if len(seconds["torch"]) > 1 and min(seconds["memzoo.kernels"]) <= 1.3 * min(seconds["torch"]):
            return
    pytest.fail(f"import memzoo.kernels takes {min(seconds['memzoo.kernels']):.2f} s, torch {min(seconds['torch']):.2f} s")


def test_importing_memzoo_loads_no_modelling_file():
    code = "import sys, memzoo; print([name for name in sys.modules if name.startswith('memzoo.') and '.modeling' in name])"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tracked files, so that neither this checkout's leftovers get in nor new ones appear."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked_files():
        place = folder / "source" / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    command = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(folder / "source")]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_file_of_the_package(wheel):
    expected = {path.relative_to(ROOT).as_posix() for path in tracked_files() if path.is_relative_to(ROOT / "memzoo")}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected
    assert "memzoo/py.typed" in held


def test_wheel_works_away_from_the_checkout(wheel, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = """
import importlib, importlib.metadata, pathlib, pkgutil, sys
site, checkout = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
sys.path[:] = [str(site)] + [p for p in sys.path if p and pathlib.Path(p).resolve() != checkout]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "") + repr(finder)]
import memzoo
optional = {"accelerate", "datasets", "lm_eval", "matplotlib", "rich", "yaml"}
for module in pkgutil.walk_packages(memzoo.__path__, "memzoo."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:  # an extra's package may be missing, never one of ours
        if error.name not in optional:
            raise
strangers = [n for n, m in sys.modules.items() if n.split(".")[0] == "memzoo" and not m.__file__.startswith(str(site))]
assert not strangers, strangers
assert importlib.metadata.version("memzoo") == memzoo.__version__
print("fine")
"""
    done = run_python(code, site, ROOT, path=site)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr[-3000:]


def other_pythons():
    """One interpreter for each supported version that this machine has."""
    found = {}
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for version in SUPPORTED:
        places = [shutil.which(f"python{version}"), *sorted(versions.glob(f"{version}.*/bin/python"))]
        for place in filter(None, places):
            check = subprocess.run(
                [place, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
            )
            if check.stdout.strip() == version:
                found.setdefault(version, str(place))
    return found


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_file_compiles_on_each_supported_python(version):
    python = other_pythons().get(version)
    if python is None:
        for path in python_files():
            ast.parse(path.read_text(), str(path), feature_version=tuple(map(int, version.split("."))))
        return
    code = "import sys\nfor name in sys.stdin.read().split('\\0'):\n    compile(open(name, encoding='utf-8').read(), name, 'exec')"
    names = "\0".join(map(str, python_files()))
    done = subprocess.run([python, "-W", "error", "-c", code], input=names, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_python_file_opens_with_a_sentence():
    bare = []
    for path in python_files():
        text = path.read_text()
        docstring = ast.get_docstring(ast.parse(text)) or ""
        if not text.startswith('"""') or not re.search(r"[.:?]$", docstring.split("\n\n")[0].rstrip()):
            bare.append(str(path.relative_to(ROOT)))
    assert not bare, f"no sentence in the first line's docstring: {bare}"


@pytest.mark.parametrize("command", [("check",), ("format", "--check")])
def test_ruff_is_clean(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shell_scripts_parse_and_stop_at_the_first_error():
    scripts = [path for path in tracked_files() if path.suffix == ".sh" or path.parent.name == ".ci"]
    assert len(scripts) > 3
    for path in scripts:
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = path.read_text().splitlines()
        assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines, path
        assert os.access(path, os.X_OK), f"{path} is not executable"


def test_no_file_names_this_machine_or_a_package_registry():
    folders = r"(?<![\w.~:/-])/(?:work|home|root|Users|opt|mnt|srv)/\w"
    hosts = "|".join(
        re.escape(host) for host in ("py" + "pi.org", "python" + "hosted", "download.py" + "torch", "ana" + "conda.org")
    )
    forbidden = re.compile(f"{folders}|{hosts}")
    found = []
    for path in tracked_files():
        if path.suffix in (".xz", ".png", ".safetensors") or path.name == "tokenizer.json":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if forbidden.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n" + "\n".join(found)


def test_files_beside_the_code():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["version"] == memzoo.__version__ and citation["license"] == "Apache-2.0"
    assert {"title", "authors", "message"} <= set(citation)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog and memzoo.__version__ in changelog
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{memzoo.__version__}"' in project and 'requires-python = ">=3.10,<3.14"' in project
    for name in ("README.md", "CONTRIBUTING.md", "docs/kernels.md", "docs/fidelity.md", "benchmarks/README.md"):
        assert (ROOT / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({"MEMZOO_PYTHON": "false"}, [], "no Python from 3.10 to 3.13 found; install one, or set MEMZOO_PYTHON to it"),
        ({}, ["no such"], "extras 'no such' are not names with commas between, such as train,eval"),
        ({"MEMZOO_VENV": str(ROOT / "docs")}, [], "exists and is no virtual environment; move it away or set MEMZOO_VENV"),
    ],
)
def test_setup_refuses_in_one_line(variables, arguments, message, tmp_path):
    environment = {**os.environ, "MEMZOO_VENV": str(tmp_path / "venv"), **variables}
    done = subprocess.run(["bash", str(ROOT / "scripts" / "setup.sh"), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "venv").exists()


def test_setup_says_which_step_failed(tmp_path):
    """A Python that fits but cannot make an environment stands in for a broken installation."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *venv*--clear*) echo out of space; exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "MEMZOO_VENV": str(tmp_path / "venv"), "MEMZOO_PYTHON": str(python)}
    done = subprocess.run(["bash", str(ROOT / "scripts" / "setup.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "out of space" in done.stderr and "failed at: virtual environment (the whole log: " in done.stderr


def test_every_memory_is_at_hand_and_a_neural_memory_needs_no_transformers():
    import memzoo.layers

    for name in memzoo.layers.__all__:
        assert getattr(memzoo.layers, name).__name__ == name
    done = run_python("import sys; from memzoo.layers import NeuralMemory; print('transformers' in sys.modules)", path=ROOT)
    assert done.stdout.strip() == "False", done.stderr
