#!/usr/bin/env bash
# From a fresh clone to scored models: sets up .venv, trains tiny models on needles in real prose, scores them: bash scripts/demo.sh.
#
# Takes the options of scripts/demo.py: --all (every architecture, not one of each family), --only NAME ..., --out FOLDER, --samples N.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh train,eval

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset MEMZOO_KERNELS TRITON_INTERPRET PYTHONPATH
exec "${MEMZOO_VENV:-$PWD/.venv}/bin/python" scripts/demo.py "$@"
