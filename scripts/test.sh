#!/usr/bin/env bash
# Sets up the environment, then runs every test on the CPU: bash scripts/test.sh [pytest arguments].
#
# Kernels run in Triton's interpreter here, on every machine; scripts/gpu_check.sh runs the tests that need a GPU on one.
#   MEMZOO_TEST_WORKERS  test processes; by default one a core, 8 at most
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
bash scripts/setup.sh dev

cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
workers=${MEMZOO_TEST_WORKERS:-$((cores < 8 ? cores : 8))}
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
unset MEMZOO_KERNELS TRITON_INTERPRET PYTHONPATH # tests/conftest.py chooses; the checkout is installed

# Last, so that pytest's closing line is the last line.
exec "${MEMZOO_VENV:-$root/.venv}/bin/python" -m pytest -n "$workers" --dist worksteal "$@" </dev/null
