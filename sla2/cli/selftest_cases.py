"""The cases of `sla2 selftest`: one row per combination, and the inputs of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sla2.constants import BLOCK_K, BLOCK_Q


@dataclass(frozen=True)
class Case:
    """One row of the table. Everything not named in it keeps the default below."""

    seqlen: int
    dtype: str = "bfloat16"
    quant: str = "none"
    head_dim: int = 128
    batch: int = 1
    heads: int = 2
    num_kv_blocks: int = (
        0  # 0: a fifth of the key blocks; negative: counted from all of them, -1 is T_n
    )
    layout: str = "BNHD"
    alpha: str = "per block"  # or "shared", "per token"
    per_head_router: bool = False
    pinned_kv: tuple[int, ...] = ()
    smooth_k: bool = True
    phi_input: str = "smoothed"
    strides: str = "contiguous"  # or "fused": q, k, v are views of one projection's output
    gradient: bool = False

    @property
    def total_kv_blocks(self) -> int:
        """T_n."""
        return -(-self.seqlen // BLOCK_K)

    @property
    def kept(self) -> int:
        """K."""
        total = self.total_kv_blocks
        if self.num_kv_blocks == 0:
            return max(1, total // 5)
        return self.num_kv_blocks if self.num_kv_blocks > 0 else total + 1 + self.num_kv_blocks

    @property
    def name(self) -> str:
        """Every property that differs from the default, after shape, dtype and quant mode."""
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[self.dtype]
        parts = [
            f"B{self.batch} H{self.heads} N{self.seqlen} D{self.head_dim}",
            short,
            self.quant,
            f"K {self.kept}/{self.total_kv_blocks}",
        ]
        if self.layout != "BNHD":
            parts.append(self.layout)
        if self.alpha != "per block":
            parts.append(f"alpha {self.alpha}")
        if self.per_head_router:
            parts.append("router per head")
        if self.pinned_kv:
            parts.append(f"pinned {','.join(map(str, self.pinned_kv))}")
        if not self.smooth_k:
            parts.append("unsmoothed")
        if self.phi_input != "smoothed":
            parts.append("phi raw")
        if self.strides != "contiguous":
            parts.append(f"{self.strides} strides")
        if self.gradient:
            parts.append("gradient")
        return " ".join(parts)


@dataclass
class Inputs:
    """Tensors of one case: q, k, v in the case's layout; the router and alpha in float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    proj_q: Tensor
    proj_k: Tensor
    alpha_logit: Tensor
    pinned_kv: Tensor | None

    def router(self, case: Case) -> dict[str, Any]:
        """Keyword arguments of `sla2.route`."""
        return {
            "proj_q": self.proj_q,
            "proj_k": self.proj_k,
            "num_kv_blocks": case.kept,
            "pinned_kv": self.pinned_kv,
            "smooth_k": case.smooth_k,
            "layout": case.layout,
        }


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Gaussian q, k, v; keys with a mean that smoothing has to remove; a router near identity."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    dtype = getattr(torch, case.dtype)
    batch, n, heads, dim = case.batch, case.seqlen, case.heads, case.head_dim
    shape = (batch, n, heads, dim) if case.layout == "BNHD" else (batch, heads, n, dim)
    if case.strides == "fused":
        fused = randn(batch, n, 3, heads, dim, dtype=dtype)
        q, k, v = fused.unbind(2)
        if case.layout == "BHND":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    else:
        q, k, v = (randn(*shape, dtype=dtype) for _ in range(3))
    k += randn(dim).to(dtype)
    router_shape = (heads, dim, dim) if case.per_head_router else (dim, dim)
    identity = torch.eye(dim, device=device)
    alpha_shape = {
        "per block": (heads, -(-n // BLOCK_Q)),
        "shared": (-(-n // BLOCK_Q),),
        "per token": (heads, n),
    }[case.alpha]
    pinned = None
    if case.pinned_kv:
        pinned = torch.tensor(case.pinned_kv, dtype=torch.int32, device=device)
    return Inputs(
        q=q,
        k=k,
        v=v,
        proj_q=identity + 0.3 * dim**-0.5 * randn(*router_shape),
        proj_k=identity + 0.3 * dim**-0.5 * randn(*router_shape),
        alpha_logit=1.0 + randn(*alpha_shape),
        pinned_kv=pinned,
    )


QUANTS = ("none", "int8_fp16", "int8_fp8")
SHORT_SEQLENS = (1, 2, 17, 63, 64, 65, 120, 127, 128, 129, 191, 192, 193)

OPTIONS = (
    Case(520, layout="BHND", alpha="shared"),
    Case(520, batch=2, heads=3, alpha="per token", dtype="float16"),
    Case(520, head_dim=64, per_head_router=True, quant="int8_fp16"),
    Case(520, pinned_kv=(0, 8), num_kv_blocks=3, quant="int8_fp8"),
    Case(520, smooth_k=False, head_dim=64),
    Case(520, phi_input="raw", quant="int8_fp8", layout="BHND"),
    Case(520, strides="fused", batch=2),
    Case(520, strides="fused", layout="BHND", dtype="float16", head_dim=64),
)

QUICK = (
    Case(1, heads=1),
    Case(65, dtype="float16", head_dim=64),
    *(Case(193, quant=quant, head_dim=64) for quant in QUANTS),
    *(Case(193, quant=quant, dtype="float16") for quant in QUANTS),
    *OPTIONS,
    *(Case(1560, quant=quant) for quant in QUANTS),
    Case(1560, num_kv_blocks=1, head_dim=64),
    Case(1560, num_kv_blocks=-1, head_dim=64, quant="int8_fp16"),
    Case(520, head_dim=64, gradient=True),
    Case(520, head_dim=64, gradient=True, quant="int8_fp16", alpha="per token"),
)

# The CPU takes float32 as well.
CPU_EXTRA = (
    Case(1, dtype="float32", heads=1, head_dim=64),
    Case(520, dtype="float32", strides="fused"),
    Case(520, dtype="float32", head_dim=64, gradient=True),
)

GPU_EXTRA = tuple(Case(14040, quant=quant) for quant in QUANTS)

FULL = (
    *QUICK,
    *(
        Case(seqlen, dtype=dtype, quant=quant, head_dim=head_dim)
        for seqlen in SHORT_SEQLENS
        for head_dim in (64, 128)
        for dtype in ("bfloat16", "float16")
        for quant in QUANTS
    ),
    *(
        Case(1560, quant=quant, num_kv_blocks=kept, dtype=dtype, batch=3, heads=5)
        for kept in (1, 2, -2, -1)
        for dtype in ("bfloat16", "float16")
        for quant in QUANTS
    ),
    *(
        # Not 193: a list that holds only a one-token block has P = 1, its true dS is 0, and what is
        # left is the 16-bit (8-bit) rounding of O_s alone.
        Case(520, quant=quant, dtype=dtype, alpha=alpha, gradient=True, num_kv_blocks=3)
        for quant in QUANTS
        for dtype in ("bfloat16", "float16")
        for alpha in ("per block", "shared")
    ),
    *(Case(14040, quant=quant, num_kv_blocks=6) for quant in QUANTS),
)

FULL_GPU = (
    *(
        Case(32760, quant=quant, dtype=dtype, heads=12, num_kv_blocks=15)
        for quant in QUANTS
        for dtype in ("bfloat16", "float16")
    ),
    Case(32760, quant="int8_fp8", heads=12, num_kv_blocks=51, head_dim=64),
    Case(32760, strides="fused", heads=12, num_kv_blocks=15),
    *(Case(75600, quant=quant, heads=40, num_kv_blocks=35) for quant in QUANTS),
    *(Case(111600, quant=quant, heads=2, num_kv_blocks=52) for quant in QUANTS),
)


def cases(amount: str, device: torch.device) -> list[Case]:
    """The rows of "quick" or "full" for this kind of device, each once."""
    gpu = device.type == "cuda"
    chosen = (*QUICK, *(GPU_EXTRA if gpu else CPU_EXTRA))
    if amount == "full":
        chosen = (*chosen, *FULL, *(FULL_GPU if gpu else ()))
    return list(dict.fromkeys(chosen))
