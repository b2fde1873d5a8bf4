#!/usr/bin/env bash
# On a machine with a CUDA GPU: runs the tests marked gpu, then times what passed: bash scripts/gpu_check.sh OUT [--quick] [--seconds N].
#
# Needs torch with CUDA, Triton, transformers, pytest and hypothesis, installed or as wheels in .whl/; nothing is fetched. Writes
# OUT/gpu_check.<gpu>.json and OUT/benchmark.<gpu>.json. Exit status: 0 all passed, 1 something failed, 2 it cannot run here.
#   MEMZOO_PYTHON  the Python to use; by default .venv's if its torch sees the GPU, else python3
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stop() {
  echo "gpu_check: $*" >&2
  exit 2
}
sees_gpu() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; }

[[ $# -ge 1 && $1 != -* ]] || stop "name a folder for the results: bash scripts/gpu_check.sh OUT [--quick] [--seconds N]"

python=''
for candidate in "${MEMZOO_PYTHON:-${MEMZOO_VENV:-$root/.venv}/bin/python}" "${MEMZOO_PYTHON:-python3}"; do
  if sees_gpu "$candidate"; then
    python=$candidate
    break
  fi
done
[[ -n $python ]] || stop "no CUDA GPU that torch can see (Python: ${MEMZOO_PYTHON:-python3}); run this on a machine with one"

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset TRITON_INTERPRET MEMZOO_KERNELS
missing=$("$python" -c '
import importlib.util
print(*[name for name in ("triton", "transformers", "pytest", "hypothesis") if importlib.util.find_spec(name) is None])')
if [[ -n $missing && -d $root/.whl ]]; then
  packages=$(mktemp -d)
  trap 'rm -rf "$packages"' EXIT
  # shellcheck disable=SC2086
  "$python" -m pip install --quiet --no-index --find-links "$root/.whl" --target "$packages" $missing ||
    stop "the wheels in .whl do not give: $missing"
  PYTHONPATH=$PYTHONPATH:$packages
  missing=''
fi
[[ -z $missing ]] || stop "this Python lacks: $missing; install them, or lay their wheels in .whl"

status=0
"$python" "$root/scripts/gpu_check.py" "$@" || status=$?
exit "$status"
