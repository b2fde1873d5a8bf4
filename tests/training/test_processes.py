"""Training in other processes: two that share a step, one killed while it saves, and plain command lines."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import SCRIPT, SHORT, TINY, log, losses

from memzoo.training import checkpoint

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "0",
}
DIES_WHILE_SAVING = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("train_script", sys.argv.pop(1))
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
from memzoo.training import checkpoint
from pathlib import Path
seal = checkpoint._seal
def die_at_4(folder):
    if folder.name == ".step-00000004.tmp":
        with open(folder / "optimizer.bin", "r+b") as file:  # half of it is on the disk
            file.truncate(100)
        os.kill(os.getpid(), signal.SIGKILL)
    seal(folder)
checkpoint._seal = die_at_4
script.main(sys.argv[1:])
"""


def run(*command):
    """Run to its end; past the limit, it and the processes it started are ended."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([str(part) for part in command], env=ENVIRONMENT, **options) as process:
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture
def flags(llama, text, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setitem(ENVIRONMENT, "HF_DATASETS_CACHE", str(datasets.config.HF_DATASETS_CACHE))
    return ["--model", llama, "--dataset", text, *SHORT]


def test_a_kill_in_mid_save_loses_nothing(train, flags, tmp_path):
    flags = [*flags, "--save_every", "2", "--output"]
    killed = run(sys.executable, "-c", DIES_WHILE_SAVING, SCRIPT, *flags, tmp_path / "killed")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = tmp_path / "killed" / "checkpoints"
    assert checkpoint.steps(tmp_path / "killed") == [2] and (folder / ".step-00000004.tmp").is_dir()
    code, out, err = train(*flags, tmp_path / "killed", "--resume")
    assert code == 0 and "going on after step 2" in out, err
    assert not (folder / ".step-00000004.tmp").exists()
    assert train(*flags, tmp_path / "whole")[0] == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_two_processes_are_one_with_twice_the_batch_and_resume_exactly(train, text, flags, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", SCRIPT]
    flags = [*TINY, *flags[2:], "--eval_every", "3", "--eval_examples", "7", "--output"]
    assert train(*flags, tmp_path / "one", "--batch_size", "4")[0] == 0
    for extra in (["--stop_after", "3"], ["--resume"]):
        done = run(*torchrun, *flags, tmp_path / "two", "--batch_size", "2", *extra)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("going on after step 3") == (extra == ["--resume"])  # only one process speaks
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two):
        for name in ("loss", "eval_loss", "gradient_norm", "tokens"):
            assert a.get(name) == pytest.approx(b.get(name), abs=2e-5)
    code, _, err = train(*flags, tmp_path / "two", "--batch_size", "2", "--resume", "--overwrite")
    assert code == 2 and "exclude each other" in err


def test_under_accelerate_launch(text, flags, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", SCRIPT]
    done = run(*launch, *flags, "--steps", "2", "--output", tmp_path / "run")
    assert done.returncode == 0 and "step 2/2" in done.stdout and "left 0:00" in done.stdout, done.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_as_plain_python_refusing(tmp_path):
    refused = run(sys.executable, SCRIPT, *TINY, "--dataset", "nowhere.txt", "--output", tmp_path / "run")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr == "error: --dataset nowhere.txt: there is no such file or folder\n"
