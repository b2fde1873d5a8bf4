"""Test set-up: Triton's interpreter (made right) where there is no GPU, one thread a worker, and allocations poisoned with NaN."""

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before Triton is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
from hypothesis import HealthCheck, settings

if not HAS_GPU:
    from interpreter import install

    install()

settings.register_profile(
    "memzoo",
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
    database=None,
)
settings.load_profile("memzoo")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; scripts/gpu_check.sh runs it on one"))


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poisoned_allocations(request, monkeypatch):
    """Memory that a kernel should have written and did not shows up as NaN, not as zeros left by chance."""
    if "kernels" not in str(request.path):
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **kwargs):
            out = _original(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, poisoned)
