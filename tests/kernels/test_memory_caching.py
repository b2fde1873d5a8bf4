"""memory_caching: its forms against each other and the paper's equations, identities, the properties of every operator, bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_grads_close, packed_example
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from memzoo.kernels import MemoryCachingState, delta_rule, linear_attention, memory_caching

IMPLEMENTATIONS = ["chunked"]  # tests of Triton's form are in test_memory_caching_triton.py, and below where few calls do
ALL = ["reference", *IMPLEMENTATIONS]
DTYPE = {"reference": torch.float64, "chunked": torch.float64, "triton": torch.float32}
GATED = list(itertools.product(["gated", "soup", "sparse"], ["mean", "energy", "submax"]))
READS = [("residual", "mean"), ("average", "mean"), *GATED]
WITH_TRITON = [*(("chunked", *read) for read in READS), ("triton", "gated", "submax"), ("triton", "sparse", "energy")]
VARIANTS = ["plain", "decay", "delta", "swla"]
TOKENS = ("q", "k", "v", "u", "routing_keys", "log_decay", "beta", "write_gate", "shift_gate")
STATE = ("memory", "cached", "pooled", "descriptors", "previous_key", "previous_value")


def example(
    batch=1, length=11, heads=2, key_dim=16, value_dim=24, size=None, variant="plain", dtype=torch.float64
) -> dict[str, torch.Tensor]:
    """Arguments of T tokens; with `size` descriptors pool routing keys of their own, of that many dimensions."""
    shape = (batch, length, heads)
    tensors = {
        "q": torch.randn(*shape, key_dim),
        "k": F.normalize(torch.randn(*shape, key_dim), dim=-1),
        "v": torch.randn(*shape, value_dim),
        "u": 2 * torch.randn(*shape, size or key_dim),
    }
    if size:
        tensors["routing_keys"] = F.normalize(torch.randn(*shape, size), dim=-1)
    if variant in ("decay", "swla"):
        tensors["log_decay"] = -0.3 * torch.rand(*shape)
    if variant == "delta":
        tensors["beta"] = torch.rand(*shape)
    if variant == "swla":
        tensors["write_gate"], tensors["shift_gate"] = torch.rand(*shape), torch.rand(*shape)
    return {name: t.to(dtype) for name, t in tensors.items()}


def options(aggregation, routing="mean", segment_length=4, **others):
    return {
        "aggregation": aggregation, "routing": routing, "segment_length": segment_length,
        "top_k": 2 if aggregation == "sparse" else None, **others,
    }  # fmt: skip


def parts(state):
    """A state's tensors, and its numbers as tensors [N], so that states compare like outputs."""
    if state is None:
        return []
    count = len(state.cached[0])
    numbers = [torch.as_tensor(x).double().expand(count) for x in (state.position, state.count)]
    tensors = [state.memory, *state.cached, state.pooled, state.descriptors, *(state.previous or ())]
    return [t for t in tensors if t is not None] + numbers


