"""neural_memory, the Triton form at depth 2 and the gates that both depths share: against the chunked form and the definition."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_grads_close, packed_example

from memzoo.kernels import neural_memory
from memzoo.kernels.neural_memory import NeuralMemoryState

CHUNK = 16
PARTS = ("weights", "momentum", "start")


def example(batch=2, length=37, heads=2, dim=16, hidden=32, value_dim=None, dtype=torch.float32, count=None, state=False, calm=1.0):
    """Tensor arguments by name; a state's tensors are called weights0 to start1, the weights of a call without one w0 and w1."""
    value_dim = dim if value_dim is None else value_dim
    shapes = ((heads, dim, hidden), (heads, hidden, value_dim))
    tensors = {
        "q": F.normalize(torch.randn(batch, length, heads, dim), dim=-1).to(dtype),
        "k": F.normalize(torch.randn(batch, length, heads, dim), dim=-1).to(dtype),
        "v": torch.randn(batch, length, heads, value_dim, dtype=dtype),
        "lr": calm * torch.rand(batch, length, heads),
        "momentum": torch.rand(batch, length, heads),
        "decay": 0.3 * torch.rand(batch, length, heads),
    }
    for i, shape in enumerate(shapes):
        if not state:
            tensors[f"w{i}"] = torch.randn(shape) / shape[1] ** 0.5
        for part in PARTS if state else ():
            tensors[f"{part}{i}"] = torch.randn(batch if count is None else count, *shape) / shape[1] ** 0.5
    return tensors


def run(q, k, v, lr, momentum, decay, position=None, implementation=None, **options):
    """neural_memory on the arguments of `example`."""
    held = {name: options.pop(name) for name in list(options) if name[:-1] in ("w", *PARTS)}
    depth = len(held) if position is None else len(held) // 3
    if position is None:
        weights, state = tuple(held[f"w{i}"] for i in range(depth)), None
    else:
        state = NeuralMemoryState(*(tuple(held[f"{part}{i}"] for i in range(depth)) for part in PARTS), position)
        weights = tuple(w[0] for w in state.weights)
    y, state = neural_memory(
        q, k, v, lr, momentum, decay, weights, chunk_size=CHUNK, initial_state=state, implementation=implementation, **options
    )  # fmt: skip
    return (y,) if state is None else (y, *state[:3])


def compare(args, options, bound=None, gradient_bound=None):
    assert_grads_close(run, args, options, "triton", "chunked", bound, gradient_bound)


@pytest.fixture
def few_programs(monkeypatch):
    """Two programs for everything: each takes several (sequence, head)s in turn, and there are several super-chunks."""
    monkeypatch.setattr(importlib.import_module("memzoo.kernels.neural_memory.kernel"), "PROGRAMS", 2)


