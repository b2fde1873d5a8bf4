"""neural_memory against titans-pytorch, the best-tested public Titans memory, set up so that both say the same."""

import pytest
import torch
from checks import assert_close

from memzoo.kernels import neural_memory

titans_pytorch = pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed: pip install -e '.[peers]'")

HEADS, DIM = 2, 16


def theirs(depth, chunk_size, loss, heads=HEADS):
    """Their `chunk_size` is how many tokens share a gate, ours how many share the weights that gradients are taken at, their `batch_size`.

    Left out of theirs, since ours has none: the norm before the projections and the memory's residual and LayerNorm.
    """
    memory = titans_pytorch.NeuralMemory(
        heads * DIM, dim_head=DIM, heads=heads, chunk_size=1, batch_size=chunk_size, pre_rmsnorm=False,
        mem_model_norm_add_residual=False, model=titans_pytorch.MemoryMLP(DIM, depth=depth, expansion_factor=2),
        default_step_transform_max_lr=2.0, **({} if loss == "l2" else {"store_memory_loss_fn": lambda y, v: -(y * v).mean(-1)}),
    )  # fmt: skip
    return memory.double()


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("loss", ["l2", "dot"])
@pytest.mark.parametrize(("depth", "chunk_size"), [(1, 1), (1, 4), (2, 1), (2, 4), (2, 16), (3, 4)])
def test_outputs_states_and_gradients(implementation, loss, depth, chunk_size):
    memory = theirs(depth, chunk_size, loss)
    x = torch.randn(2, 11, HEADS * DIM, dtype=torch.float64, requires_grad=True)
    retrieved, after = memory(x)
    their_weights, their_momentum = ([part[f"weights.{i}"] for i in range(depth)] for part in after.states)

    def heads(t):  # [B, T, H D] to [B, T, H, D]
        return t.unflatten(-1, (HEADS, -1))

    # The mean over D in their loss, and no 1/2, against our 1/2 and the sum: a constant factor of the step.
    lr = memory.to_adaptive_step[0](x).sigmoid() * 2.0 * (2 if loss == "l2" else 1) / DIM
    gates = [memory.to_momentum[0](x).sigmoid(), memory.to_decay_factor[0](x).sigmoid()]
    read, state = neural_memory(
        heads(memory.to_queries(x)), heads(memory.to_keys(x)), heads(memory.to_values(x)), lr, *gates,
        tuple(memory.memory_model_parameters), chunk_size=chunk_size, residual=False, loss=loss, output_final_state=True,
        implementation=implementation,
    )  # fmt: skip
    gate = memory.retrieve_gate[0](x).sigmoid()
    output = memory.combine_heads((read * gate[..., None]).flatten(2))

    assert_close(output, retrieved)
    for i in range(depth):
        assert_close(state.weights[i].flatten(0, 1), their_weights[i], name=f"weights of layer {i}")
        assert_close(state.momentum[i].flatten(0, 1), their_momentum[i][0], name=f"momentum of layer {i}")
    leaves = {"input": x, **dict(memory.named_parameters())}
    gradients = []
    for y, weights in ((output, state.weights), (retrieved, their_weights)):
        total = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).cos().view(y.shape)).sum() + weights[0].square().sum()
        gradients.append(torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True))
    for name, ours, expected in zip(leaves, *gradients):
        assert_close(ours, expected, 1e-8, f"gradient of {name}")
