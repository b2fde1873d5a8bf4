"""What every operator's tests share: comparing forms and their gradients, packed examples."""

import itertools

import torch

# Largest allowed difference over the largest magnitude of the expected tensor.
BOUND = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def assert_close(actual, expected, bound=None, name=""):
    """Equal shapes, all finite, and the largest difference within `bound` times the expected tensor's largest magnitude."""
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)} against {list(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if expected.numel() == 0:
        return
    bound = BOUND[actual.dtype] if bound is None else bound
    difference = (actual.double() - expected.double().to(actual.device)).abs().max().item()
    scale = max(expected.abs().max().item(), 1e-3)
    assert difference <= bound * scale, f"{name}: differs by {difference:.3g}, {bound:.1g} of {scale:.3g} allowed"


def assert_grads_close(operator, args, options, implementation, against="reference", bound=None, gradient_bound=None):
    """Outputs and the gradients of every tensor argument equal the definition's, computed in float64 (float32 on `against="chunked"`)."""

    def run(tensors, implementation):
        tensors = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
        outputs = operator(**tensors, **options, implementation=implementation)
        outputs = [o for o in _flatten(outputs) if o is not None]
        weights = [torch.linspace(-1, 1, o.numel(), device=o.device, dtype=torch.float64).cos().view(o.shape) for o in outputs]
        loss = sum((o.double() * w).sum() for o, w in zip(outputs, weights))
        grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        return outputs, dict(zip(tensors, grads))

    dtype = torch.float64 if against == "reference" else torch.float32
    expected, expected_grads = run({name: t.to(dtype) for name, t in args.items()}, against)
    actual, actual_grads = run(args, implementation)
    for i, (a, e) in enumerate(zip(actual, expected)):
        assert_close(a, e, bound, f"output {i}")
    for name, e in expected_grads.items():
        a = actual_grads[name]
        if e is None or a is None:
            assert (a is None or not a.any()) and (e is None or not e.any()), f"gradient of {name}: one form has none"
            continue
        assert_close(a, e, gradient_bound or bound or 5 * BOUND[a.dtype], f"gradient of {name}")


def _flatten(value):
    if isinstance(value, (tuple, list)):
        return list(itertools.chain.from_iterable(_flatten(v) for v in value))
    return [value]


def packed_example(lengths):
    """(cu_seqlens [N + 1], lengths) for sequences of these lengths laid end to end."""
    return torch.tensor([0, *itertools.accumulate(lengths)]), list(lengths)