CASES = {
    "plain": ({"length": 13}, {}),
    "super-chunks": ({"batch": 1, "length": 70, "heads": 1, "calm": 0.1}, {"output_final_state": True}),
    "dot": ({"length": 20, "heads": 1}, {"loss": "dot", "residual": False, "output_final_state": True}),
    "clamp, Dv not D": ({"length": 20, "heads": 1, "value_dim": 24}, {"residual": False, "max_grad_norm": 0.7}),
    "dot and clamp": ({"length": 20, "batch": 1}, {"loss": "dot", "max_grad_norm": 0.5, "output_final_state": True}),
    "state, no power of two": (
        {"length": 18, "heads": 1, "state": True, "dim": 24, "hidden": 48},
        {"position": torch.tensor([5, 0]), "max_grad_norm": 1.0, "output_final_state": True},
    ),
    "inside one open chunk": (
        {"length": 4, "heads": 1, "state": True},
        {"position": torch.tensor([5, 12]), "output_final_state": True},
    ),
    "packed": ({"batch": 1, "length": 25}, {"cu_seqlens": torch.tensor([0, 5, 5, 5, 22, 25]), "output_final_state": True}),
    "packed, states": (
        {"batch": 1, "length": 37, "heads": 1, "count": 6, "state": True},
        {
            "position": torch.tensor([5, 0, 3, 15, 0, 9]), "cu_seqlens": torch.tensor([0, 20, 20, 20, 33, 36, 37]),
            "output_final_state": True,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case, few_programs):
    kinds, options = CASES[case]
    compare(example(**kinds), options)


def test_clamp_takes_some_tokens_and_leaves_others():
    """Of the clamped cases above, one token's gradient is larger than the limit and another's is smaller."""
    for case in ("clamp, Dv not D", "dot and clamp"):
        torch.manual_seed(0)
        kinds, options = CASES[case]
        args = example(**kinds)
        free = run(**args, **{**options, "max_grad_norm": 1e9}, implementation="chunked")[0]
        bound = run(**args, **options, implementation="chunked")[0]
        scaled = run(**args, **{**options, "max_grad_norm": 1e-9}, implementation="chunked")[0]
        assert not torch.allclose(bound, free) and not torch.allclose(bound, scaled)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_gates_of_exactly_0_and_1(momentum, decay):
    args = example(1, 18, 1, calm=0.2)
    args["momentum"][:, ::2], args["decay"][:, ::3] = momentum, decay
    compare(args, {"output_final_state": True})


def test_gate_kernels_at_every_length_of_a_chunk():
    """The products of a chunk's gates and their gradients against the recurrences they are defined by, row by row."""
    gates = importlib.import_module("memzoo.kernels.neural_memory.gates")
    lengths, positions = [5, 0, 35, 1], [3, 0, 15, 7]
    cu_seqlens, _ = packed_example(lengths)
    eta, alpha = torch.rand(2, 1, sum(lengths), 2)
    eta[0, 6], eta[0, 9], alpha[0, 8], alpha[0, 3] = 0.0, 1.0, 1.0, 0.0
    position = torch.tensor(positions)
    prepared = gates.prepare(eta, alpha, position, cu_seqlens, CHUNK, keep_products=True)
    dmask, dscalars = torch.randn_like(prepared[0]), torch.randn_like(prepared[1])
    actual = [*prepared[:2], *gates.prepare_backward(eta, alpha, position, cu_seqlens, CHUNK, prepared, dmask, dscalars)]
    eta, alpha = (x.double().requires_grad_() for x in (eta, alpha))
    masks, scalars, token = [], [], 0
    for length, place in zip(lengths, positions):
        left = length
        while left:
            count = min(left, CHUNK - place)
            e, beta, c = (torch.full((2,), x, dtype=torch.float64) for x in (1.0, 1.0, 0.0))
            products, mask = torch.zeros(2, 2, CHUNK, dtype=torch.float64)
            rows = []
            for r in range(count):
                gate, keep = eta[0, token + r, :, None], 1 - alpha[0, token + r, :, None]
                products = gate * products + F.one_hot(torch.tensor(place + r), CHUNK)
                mask = keep * mask + products
                e, beta = gate[:, 0] * e, keep[:, 0] * beta
                c = keep[:, 0] * c + e
                masks.append(mask)
                rows.append((beta, c, e))
            scalars += [torch.stack((*row, products[:, place + r]), -1) for r, row in enumerate(rows)]
            token, left, place = token + count, left - count, 0
    masks, scalars = torch.stack(masks)[None], torch.stack(scalars)[None]
    grads = torch.autograd.grad((masks * dmask).sum() + (scalars * dscalars).sum(), (eta, alpha))
    for a, e in zip(actual, (masks, scalars, *grads)):
        assert_close(a, e.detach())


def test_split_of_a_sequence_equals_one_pass():
    args = example(1, 21, 1, calm=0.3)
    weights = {name: t for name, t in args.items() if name.startswith("w")}
    tokens = {name: t for name, t in args.items() if name not in weights}
    whole = run(**args, output_final_state=True, implementation="triton")
    parts, held, done = [], weights, 0
    for stop in (3, 16, 19, 20, 21):  # ends inside a chunk, at its end, and single tokens, which are decode steps
        position = {} if done == 0 else {"position": torch.tensor([done % CHUNK])}
        piece = {name: t[:, done:stop] for name, t in tokens.items()}
        y, *state = run(**piece, **held, **position, output_final_state=True, implementation="triton")
        held = {f"{part}{i}": w for part, layers in zip(PARTS, state) for i, w in enumerate(layers)}
        parts.append(y)
        done = stop
    assert_close(torch.cat(parts, 1), whole[0])
    for part, expected in zip(state, whole[1:]):
        for a, e in zip(part, expected):
            assert_close(a, e)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.7}, {"loss": "dot", "residual": False}])