def run(implementation=None, sizes=None, position=0, count=0, **arguments):
    """(outputs, the final state's parts) of a call, or of calls with `sizes` tokens one after the other.

    The parts of an initial state, and of its position and count, are arguments of their own; the definition always makes one call."""
    tokens = {name: arguments.pop(name) for name in TOKENS if name in arguments}
    held = {name: arguments.pop(name) for name in STATE if name in arguments}
    state = None
    if held:
        previous = (held["previous_key"], held["previous_value"]) if "previous_key" in held else None
        cached = (held["cached"],)
        state = MemoryCachingState(held["memory"], cached, held.get("pooled"), held.get("descriptors"), position, count, previous)
    keep = arguments["segment_length"] != "log"
    length = tokens["v"].shape[1]
    if sizes is None or implementation == "reference" or not keep:
        sizes = [length]
    outputs = []
    for piece in zip(*(t.split(sizes, 1) for t in tokens.values())):
        y, state = memory_caching(
            **{"u": None, **dict(zip(tokens, piece))}, **arguments, initial_state=state, output_final_state=keep,
            implementation=implementation,
        )  # fmt: skip
        outputs.append(y)
    return torch.cat(outputs, 1), parts(state)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize(("aggregation", "routing"), READS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forms_agree_with_the_definition(implementation, aggregation, routing, restart):
    """Outputs, final states and all gradients, in one call or two, whose second one's gradients go through the state between them."""
    cases = list(itertools.product(VARIANTS, [1, 4, 5, 11, 20, "log"]))
    for i, (variant, segment_length) in enumerate(cases):
        arguments = example(variant=variant, dtype=DTYPE[implementation])
        choice = options(aggregation, routing, segment_length, restart=restart, sizes=[(3, 8), (4, 7), (11,)][i % 3])
        assert_grads_close(run, arguments, choice, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(
    batch=st.integers(1, 2), length=st.integers(1, 24), heads=st.integers(1, 2), key_dim=st.sampled_from([16, 24, 40]),
    value_dim=st.sampled_from([16, 32, 72]), size=st.sampled_from([None, 16, 32]), variant=st.sampled_from(VARIANTS),
    read=st.sampled_from(READS), segment_length=st.integers(1, 12), restart=st.booleans(), first=st.integers(0, 24),
)  # fmt: skip
def test_forms_agree_at_many_shapes(
    implementation, batch, length, heads, key_dim, value_dim, size, variant, read, segment_length, restart, first
):
    arguments = example(batch, length, heads, key_dim, value_dim, size, variant, DTYPE[implementation])
    sizes = [first, length - first] if 0 < first < length else None
    assert_grads_close(run, arguments, options(*read, segment_length, restart=restart, sizes=sizes), implementation)


def held_state(batch, heads, key_dim, value_dim, aggregation, routing, count, swla, dtype):
    """A state of random numbers with NaN in the places of the cache that hold no memory."""
    slots = max(count) if aggregation in ("gated", "soup", "sparse") else 1
    held = {
        "memory": torch.randn(batch, heads, key_dim, value_dim),
        "cached": torch.randn(batch, slots, heads, key_dim, value_dim),
    }
    if aggregation in ("gated", "soup", "sparse"):
        rows = {"mean": 1, "submax": 8, "energy": key_dim}[routing]
        described = (heads, key_dim) if routing == "mean" else (heads, rows, key_dim)
        held["pooled"] = 0.3 * torch.randn(batch, heads, rows, key_dim)
        held["descriptors"] = 0.3 * torch.randn(batch, slots, *described)
        for n, known in enumerate(count):
            held["cached"][n, known:] = held["descriptors"][n, known:] = torch.nan
    if swla:
        held["previous_key"], held["previous_value"] = torch.randn(batch, heads, key_dim), torch.randn(batch, heads, value_dim)
    return {name: t.to(dtype) for name, t in held.items()}


@pytest.mark.parametrize("differ", [False, True], ids=["alike", "rows differ"])
@pytest.mark.parametrize(("implementation", "aggregation", "routing"), WITH_TRITON)
def test_gradients_of_the_initial_state(implementation, aggregation, routing, differ):
    """Of every part; with rows that are at other places of their segments and have cached other numbers of memories."""
    dtype, restart = DTYPE[implementation], routing != "energy"
    arguments = example(2, 9, 1, 16, 16, variant="swla", dtype=dtype)
    counts = [3, 1] if differ else [3, 3]
    arguments |= held_state(2, 1, 16, 16, aggregation, routing, counts, True, dtype)
    places = {"position": torch.tensor([2, 13]), "count": torch.tensor(counts)} if differ else {"position": 12, "count": 3}
    choice = options(aggregation, routing, 16, restart=restart, **places)

    def known(**tensors):  # gradients of what holds no memory are zeros, so NaN there is a constant
        if differ and "descriptors" in tensors:
            for name in ("cached", "descriptors"):
                held = torch.arange(3)[None] < torch.tensor(counts)[:, None]
                held = held.view(2, 3, *(1,) * (tensors[name].dim() - 2))
                tensors[name] = torch.where(held, tensors[name].nan_to_num(), torch.nan)
        return run(**tensors)

    assert_grads_close(known, {n: t.nan_to_num() for n, t in arguments.items()}, choice, implementation)


def paper(q, k, v, u, sizes, aggregation, routing, top_k, restart, log_decay=None, beta=None, write_gate=None, shift_gate=None):
    """Eq. 4 to 17, 26 to 29 and Sec. 4.3 for one head: q, k, v, u [T, D], gates [T]; `sizes` are the lengths of the segments."""
    cached, outputs, t = [], [], 0
    memory = torch.zeros(k.shape[1], v.shape[1], dtype=q.dtype)
    for size in sizes:
        keys = []
        if restart:
            memory = torch.zeros_like(memory)
        for place in range(min(size, len(q) - t)):
            if log_decay is not None:
                memory = memory * log_decay[t].exp()
            value = v[t] if beta is None else beta[t] * (v[t] - k[t] @ memory)
            memory = memory + (1 if write_gate is None else write_gate[t]) * torch.outer(k[t], value)
            if shift_gate is not None and t > 0 and (place > 0 or not restart):
                memory = memory + shift_gate[t] * torch.outer(k[t - 1], v[t - 1])
            keys.append(k[t])
            segments = [*cached, (memory, keys, size)]
            reads = torch.stack([q[t] @ m for m, _, _ in segments])
            if aggregation == "residual":
                outputs.append(reads.sum(0))
            elif aggregation == "average":
                outputs.append(reads.mean(0))
            else:
                scores = torch.stack([relevance(u[t], members, length, routing) for _, members, length in segments])
                chosen = set(scores[:-1].argsort(descending=True).tolist()[: len(q) if top_k is None else top_k])
                exponents = [s.exp() if i in chosen else 0 * s for i, s in enumerate(scores[:-1])] + [scores[-1].exp()]
                mixed = sum(e * m for e, (m, _, _) in zip(exponents, segments)) / sum(exponents)
                outputs.append(q[t] @ mixed)
            t += 1
        cached.append((memory, keys, size))
    return torch.stack(outputs)


def relevance(u, keys, size, routing):
    """The score of a segment of `size` tokens that has these keys so far."""
    if routing == "energy":
        return sum((u @ k) ** 2 for k in keys)
    block = -(-size // 8) if routing == "submax" else size
    return max(u @ (sum(keys[i : i + block]) / len(keys[i : i + block])) for i in range(0, len(keys), block))


@pytest.mark.parametrize(("aggregation", "routing"), READS)
@pytest.mark.parametrize("implementation", ALL)
def test_equations_of_the_paper(implementation, aggregation, routing):
    for restart, variant, (segment_length, sizes) in itertools.product(
        [True, False], VARIANTS, [(5, [5, 5, 5, 5, 5]), ("log", [16, 4, 2, 1])]
    ):
        arguments = example(1, 23, 1, variant=variant, dtype=DTYPE[implementation])
        choice = options(aggregation, routing, segment_length, restart=restart)
        y, _ = memory_caching(**arguments, **choice, implementation=implementation)
        one = {name: t[0, :, 0].double() for name, t in arguments.items()}
        expected = paper(**one, sizes=sizes, restart=restart, **{n: choice[n] for n in ("aggregation", "routing", "top_k")})
        assert_close(y[0, :, 0], expected)


@pytest.mark.parametrize("variant", ["decay", "delta"])
@pytest.mark.parametrize(("aggregation", "routing"), READS)
@pytest.mark.parametrize("implementation", ALL)
def test_one_segment_is_the_base_memory(implementation, aggregation, routing, variant):
    arguments = example(2, 7, variant=variant, dtype=DTYPE[implementation])
    y, state = memory_caching(
        **arguments, **options(aggregation, routing, 8), output_final_state=True, implementation=implementation
    )
    tokens = {n: t.double() for n, t in arguments.items() if n != "u"}
    base = delta_rule if variant == "delta" else linear_attention
    expected, memory = base(**tokens, output_final_state=True, implementation="reference")
    assert_close(y, expected)
    assert_close(state.memory, memory)
    assert state.count == 0 and state.position == 7


@pytest.mark.parametrize("implementation", ALL)
def test_residual_without_decay_is_linear_attention(implementation):
    arguments = example(2, dtype=DTYPE[implementation])
    tokens = {n: t for n, t in arguments.items() if n != "u"}
    expected, _ = linear_attention(**{n: t.double() for n, t in tokens.items()}, implementation="reference")
    for segment_length in (1, 4, 5, "log"):
        y, _ = memory_caching(**tokens, u=None, **options("residual", "mean", segment_length), implementation=implementation)
        assert_close(y, expected)


@pytest.mark.parametrize("implementation", ALL)
def test_residual_that_carries_on_counts_writes_again_and_again(implementation):
    """What segment i wrote is in all memories from its own to the reading token's, s - i + 1 of them."""
    arguments = example(dtype=DTYPE[implementation])
    y, _ = memory_caching(**arguments, **options("residual", restart=False), implementation=implementation)
    segment = torch.arange(11) // 4
    times = (segment[:, None] - segment + 1).double().tril()
    q, k, v = (arguments[n].double() for n in "qkv")
    expected = torch.einsum("bthd,bjhd,tj,bjhe->bthe", q, k, times.clamp(min=0).tril(), v)
    assert_close(y, expected)


@pytest.mark.parametrize("routing", ["mean", "energy", "submax"])
@pytest.mark.parametrize("implementation", ALL)
def test_gated_soup_and_sparse_that_reads_all_are_one(implementation, routing):
    arguments = example(2, dtype=DTYPE[implementation], variant="swla")
    outputs = {}
    for aggregation in ("gated", "soup", "sparse"):
        choice = {**options(aggregation, routing), "top_k": 2 if aggregation == "sparse" else None}
        outputs[aggregation], _ = memory_caching(**arguments, **choice, implementation=implementation)
    assert_close(outputs["soup"], outputs["gated"])
    assert_close(outputs["sparse"], outputs["gated"])  # 11 tokens: at most two segments of 4 are cached


@pytest.mark.parametrize("implementation", ALL)
def test_a_segment_a_token_is_softmax_attention(implementation):
    """y_t = sum_i softmax_i(u_t . k_i) (k_i . q_t) v_i; with k_i . q_t = 1, attention itself with query u."""
    arguments = example(2, 9, dtype=DTYPE[implementation])
    arguments["k"][..., 0] = 1
    arguments["q"] = torch.zeros_like(arguments["q"])
    arguments["q"][..., 0] = 1
    y, _ = memory_caching(**arguments, **options("gated", "mean", 1), implementation=implementation)
    u, k, v = (arguments[n].double().transpose(1, 2) for n in "ukv")
    expected = F.scaled_dot_product_attention(u, k, v, is_causal=True, scale=1.0).transpose(1, 2)
    assert_close(y, expected)


@pytest.mark.parametrize(("implementation", "aggregation", "routing"), [*WITH_TRITON, *(("reference", *read) for read in READS)])
def test_causal_batch_independent_and_repeatable(implementation, aggregation, routing):
    """Bit for bit. Tokens 13 on of the first sequence change, all of a token or its values and gates only."""
    arguments = example(2, 22, 1, variant="swla", dtype=DTYPE[implementation])
    arguments["u"] *= 3  # gates that are nearly 0 and 1
    choice = options(aggregation, routing, 5, implementation=implementation)
    before, _ = run(**arguments, **choice)
    again, _ = run(**arguments, **choice)
    assert torch.equal(before, again)
    for names in (arguments, ("v", "log_decay", "write_gate", "shift_gate")):
        changed = {name: torch.cat((t[:, :13], 1.5 * t[:, 13:]), 1) if name in names else t for name, t in arguments.items()}
        changed = {name: torch.cat((t[:1], arguments[name][1:])) for name, t in changed.items()}
        after, _ = run(**changed, **choice)
        assert torch.equal(before[0, :13], after[0, :13])
        assert torch.equal(before[1], after[1])
        assert not torch.equal(before[0, 13:], after[0, 13:])


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize(("aggregation", "routing"), READS)
@pytest.mark.parametrize("implementation", ALL)
def test_any_split_equals_one_pass(implementation, aggregation, routing, restart):
    arguments = example(2, 19, 1, variant="swla", dtype=DTYPE[implementation])
    choice = options(aggregation, routing, 4, restart=restart, implementation=implementation)
    whole, last = run(**arguments, **choice)
    for sizes in ([1] * 19, [7, 1, 8, 3], [18, 1]) if implementation == "chunked" else ([1, 6, 12],):
        state, outputs = None, []
        for piece in zip(*(t.split(sizes, 1) for t in arguments.values())):
            y, state = memory_caching(**dict(zip(arguments, piece)), **choice, initial_state=state, output_final_state=True)
            outputs.append(y)
        assert_close(torch.cat(outputs, 1), whole)
        for part, expected in zip(parts(state), last):
            assert_close(part, expected)


@pytest.mark.parametrize("segment_length", [4, "log"])
@pytest.mark.parametrize(("aggregation", "routing"), READS)
@pytest.mark.parametrize("implementation", ALL)
def test_packed_equals_separate(implementation, aggregation, routing, segment_length):
    """And what follows on the packed sequences' states, whose positions and counts differ, packed or as the rows of a batch."""
    cu_seqlens, lengths = packed_example([0, 6, 1, 8, 0, 3])
    arguments = example(1, sum(lengths), 1, variant="swla", dtype=DTYPE[implementation])
    keep = segment_length != "log"
    choice = options(aggregation, routing, segment_length, output_final_state=keep, implementation=implementation)
    y, state = memory_caching(**arguments, **choice, cu_seqlens=cu_seqlens)
    following = example(len(lengths), 6, 1, variant="swla", dtype=DTYPE[implementation])
    if keep:
        assert state.position.tolist() == [0, 2, 1, 0, 0, 3] and state.count.tolist() == [0, 1, 0, 2, 0, 0]
        later, last = memory_caching(**following, **choice, initial_state=state)
        ends = torch.arange(len(lengths) + 1) * 6
        laid = {name: t.flatten(0, 1)[None] for name, t in following.items()}
        packed, _ = memory_caching(**laid, **choice, initial_state=state, cu_seqlens=ends)
        assert_close(packed.view_as(later), later)
    for n, length in enumerate(lengths):
        rows = slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
        alone = {name: t[:, rows].double() for name, t in arguments.items()}
        if length:
            expected, _ = memory_caching(**alone, **{**choice, "implementation": "reference"})
            assert_close(y[:, rows], expected)
        if keep:
            alone = {name: torch.cat((t, following[name][n : n + 1].double()), 1) for name, t in alone.items()}
            expected, end = memory_caching(**alone, **{**choice, "implementation": "reference"})
            assert_close(later[n : n + 1], expected[:, length:])
            assert_close(last.memory[n], end.memory[0])
            if last.descriptors is not None:
                assert_close(last.cached[0][n, : end.count], end.cached[0][0])
                assert_close(last.descriptors[n, : end.count], end.descriptors[0])


@pytest.mark.parametrize("segment_length", [4, "log"])
@pytest.mark.parametrize(("aggregation", "routing"), [("residual", "mean"), ("gated", "energy"), ("sparse", "submax")])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_gradients(implementation, aggregation, routing, segment_length):
    cu_seqlens, lengths = packed_example([6, 0, 1, 13, 2])
    arguments = example(1, sum(lengths), 1, variant="swla", dtype=DTYPE[implementation])
    choice = options(aggregation, routing, segment_length, cu_seqlens=cu_seqlens)
    assert_grads_close(run, arguments, choice, implementation)


@pytest.mark.parametrize(("aggregation", "routing"), GATED)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_at_most_max_segments_are_kept(implementation, aggregation, routing):
    """The chunked form against the definition, whose token by token dropping is checked below, in one pass and in decoding."""
    for limit, segment_length in ((1, 3), (2, 2), (2, 1), (9, 2)):
        arguments = example(1, 11, 2, variant="swla", dtype=DTYPE[implementation])
        choice = options(aggregation, routing, segment_length, max_segments=limit)
        assert_grads_close(run, arguments, choice, implementation)
        whole, last = run(**arguments, **choice, implementation="reference")
        y, state = run(**arguments, **choice, sizes=[1] * 11, implementation=implementation)
        for actual, expected in zip((y, *state), (whole, *last)):
            assert_close(actual, expected)
        assert last[-1] == min(limit, 11 // segment_length)


def test_the_segment_that_is_dropped():
    """The one that the connector of the closing segment's last token scores lowest, which may be that segment, for each head alone."""
    arguments = example(1, 6, 2)
    choice = options("gated", "mean", 2, max_segments=2, implementation="reference")
    for head, lowest in ((0, 1), (1, 2)):
        wanted = torch.tensor([1.0 if i != lowest else -1.0 for i in range(3)]).repeat_interleave(2)
        arguments["k"][0, :, head] = 0.1 * torch.randn(6, 16)
        arguments["k"][0, :, head, 0] = wanted
        arguments["u"][0, 5, head] = F.one_hot(torch.tensor(0), 16)
    _, state = memory_caching(**arguments, **choice, output_final_state=True)
    written = (arguments["k"][0, :, :, :, None] * arguments["v"][0, :, :, None, :]).unflatten(0, (3, 2)).sum(1)
    assert_close(state.cached[0][0, :, 0], written[[0, 2], 0])
    assert_close(state.cached[0][0, :, 1], written[[0, 1], 1])
    assert state.count == 2


@pytest.mark.parametrize("routing", ["mean", "energy", "submax"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_single_token_touches_the_chosen_memories_only(implementation, routing):
    """The others may lie anywhere and stay there: here they are NaN."""
    arguments = example(2, 24, 2, dtype=DTYPE[implementation])
    choice = options("sparse", routing, 4, implementation=implementation, output_final_state=True)
    past, token = ({n: t[:, part] for n, t in arguments.items()} for part in (slice(23), slice(23, 24)))
    _, state = memory_caching(**past, **choice)
    expected, _ = memory_caching(**token, **choice, initial_state=state)
    u, k = (arguments[n].double() for n in "uk")
    scores = torch.zeros(2, 2, 5, dtype=torch.float64)
    for n, h, i in itertools.product(range(2), range(2), range(5)):
        scores[n, h, i] = relevance(u[n, 23, h], list(k[n, 4 * i : 4 * i + 4, h]), 4, routing)
    unread = torch.ones(2, 5, 2, dtype=torch.bool)
    for n, h in itertools.product(range(2), range(2)):
        unread[n, scores[n, h].argsort(descending=True)[:2], h] = False
    cached = state.cached[0].masked_fill(unread[..., None, None], torch.nan)
    assert cached.isnan().any(-1).any(-1).sum() == 12  # 3 of 5 memories of every sequence and head
    y, _ = memory_caching(**token, **choice, initial_state=state._replace(cached=(cached,)))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize(("aggregation", "routing"), GATED)
def test_cached_memories_may_lie_on_another_device(aggregation, routing, length):
    """Tensors without numbers, which torch tells apart by device."""
    choice = options(aggregation, routing, 4, implementation="chunked", output_final_state=True)
    rows = {"mean": (), "energy": (16,), "submax": (8,)}[routing]
    with FakeTensorMode():
        q, k, v, u = torch.zeros(4, 2, length, 1, 16).unbind()
        pooled, descriptors = torch.zeros(2, 1, *(rows or (1,)), 16), torch.zeros(2, 5, 1, *rows, 16)
        cached = torch.zeros(2, 5, 1, 16, 16, device="meta")
        state = MemoryCachingState(torch.zeros(2, 1, 16, 16), (cached,), pooled, descriptors, 1, 5)
        y, state = memory_caching(q, k, v, u, **choice, initial_state=state)
    assert y.device.type == "cpu" and state.cached[0].device.type == "meta"
    assert state.cached[0].shape[1] == state.count == 5 + (1 + length) // 4


@pytest.mark.parametrize(
    ("aggregation", "routing"), [("residual", "mean"), ("gated", "mean"), ("sparse", "energy"), ("sparse", "submax")]
)
def test_finite_for_long_input(aggregation, routing):
    arguments = example(1, 65_536, 1, 16, 16, variant="decay", dtype=torch.float32)
    y, state = memory_caching(**arguments, **options(aggregation, routing, 1024), output_final_state=True)
    assert all(torch.isfinite(t).all() for t in (y, *parts(state)))
    if aggregation != "residual":  # a sum of memories that grows with the length, as the paper has it
        assert y[:, -2048:].abs().max() < 10 * y[:, :2048].abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("aggregation", "routing"), [("residual", "mean"), ("soup", "energy"), ("sparse", "submax")])
def test_gradcheck_of_the_definition(aggregation, routing, variant):
    arguments = {name: t.requires_grad_() for name, t in example(1, 5, 1, 16, 16, variant=variant).items()}
    if aggregation == "residual":
        del arguments["u"]
    choice = options(aggregation, routing, 2, implementation="reference", top_k=1 if aggregation == "sparse" else None)

    def outputs(*values):
        y, state = run(**dict(zip(arguments, values)), **choice)
        return (y, *(t for t in state if t.requires_grad))

    assert torch.autograd.gradcheck(outputs, list(arguments.values()), fast_mode=True)


@pytest.mark.parametrize(
    ("aggregation", "routing"), [("residual", "mean"), ("gated", "mean"), ("soup", "energy"), ("sparse", "submax")]
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_to_one_graph_and_takes_meta_tensors(implementation, aggregation, routing):
    arguments = example(1, 11, 1, variant="swla", dtype=torch.float32)
    choice = options(aggregation, routing, 4, output_final_state=True, implementation=implementation)

    def loss(**tensors):
        y, state = memory_caching(**tensors, **choice)
        return y.square().sum() + sum(t.sum() for t in state.cached)

    tensors = {name: t.requires_grad_() for name, t in arguments.items()}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = (
        torch.autograd.grad(f(**tensors), list(tensors.values()), materialize_grads=True, allow_unused=True)
        for f in (loss, compiled)
    )
    for a, e in zip(actual, expected):
        assert_close(a, e)
    y, state = memory_caching(**{name: t.detach().to("meta") for name, t in arguments.items()}, **choice)
    _, real = memory_caching(**arguments, **choice)
    assert y.device.type == "meta" and y.shape == arguments["v"].shape
    assert [t.shape for t in parts(state)] == [t.shape for t in parts(real)]


@pytest.mark.parametrize("implementation", [*ALL, "triton"])
def test_mixed_types(implementation):
    arguments = example(1, 19, 2, variant="swla", dtype=torch.float32)
    choice = options("gated", "submax", 4, output_final_state=True)
    half = {name: t.bfloat16() if name in "qkvu" else t for name, t in arguments.items()}
    y, state = memory_caching(**half, **choice, implementation=implementation)
    expected, last = memory_caching(**{name: t.double() for name, t in half.items()}, **choice, implementation="reference")
    assert y.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in parts(state)[:-2])
    assert_close(y, expected, bound=2e-2)
    for part, wanted in zip(parts(state), parts(last)):
        assert_close(part, wanted, bound=1e-2)


ZERO = {
    "q": torch.zeros(2, 3, 1, 16), "k": torch.zeros(2, 3, 1, 16), "v": torch.zeros(2, 3, 1, 24), "u": torch.zeros(2, 3, 1, 16),
    "segment_length": 4,
}  # fmt: skip
SWLA = {"write_gate": torch.zeros(2, 3, 1), "shift_gate": torch.zeros(2, 3, 1)}
HELD = MemoryCachingState(
    torch.zeros(2, 1, 16, 24), (torch.zeros(2, 5, 1, 16, 24),), torch.zeros(2, 1, 1, 16), torch.zeros(2, 5, 1, 16), 3, 5
)


def held(**change):
    return {"initial_state": HELD._replace(**change)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 16)}, "q has shape [2, 3, 16], needs 4 dimensions [B, T, H, Dk]"),
        ({"q": torch.zeros(2, 0, 1, 16)}, "B and T must both be at least 1"),
        ({"q": None}, "q must be a torch.Tensor, got NoneType"),
        ({"k": torch.zeros(2, 3, 1, 24)}, "k has shape [2, 3, 1, 24], needs [B, T, H, Dk] = [2, 3, 1, 16]"),
        ({"v": torch.zeros(2, 3, 24)}, "v has shape [2, 3, 24], needs 4 dimensions [B, T, H, Dv]"),
        ({"v": torch.zeros(2, 4, 1, 24)}, "v has shape [2, 4, 1, 24], needs [B, T, H, Dv] = [2, 3, 1, 24]"),
        ({"v": torch.zeros(2, 3, 1, 20)}, "v has head dimension 20, needs a multiple of 8 from 16 to 256"),
        ({"q": torch.zeros(2, 3, 1, 264), "k": torch.zeros(2, 3, 1, 264)}, "q has head dimension 264"),
        ({"v": ZERO["v"].half()}, "v has dtype torch.float16, q has torch.float32"),
        ({"q": ZERO["q"].long()}, "q has dtype torch.int64, needs one of float32"),
        ({"log_decay": torch.zeros(2, 3)}, "log_decay has shape [2, 3], needs [B, T, H] = [2, 3, 1]"),
        ({"beta": torch.zeros(2, 3, 1).long()}, "beta has dtype torch.int64"),
        ({"write_gate": torch.zeros(2, 3, 1)}, "write_gate and shift_gate must be given together"),
        ({**SWLA, "beta": torch.zeros(2, 3, 1)}, "beta (delta writes) and shift_gate (additive writes of two tokens) exclude each other"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs packed input of batch 1, got batch 2"),
        ({"segment_length": 0}, "segment_length is 0, needs an integer of at least 1, or 'log'"),
        ({"segment_length": True}, "segment_length is True, needs an integer"),
        ({"segment_length": "linear"}, "segment_length is 'linear', needs an integer of at least 1, or 'log'"),
        ({"aggregation": "grm"}, "aggregation is 'grm', needs one of residual, gated, soup, sparse, average"),
        ({"routing": "max"}, "routing is 'max', needs one of mean, energy, submax"),
        ({"aggregation": "sparse"}, "top_k is None, needs an integer from 1 to 16 with aggregation 'sparse'"),
        ({"aggregation": "sparse", "top_k": 17}, "top_k is 17, needs an integer from 1 to 16"),
        ({"top_k": 2}, "top_k is 2, needs None with aggregation 'gated' ('sparse' has it)"),
        ({"segment_length": "log", "output_final_state": True}, "segment_length 'log' knows no state between calls"),
        ({"segment_length": "log", "initial_state": HELD}, "segment_length 'log' knows no state between calls"),
        ({"max_segments": 0}, "max_segments is 0, needs an integer of at least 1, or None"),
        ({"max_segments": 2, "aggregation": "residual"}, "max_segments needs scores and segments of one length: gated, soup, sparse"),
        ({"max_segments": 2, "segment_length": "log"}, "max_segments needs scores and segments of one length"),
        ({"u": None}, "u is None, needs connectors [B, T, H, R] with aggregation 'gated'"),
        ({"u": torch.zeros(2, 3, 16)}, "u has shape [2, 3, 16], needs 4 dimensions [B, T, H, R]"),
        ({"u": torch.zeros(2, 4, 1, 16)}, "u has shape [2, 4, 1, 16], needs [B, T, H, R] = [2, 3, 1, 16]"),
        ({"u": torch.zeros(2, 3, 1, 4)}, "u has head dimension 4"),
        ({"u": torch.zeros(2, 3, 1, 24)}, "routing_keys has shape [2, 3, 1, 16], needs [B, T, H, R] as u = [2, 3, 1, 24]"),
        ({"initial_state": torch.zeros(2, 1, 16, 24)}, "initial_state must be a MemoryCachingState, got Tensor"),
        (held(cached=()), "initial_state.cached has 0 tensors, needs 1"),
        (held(cached=(torch.zeros(2, 5, 1, 16, 16),)), "initial_state.cached[0] has shape [2, 5, 1, 16, 16], needs [N, S, H, ...]"),
        (held(memory=torch.zeros(1, 1, 16, 24)), "initial_state.memory has shape [1, 1, 16, 24], needs [N, H, Dk, Dv] = [2, 1, 16, 24]"),
        (held(memory=None), "initial_state.memory must be a torch.Tensor, got NoneType"),
        (held(memory=torch.zeros(2, 1, 16, 24).long()), "initial_state.memory has dtype torch.int64"),
        (held(pooled=None), "initial_state.pooled is None, needs what aggregation 'gated' keeps"),
        (held(descriptors=None), "initial_state.descriptors is None, needs what aggregation 'gated' keeps"),
        ({**held(), "routing": "submax"}, "initial_state.pooled has shape [2, 1, 1, 16], needs [N, ...] = [2, 1, 8, 16]"),
        (held(position=4), "initial_state.position is 4, needs 0 to segment_length - 1 = 3"),
        (held(position=torch.tensor([0, -1])), "initial_state.position is [0, -1], needs 0 to segment_length - 1 = 3"),
        (held(position=1.0), "initial_state.position must be an int or a tensor [N], got float"),
        (held(count=torch.tensor([1])), "initial_state.count has shape [1], needs [N] = [2]"),
        (held(count=6), "initial_state.count is 6, needs 0 to 5, the memories in cached"),
        ({**held(), "aggregation": "average"}, "initial_state.cached has 5 memories, needs 1 with 'average', their sum"),
        ({**held(), **SWLA}, "initial_state.previous is None, needs the last key and value with shift_gate"),
        ({**held(previous=(torch.zeros(2, 1, 16), torch.zeros(2, 1, 16))), **SWLA}, "initial_state.previous has shape [2, 1, 16], needs"),
        (held(descriptors=HELD.descriptors.to("meta")), "initial_state.descriptors is on meta, q is on cpu; they must be the same"),
        ({"implementation": "cuda"}, "implementation is 'cuda', needs one of triton, chunked, reference"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(change, message):
    with pytest.raises((ValueError, TypeError)) as error:
        memory_caching(**{**ZERO, **change})
    assert message in str(error.value)
    assert str(error.value).startswith("memory_caching: ") and "\n" not in str(error.value)
