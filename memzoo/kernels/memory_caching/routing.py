"""Routing: what describes a segment, and how a token scores the descriptors of closed segments and of its own open one.

    mean    d_i = mean of the segment's keys, r = u . d_i                                       (Eq. 10, the paper's)
    submax  d_is = mean of the keys of its s-th sub-block, r = max_s u . d_is                   (ours)
    energy  C_i = sum of k k^T, r = u^T C_i u: how much of u lies in the span of the keys       (ours)

The open segment's descriptor holds the tokens so far, the reading one included: anything else would show it the future.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear_attention import linear_attention
from .state import BLOCKS, Pieces


def blocks_of(routing: str) -> int:
    return BLOCKS if routing == "submax" else 1


def block_size(segment_length: int, blocks: int) -> int:
    """Tokens of a sub-block; the last ones of a segment may be shorter or empty."""
    return -(-segment_length // blocks)


def empty_pool(routing: str, count: int, heads: int, size: int, like: Tensor) -> Tensor:
    """What a segment's descriptor is made of before its first token: sums of keys [N, H, blocks, R], or of their products [N, H, R, R]."""
    rows = size if routing == "energy" else blocks_of(routing)
    return like.new_zeros(count, heads, rows, size)


def describe(routing: str, pool: Tensor, segment_length: int) -> Tensor:
    """Descriptor of a whole segment from its pool [..., rows, R]: [..., R] for mean, else of the pool's shape."""
    if routing == "energy":
        return pool
    blocks = pool.shape[-2]
    size = block_size(segment_length, blocks)
    place = torch.arange(blocks, device=pool.device)
    means = pool / (segment_length - size * place).clamp(1, size)[:, None]
    last = (segment_length - 1) // size
    if last < blocks - 1:  # a segment shorter than its blocks leaves some empty: they repeat the last one, which changes no maximum
        means = means.index_select(-2, place.clamp(max=last))
    return means if routing == "submax" else means.squeeze(-2)