def test_decode_step_equals_the_definition(options):
    args = example(3, 1, state=True, dim=24, hidden=48)
    options = {**options, "position": torch.tensor([0, 4, CHUNK - 1]), "output_final_state": True}
    actual, expected = (run(**args, **options, implementation=name) for name in ("triton", "reference"))
    assert_close(actual[0], expected[0])
    for part, expected_part in zip(actual[1:], expected[1:]):
        for a, e in zip(part, expected_part):
            assert_close(a, e)


def test_bfloat16_in_the_interpreter():
    args = example(1, 20, 1, dtype=torch.bfloat16, calm=0.3)
    assert_grads_close(run, args, {"output_final_state": True}, "triton", bound=2e-2, gradient_bound=5e-2)


def test_without_gradients_keeps_no_boundaries(monkeypatch):
    kernel = importlib.import_module("memzoo.kernels.neural_memory.kernel")
    seen = []
    original = kernel.mlp_forward
    monkeypatch.setattr(kernel, "mlp_forward", lambda *args: (seen.append(args[-1]), original(*args)))
    args = example(1, 40, 1, calm=0.1)
    (y,) = run(**args, implementation="triton")
    (again,) = run(**{name: t.requires_grad_() for name, t in args.items()}, implementation="triton")
    assert seen[0] is None and seen[1] is not None and torch.equal(y, again)


@pytest.mark.parametrize(("sizes", "message"), [({"dim": 136}, "head dimensions 136 and 136"), ({"hidden": 40}, "hidden width 40")])
def test_what_the_kernels_do_not_take_is_one_clear_line(sizes, message):
    with pytest.raises(ValueError, match="implementation 'triton' takes") as error:
        run(**example(1, 2, 1, **sizes), implementation="triton")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dim", "hidden"), [(64, 256), (32, 64), (128, 128)])
def test_gpu_bfloat16_at_real_size(dim, hidden, packed, monkeypatch):
    monkeypatch.setitem(globals(), "CHUNK", 64)
    cu_seqlens, lengths = packed_example([300, 1, 0, 500, 95]) if packed else (None, [1024])
    args = example(1, sum(lengths), 4, dim, hidden, dtype=torch.bfloat16, count=len(lengths), calm=0.02)
    options = {"output_final_state": True, "max_grad_norm": 1.0, "cu_seqlens": None if cu_seqlens is None else cu_seqlens.cuda()}
    compare({name: t.cuda() for name, t in args.items()}, options, bound=2e-2, gradient_bound=5e-2)


@pytest.mark.gpu
def test_gpu_float32_with_states_and_decode_step(monkeypatch):
    monkeypatch.setitem(globals(), "CHUNK", 64)
    args = {name: t.cuda() for name, t in example(2, 300, 2, 64, 128, state=True, calm=0.02).items()}
    options = {"position": torch.tensor([0, 9], device="cuda"), "output_final_state": True}
    compare(args, options, bound=1e-3, gradient_bound=5e-3)
    step = {name: t[:, :1] if name in ("q", "k", "v", "lr", "momentum", "decay") else t for name, t in args.items()}
    for a, e in zip(*(run(**step, **options, implementation=name) for name in ("triton", "reference"))):
        assert_close(a if isinstance(a, torch.Tensor) else a[0], e if isinstance(e, torch.Tensor) else e[0])
