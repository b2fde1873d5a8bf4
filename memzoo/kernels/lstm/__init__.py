"""LSTM: a vector memory with an input, a forget and an output gate, each of which reads the last output."""

from __future__ import annotations

from torch import Tensor

from ..common.checks import check_tensor
from ..common.dispatch import resolve_implementation
from ..common.recurrent import check_recurrence, starting_state
from .chunked import lstm_chunked
from .reference import lstm_reference

__all__ = ["lstm"]

OP = "lstm"


def lstm(
    x: Tensor,
    weight: Tensor,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    return_cells: bool = False,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor | tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """`a_t = x_t + h_{t-1} W`, `c_t = sigmoid(a_f) c_{t-1} + sigmoid(a_i) tanh(a_g)`, `h_t = sigmoid(a_o) tanh(c_t)`.

    Heads do not mix: with H = 1 this is the LSTM of torch.nn, with more its recurrent weight is block-diagonal. Source: Hochreiter and
    Schmidhuber 1997, "Long Short-Term Memory", with the forget gate of Gers et al. 2000.

    Args:
        x: the input's part of the gates, projection and biases included, [B, T, H, 4, D]: input i, forget f, cell g, output o, in
            torch's order; D a multiple of 8 from 16 to 256, on a GPU to 128 (64 in float32).
        weight: recurrent weights, [H, D, 4, D]: from the last output to the gates. Computed with in x's dtype.
        initial_state: (h, c), each [N, H, D], zeros if None. N is B, or the number of packed sequences.
        output_final_state: also return (h, c) after the last token.
        return_cells: return sigmoid(a_o) and c instead of h, for a reader that mixes cells before the output gate.
        cu_seqlens: boundaries of packed sequences, [N + 1], with B = 1; sequences may be empty.
        implementation: "triton", "chunked", "reference", or None for the one that fits the device.

    Returns:
        (h [B, T, H, D] in x's dtype, or with return_cells the pair (output gate, cell), each like h;
        final (h, c), each [N, H, D] in float32, float64 for float64 input, or None).

    Raises:
        ValueError, TypeError: an argument that does not fit, in one line, before anything runs.
    """
    if initial_state is not None and (not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2):
        raise TypeError(f"{OP}: initial_state is a {type(initial_state).__name__}, needs a pair (h, c) of tensors [N, H, D]")
    h, c = (None, None) if initial_state is None else initial_state
    if initial_state is not None:
        check_tensor(OP, "initial_state[0]", h)
        check_tensor(OP, "initial_state[1]", c)
    check_recurrence(OP, 4, x, weight, cu_seqlens, **{"initial_state[0]": h, "initial_state[1]": c})
    weight, h, c = weight.to(x.dtype), starting_state(x, h, cu_seqlens), starting_state(x, c, cu_seqlens)

    chosen = resolve_implementation(OP, implementation, x)
    if chosen == "reference":
        run = lstm_reference
    elif chosen == "chunked":
        run = lstm_chunked
    else:
        from .kernel import lstm_triton as run

    output, state = run(x, weight, h, c, return_cells, cu_seqlens)
    return output, state if output_final_state else None