def online_scores(routing: str, u: Tensor, k: Tensor, pool: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """(score of the open segment for every token [n, T, H], pools at the end of every piece [n, P, H, rows, R]).

    Args:
        u, k: connectors and routing keys, [n, T, H, R].
        pool: of the open segment before the first token, [n, H, rows, R].
    """
    fresh = torch.zeros_like(pool)[:, None].expand(-1, len(pieces) - 1, *pool.shape[1:])
    carried = torch.cat((pool[:, None], fresh), 1)  # [n, P, H, rows, R]
    if routing == "energy":
        u, k = pieces.split(u), pieces.split(k)
        flat = [x.flatten(0, 1) for x in (u, k, carried)]
        read, pools = linear_attention(
            flat[0], flat[1], flat[1], initial_state=flat[2], output_final_state=True, implementation="chunked"
        )
        score = (read * flat[0]).sum(-1).unflatten(0, u.shape[:2])
        return pieces.join(score), pools.unflatten(0, u.shape[:2])
    blocks = blocks_of(routing)
    if pieces.length == 1:
        return _one_score(u, k, pool, pieces.first, block_size(pieces.segments[0], blocks))
    u, k = pieces.align(u), pieces.align(k)  # [n, P, places, H, R]
    scores, pools = [], []
    # Segments of one size have their sub-blocks in the same places.
    for size in dict.fromkeys(pieces.segments):
        which = [j for j, segment in enumerate(pieces.segments) if segment == size]
        part = slice(None) if len(which) == len(pieces) else which
        score, pooled = _block_scores(u[:, part], k[:, part], carried[:, part], block_size(size, blocks))
        scores.append((which, score))
        pools.append((which, pooled))
    score, pooled = (_in_order(parts) for parts in (scores, pools))
    return pieces.unalign(score), pooled


def _one_score(u: Tensor, k: Tensor, pool: Tensor, place: int, size: int) -> tuple[Tensor, Tensor]:
    """As `_block_scores`, of the one token at `place`, with nothing but products of what is there."""
    block = place // size
    pool = torch.cat((pool[:, :, :block], pool[:, :, block : block + 1] + k[:, 0, :, None], pool[:, :, block + 1 :]), 2)
    counts = pool.new_tensor([size] * block + [place % size + 1])
    scores = (pool[:, :, : block + 1] @ u[:, 0, :, :, None])[..., 0] / counts
    return scores.amax(-1)[:, None], pool[:, None]


def _in_order(parts: list[tuple[list[int], Tensor]]) -> Tensor:
    if len(parts) == 1:
        return parts[0][1]
    order = [j for which, _ in parts for j in which]
    return torch.cat([x for _, x in parts], 1)[:, sorted(range(len(order)), key=order.__getitem__)]


def _block_scores(u: Tensor, k: Tensor, carried: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Largest score of the means of sub-blocks of `size` tokens so far [n, P, places, H], and their sums [n, P, H, blocks, R]."""
    places, blocks = u.shape[2], carried.shape[3]
    padded = F.pad(k, (0, 0, 0, 0, 0, max(0, blocks * size - places)))[:, :, : blocks * size]
    by_block = padded.unflatten(2, (blocks, size))  # [n, P, blocks, size, H, R]
    sums = carried.transpose(2, 3)[:, :, :, None] + by_block.cumsum(3)
    pooled = sums[:, :, :, -1].transpose(2, 3)
    sums = F.pad(sums.flatten(2, 3), (0, 0, 0, 0, 0, max(0, places - blocks * size)))[:, :, :places]
    place = torch.arange(places, device=u.device)
    score = (u * sums).sum(-1) / (place % size + 1)[:, None].to(u.dtype)
    if blocks > 1:
        whole = torch.einsum("nplhr,nphbr->nplhb", u, pooled / size)
        earlier = torch.arange(blocks, device=u.device) < (place // size)[:, None]
        whole = whole.masked_fill(~earlier[:, None], -torch.inf).amax(-1)
        score = torch.maximum(score, whole)
    return score, pooled


def cached_scores(routing: str, u: Tensor, descriptors: Tensor, readers: list[int]) -> Tensor:
    """Scores of cached memories, [n, T, H, S] for connectors u [n, T, H, R]; -inf where a token may not read one.

    Args:
        descriptors: [n, S, H, ...].
        readers: for each of them the first token that may read it.
    """
    length = u.shape[1]
    if routing == "energy":
        rows = u.transpose(1, 2)
        score = _Energies.apply(rows, descriptors, tuple(readers)).transpose(1, 2)
    elif routing == "submax":
        score = torch.einsum("nthr,nshbr->nthsb", u, descriptors).amax(-1)
    else:
        score = torch.einsum("nthr,nshr->nths", u, descriptors)
    first = torch.tensor(readers, device=u.device)
    unread = torch.arange(length, device=u.device)[:, None] < first
    return score.masked_fill(unread[:, None], -torch.inf)


class _Energies(torch.autograd.Function):
    """u^T C_i u for rows u [n, H, T, R] and matrices C [n, S, H, R, R], [n, H, T, S]: one matrix at a time, recomputed in the backward."""

    @staticmethod
    def forward(ctx, u: Tensor, matrices: Tensor, readers: tuple[int, ...]) -> Tensor:
        score = u.new_zeros(*u.shape[:3], len(readers))
        for i, start in enumerate(readers):
            rows = u[:, :, start:]
            score[:, :, start:, i] = ((rows @ matrices[:, i]) * rows).sum(-1)
        ctx.save_for_backward(u, matrices)
        ctx.readers = readers
        return score

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        u, matrices = ctx.saved_tensors
        du, dmatrices = torch.zeros_like(u), torch.zeros_like(matrices)
        for i, start in enumerate(ctx.readers):
            rows = u[:, :, start:]
            scaled = grad[:, :, start:, i, None] * rows
            dmatrices[:, i] = scaled.mT @ rows
            du[:, :, start:] += scaled @ (matrices[:, i] + matrices[:, i].mT)
        return du, dmatrices, None
