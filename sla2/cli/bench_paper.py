"""What the paper measured, to be set beside rows of this library; nothing here was measured by us.

Source: "SLA2: Sparse-Linear Attention with Learnable Routing and QAT", arXiv 2602.12675v1. The
kernel rates count the operations of full attention, 4 B H N^2 D, over the time.
"""

from __future__ import annotations

from typing import NamedTuple

TITLE = "arXiv 2602.12675v1"
GPU = "NVIDIA GeForce RTX 5090"


class Kernel(NamedTuple):
    """kept: share of key blocks, 1 less the sparsity of the paper; tops: dense-equivalent TOPS."""

    method: str
    kept: float
    tops: float


BASELINE = Kernel("FlashAttention-2", 1.0, 219.0)
SLA2 = (Kernel("SLA2", 0.05, 3610.0), Kernel("SLA2", 0.03, 4079.0))
KERNELS = (
    BASELINE,
    Kernel("VMoBA", 0.10, 288.0),
    Kernel("VMoBA", 0.05, 348.0),
    Kernel("VSA", 0.10, 1002.0),
    Kernel("VSA", 0.05, 1553.0),
    Kernel("SLA", 0.10, 1866.0),
    Kernel("SLA", 0.05, 2996.0),
    *SLA2,
)


class EndToEnd(NamedTuple):
    """Seconds of one generated video; other: all that is not attention, the same in both."""

    title: str
    other_s: float
    dense_s: float
    sla2_s: float

    @property
    def speedup(self) -> float:
        return (self.other_s + self.dense_s) / (self.other_s + self.sla2_s)


# "model" of a row of bench/bench_wan.py -> generation with FlashAttention-2 and with SLA2.
END_TO_END = {
    "1.3b": EndToEnd("Wan2.1 1.3B, 480p", 62.0, 97.0, 7.0),
    "14b": EndToEnd("Wan2.1 14B, 720p", 493.0, 2550.0, 207.0),
}


class Peak(NamedTuple):
    """A GPU as NVIDIA's data sheet has it: tensor cores, dense, at the nominal clock."""

    tflops16: float  # bf16, float32 accumulation
    tops8: float  # int8
    tb_per_s: float  # memory


PEAKS = {GPU: Peak(209.5, 838.0, 1.79), "NVIDIA H200": Peak(989.0, 1979.0, 4.8)}
OTHER_GPUS = tuple(name for name in PEAKS if name != GPU)
