"""Configuration of recurrent models with a cache of memories; docs/fidelity.md says which part is the paper's and which is ours."""

from __future__ import annotations

from ..configuration import MemzooConfig

# Held here, not imported from the layers: a configuration must load without torch kernels.
MATRICES = ("linear", "swla", "delta", "gated_delta")
DEEP = ("dla", "titans")
VECTORS = ("lstm", "gru", "gated_linear")
AGGREGATIONS = ("none", "residual", "gated", "soup", "sparse", "average")
SCORED = ("gated", "soup", "sparse")
ROUTINGS = ("mean", "energy", "submax")


class MemoryCachingConfig(MemzooConfig):
    """A recurrent memory whose state at the end of every segment stays readable (arXiv 2602.24281). What the paper gives no value for is
    marked with *.

    Args (beside those of MemzooConfig):
        memory: "linear" (a matrix, additive writes), "swla" (each token and the one before it, with decay), "dla" (an MLP on -<M(k), v>),
            "titans" (an MLP on ||M(k) - v||^2 with momentum and decay), "lstm", "gru", "gated_linear" (vectors); "delta" and
            "gated_delta" are ours.
        aggregation: how cached memories are read: "residual", "gated", "soup", "sparse"; "average" needs no training (Sec. 4.3); "none"
            is the memory without a cache.
        segment_length: tokens of a segment.
        segmentation: "constant", or "log" for the binary expansion of the length, largest first (no generation with a cache).
        top_k: cached memories that a token reads with "sparse"*; None for 4 there.
        restart: segments start anew*, or from where the one before ended.
        routing: what a segment is scored by: "mean" of its keys (the paper's), "submax" (largest of eight sub-blocks' means*) or "energy"*.
        routing_dim: width of the descriptors*; None for head_dim. Smaller ones make low-rank descriptors of large heads.
        max_cached_segments: most memories a sequence keeps*, the lowest scored going first; None for no limit.
        offload_cached: keep cached memories in the host's memory between calls*, with "sparse" only.
        conv_width: taps of the convolutions after the q, k, v projections* (vectors: before the gates); 0 for none.
        output_gate: SiLU gate on what a matrix or an MLP reads, before the output projection*.
        memory_depth, memory_expansion, memory_residual, chunk_size, lr_max, lr_start, momentum_start, decay_start, max_grad_norm: of "dla"
            and "titans", as in TitansConfig.
    """

    model_type = "mc_rnn"

    memory: str = "linear"
    aggregation: str = "gated"
    segment_length: int = 256
    segmentation: str = "constant"
    top_k: int | None = None
    restart: bool = True
    routing: str = "mean"
    routing_dim: int | None = None
    max_cached_segments: int | None = None
    offload_cached: bool = False
    conv_width: int = 4
    output_gate: bool = True
    memory_depth: int = 2
    memory_expansion: int = 4
    memory_residual: bool | None = None
    chunk_size: int = 64
    lr_max: float = 1.0
    lr_start: float | None = None
    momentum_start: float = 0.5
    decay_start: float = 0.001
    max_grad_norm: float | None = 1.0

    def derive(self) -> None:
        super().derive()
        if self.top_k is None and self.aggregation == "sparse":
            self.top_k = 4
        if self.memory_residual is None:
            self.memory_residual = self.memory_depth > 1
        if self.segmentation == "log":
            self.use_cache = False

    def check(self) -> None:
        super().check()
        self._require_one_of("memory", (*MATRICES, *DEEP, *VECTORS))
        self._require_one_of("aggregation", AGGREGATIONS)
        self._require_one_of("segmentation", ("constant", "log"))
        self._require_one_of("routing", ROUTINGS)
        for name in ("segment_length", "memory_depth", "memory_expansion", "chunk_size"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        sparse, scored = self.aggregation == "sparse", self.aggregation in SCORED
        self._require(
            self.top_k is None if not sparse else 1 <= self.top_k <= 16, "top_k", "1 to 16 with aggregation sparse, else None"
        )
        self._require(
            scored or self.routing == "mean", "routing", f"mean with aggregation {self.aggregation}, which scores nothing"
        )
        self._require(scored or self.routing_dim is None, "routing_dim", f"None with aggregation {self.aggregation}")
        if self.routing_dim is not None:
            self._require_head_dim("routing_dim")
        limit = self.max_cached_segments
        self._require(
            limit is None or (limit >= 1 and scored and self.segmentation == "constant"),
            "max_cached_segments",
            "at least 1, with gates (gated, soup, sparse) and segments of one length; or None",
        )
        self._require(
            not self.offload_cached or sparse, "offload_cached", "False but with aggregation sparse, which reads a few memories"
        )
        self._require(
            self.segmentation == "constant" or not self.use_cache, "use_cache", "False with segmentation log, which knows no state"
        )
        self._require(
            self.aggregation != "none" or (self.segmentation == "constant" and self.restart),
            "aggregation",
            "a way to read cached memories where segmentation or restart is set",
        )
        self._require(
            self.aggregation != "none" or self.memory != "swla", "aggregation", "a cache with memory swla, whose kernel has one"
        )
        self._require(0 <= self.conv_width <= 16, "conv_width", "0 to 16")
        self._require(self.lr_max > 0, "lr_max", "a number above 0")
        for name in ("lr_start", "momentum_start", "decay_start"):
            start = getattr(self, name)
            self._require((start is None and name == "lr_start") or 0 < start < 1, name, "a number between 0 and 1")
        self._require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", "a number above 0, or None")
