"""GRU: a vector memory that is interpolated towards a candidate, which reads as much of it as a reset gate lets through."""

from __future__ import annotations

from torch import Tensor

from ..common.checks import check_device, check_float, check_shape
from ..common.dispatch import resolve_implementation
from ..common.recurrent import check_recurrence, starting_state
from .chunked import gru_chunked
from .reference import gru_reference

__all__ = ["gru"]

OP = "gru"


def gru(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`r, z = sigmoid(x_r + h W_r), sigmoid(x_z + h W_z)`, `n = tanh(x_n + r (h W_n + b))`, `h_t = (1 - z) n + z h`, h being h_{t-1}.

    Heads do not mix: with H = 1 this is the GRU of torch.nn, with more its recurrent weight is block-diagonal. Source: Cho et al. 2014,
    "Learning Phrase Representations using RNN Encoder-Decoder", with the reset after the product as in cuDNN and torch.

    Args:
        x: the input's part of the gates, projection and biases included, [B, T, H, 3, D]: reset r, update z, new n, in torch's order;
            D a multiple of 8 from 16 to 256, on a GPU to 128 (64 in float32).
        weight: recurrent weights, [H, D, 3, D]: from the last state to the gates. Computed with in x's dtype.
        bias: the recurrent bias b inside the reset product (torch's b_hn), [H, D]; none if None.
        initial_state: [N, H, D], zeros if None. N is B, or the number of packed sequences.
        output_final_state: also return the state after the last token.
        cu_seqlens: boundaries of packed sequences, [N + 1], with B = 1; sequences may be empty.
        implementation: "triton", "chunked", "reference", or None for the one that fits the device.

    Returns:
        (h [B, T, H, D] in x's dtype, final h [N, H, D] in float32, float64 for float64 input, or None).

    Raises:
        ValueError, TypeError: an argument that does not fit, in one line, before anything runs.
    """
    check_recurrence(OP, 3, x, weight, cu_seqlens, initial_state=initial_state)
    if bias is None:
        bias = x.new_zeros(x.shape[2], x.shape[4])
    check_shape(OP, "bias", bias, (x.shape[2], x.shape[4]), "[H, D]")
    check_float(OP, bias=bias)
    check_device(OP, "x", x, bias=bias)
    weight, bias, state = weight.to(x.dtype), bias.to(x.dtype), starting_state(x, initial_state, cu_seqlens)

    chosen = resolve_implementation(OP, implementation, x)
    if chosen == "reference":
        run = gru_reference
    elif chosen == "chunked":
        run = gru_chunked
    else:
        from .kernel import gru_triton as run

    output, state = run(x, weight, bias, state, cu_seqlens)
    return output, state if output_final_state else None
