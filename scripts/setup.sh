#!/usr/bin/env bash
# Makes or reuses a virtual environment with memzoo in it (editable): bash scripts/setup.sh [EXTRAS], by default "dev".
#
#   MEMZOO_VENV    the environment's folder; by default .venv in the repository
#   MEMZOO_PYTHON  the Python (3.10 to 3.13) that makes it; by default the first that fits of python3, python3.11, .12, .13, .10
#   MEMZOO_TORCH   the requirement for torch; by default a CPU build where there is no NVIDIA GPU. A torch that fits is kept.
#
# A second run does nothing unless pyproject.toml, this file, the Python or the extras changed. The log is setup.log in the folder.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-dev}
venv=${MEMZOO_VENV:-$root/.venv}
cpu_torch=2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0
unset PYTHONHOME

say() { echo "memzoo setup: $*"; }
fail() {
  say "$*" >&2
  exit 1
}
has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }
digest() { cat "$root/pyproject.toml" "$root/scripts/setup.sh" | cksum; }
version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }
fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
key() { echo "$(digest) python $(version_of "$venv/bin/python") root $root"; }

# The installed torch's version if it fits pyproject.toml's bounds (and is no CPU build where there is a GPU), else nothing.
fitting_torch() {
  "$1" - "$root/pyproject.toml" "$(has_gpu && echo gpu || echo cpu)" 2>/dev/null <<'PYTHON' || true
import importlib.metadata, re, sys

bounds = re.search(r'"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)', open(sys.argv[1]).read())
low, high = tuple(map(int, bounds.groups()[:2])), tuple(map(int, bounds.groups()[2:]))
version = importlib.metadata.version("torch")
found = tuple(map(int, version.split(".")[:2]))
if low <= found < high and not (sys.argv[2] == "gpu" and version.endswith("+cpu")):
    print(version)
PYTHON
}

# A step's output goes to the log; when it fails, the log's end is shown.
step() {
  local title=$1
  shift
  echo "== $title: $*" >>"$log"
  if ! "$@" >>"$log" 2>&1 </dev/null; then
    tail -n 15 "$log" >&2
    fail "failed at: $title (the whole log: $log)"
  fi
}

[[ $extras =~ ^[a-z]+(,[a-z]+)*$ ]] || fail "extras '$extras' are not names with commas between, such as train,eval"

# One set-up at a time in one checkout: a second one waits, then finds the environment ready.
if command -v flock >/dev/null 2>&1; then
  exec 9<"$root"
  flock 9
fi

stamp=$venv/.memzoo-$extras
for done in "$venv/.memzoo-dev" "$stamp"; do
  if [[ -f $done && $(cat "$done") == "$(key)" && -n $(fitting_torch "$venv/bin/python") ]]; then
    say "environment ready: $venv"
    exit 0
  fi
done

if [[ -e $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv" 2>/dev/null) ]]; then
  fail "$venv exists and is no virtual environment; move it away or set MEMZOO_VENV"
fi

if ! fits "$venv/bin/python"; then
  python='' lacking=''
  candidates=(python3 python3.11 python3.12 python3.13 python3.10)
  [[ -z ${MEMZOO_PYTHON:-} ]] || candidates=("$MEMZOO_PYTHON")
  for candidate in "${candidates[@]}"; do
    fits "$candidate" || continue
    if missing=$("$candidate" -c '
import importlib
for name in ("venv", "ensurepip", "ctypes", "lzma", "ssl"):
    try:
        importlib.import_module(name)
    except ImportError:
        print(name)
        break
') && [[ -z $missing ]]; then
      python=$candidate
      break
    fi
    lacking=${lacking:-"$candidate ($(version_of "$candidate")) lacks its module $missing"}
  done
  if [[ -z $python && -n $lacking ]]; then
    fail "$lacking; install it (Debian, Ubuntu: apt install python3-venv) or set MEMZOO_PYTHON to another Python, 3.10 to 3.13"
  fi
  [[ -n $python ]] || fail "no Python from 3.10 to 3.13 found; install one, or set MEMZOO_PYTHON to it"
  say "making $venv with Python $(version_of "$python")"
  options=(--clear)
  if [[ -n $(fitting_torch "$python") && $("$python" -c 'import sys; print(sys.prefix == sys.base_prefix)') == True ]]; then
    say "using the torch $(fitting_torch "$python") that this Python has"
    options+=(--system-site-packages)
  fi
  mkdir -p "$venv"
  log=$(mktemp "${TMPDIR:-/tmp}/memzoo-setup.XXXXXX")
  step "virtual environment" "$python" -m venv "${options[@]}" "$venv"
  mv "$log" "$venv/setup.log"
fi
log=$venv/setup.log
date >>"$log"
pip=("$venv/bin/python" -m pip)
rm -f "$venv"/.memzoo-*

# The newest pip where it can be had; an older one does as well.
"${pip[@]}" install --quiet --upgrade pip >>"$log" 2>&1 </dev/null || true

torch=$(fitting_torch "$venv/bin/python")
if [[ -z $torch ]]; then
  if [[ -n ${MEMZOO_TORCH:-} ]]; then
    say "installing $MEMZOO_TORCH"
    step torch "${pip[@]}" install "$MEMZOO_TORCH"
  elif has_gpu; then
    say "installing torch for the NVIDIA GPU (some gigabytes)"
    step torch "${pip[@]}" install --upgrade "$(grep -o 'torch>=[^"]*' "$root/pyproject.toml" | head -n 1)"
  else
    say "installing torch $cpu_torch (no NVIDIA GPU: the CPU build where pip finds one)"
    "${pip[@]}" install "torch==$cpu_torch+cpu" >>"$log" 2>&1 </dev/null ||
      step torch "${pip[@]}" install "torch==$cpu_torch"
  fi
  torch=$(fitting_torch "$venv/bin/python")
  [[ -n $torch ]] || fail "the torch that pip installed does not fit pyproject.toml's bounds (the whole log: $log)"
fi

say "installing memzoo[$extras] beside torch $torch"
echo "torch==$torch" >"$venv/constraints.txt" # nothing may exchange torch
step "memzoo[$extras]" "${pip[@]}" install -c "$venv/constraints.txt" -e "$root[$extras]"
if [[ ,$extras, == *,dev,* ]]; then # only compared with: a set-up without it is whole
  echo "== memzoo[peers]" >>"$log"
  "${pip[@]}" install -c "$venv/constraints.txt" -e "$root[peers]" >>"$log" 2>&1 </dev/null ||
    say "memory-caching and titans-pytorch could not be installed; the tests that compare with them will be skipped (the log: $log)"
fi
step "import" "$venv/bin/python" -c "import memzoo, memzoo.kernels"

key >"$stamp"
say "environment ready: $venv"
