"""Shapes, dtypes and options of the sweeps, and the inputs of a case; for CPU and GPU tests.

`sweep` walks through the lengths and gives each of them combinations of the other factors, chosen
so that every pair of values occurs; the full product would be 100,000 cases.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sla2.constants import BLOCK_K, BLOCK_Q

# Around the block sizes 64 and 128, and the lengths of real video grids.
SMALL_SEQLENS = (1, 2, 17, 63, 64, 65, 120, 127, 128, 129, 191, 192, 193)
LARGE_SEQLENS = (1560, 14040, 32760, 75600, 111600)
SEQLENS = SMALL_SEQLENS + LARGE_SEQLENS
BATCHES = (1, 2, 3)
HEADS = (1, 2, 5, 12, 40)
HEAD_DIMS = (64, 128)
# Key blocks kept; "-1": all but one, the shortest complement; "all": the empty complement.
KV_BLOCKS = ("1", "2", "-1", "all")
LAYOUTS = ("BNHD", "BHND")
QUANTS = ("none", "int8_fp16", "int8_fp8")
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
CPU_DTYPES = (*KERNEL_DTYPES, torch.float32, torch.float64)
# Projections and alpha: shared by the heads, per head, per token.
PROJ_SHAPES = ("shared", "head")
ALPHA_SHAPES = ("head", "shared", "token")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Case:
    batch: int
    seqlen: int
    num_heads: int
    head_dim: int
    kv_blocks: str = "2"
    dtype: torch.dtype = torch.float32
    layout: str = "BNHD"
    quant: str = "none"
    proj: str = "shared"
    alpha: str = "head"

    @property
    def num_q_blocks(self) -> int:
        """T_m."""
        return ceil_div(self.seqlen, BLOCK_Q)

    @property
    def num_k_blocks(self) -> int:
        """T_n."""
        return ceil_div(self.seqlen, BLOCK_K)

    @property
    def num_kv_blocks(self) -> int:
        """K, brought into 1..T_n."""
        t_n = self.num_k_blocks
        wanted = {"1": 1, "2": 2, "-1": t_n - 1, "all": t_n}[self.kv_blocks]
        return max(1, min(wanted, t_n))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, n, h, d = self.batch, self.seqlen, self.num_heads, self.head_dim
        return (b, n, h, d) if self.layout == "BNHD" else (b, h, n, d)

    @property
    def alpha_shape(self) -> tuple[int, ...]:
        t_m, h = self.num_q_blocks, self.num_heads
        return {"shared": (t_m,), "head": (h, t_m), "token": (h, self.seqlen)}[self.alpha]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"B{self.batch}-N{self.seqlen}-H{self.num_heads}-D{self.head_dim}-K{self.kv_blocks}-"
            f"{dtype}-{self.layout}-{self.quant}-W_{self.proj}-alpha_{self.alpha}"
        )


@dataclass
class Inputs:
    """q, k, v in the case's layout and dtype, and the keyword arguments of `sla2_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    proj_q: Tensor
    proj_k: Tensor
    alpha_logit: Tensor
    options: dict[str, Any]

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def kwargs(self) -> dict[str, Any]:
        learned = {"proj_q": self.proj_q, "proj_k": self.proj_k, "alpha_logit": self.alpha_logit}
        return {**learned, **self.options}


def make_inputs(case: Case, device: torch.device | str = "cpu", *, seed: int = 0) -> Inputs:
    """Unit-variance q, k, v; k has a mean, so that smoothing matters. The same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = (randn(*case.shape) for _ in range(3))
    k = k + randn(case.head_dim)
    d = case.head_dim
    lead = (case.num_heads,) if case.proj == "head" else ()
    proj_q, proj_k = (torch.eye(d) + randn(*lead, d, d) * 0.3 / d**0.5 for _ in range(2))
    tensors = [x.to(device, case.dtype) for x in (q, k, v)]
    learned = [x.to(device) for x in (proj_q, proj_k, randn(*case.alpha_shape))]
    options = {
        "num_kv_blocks": case.num_kv_blocks,
        "layout": case.layout,
        "quant": case.quant,
    }
    return Inputs(*tensors, *learned, options)


def sweep(
    seqlens: Sequence[int] = SEQLENS,
    *,
    dtypes: Sequence[torch.dtype] = KERNEL_DTYPES,
    quants: Sequence[str] = QUANTS,
    heads: Sequence[int] = HEADS,
    max_rows: int | None = None,
    rounds: int = 1,
) -> list[Case]:
    """At least `rounds` cases for each length, until every pair of values of two factors occurred.

    Factors are the fields of `Case` after the sizes, and head_dim. The choice is deterministic: of
    some random combinations, the one with most new pairs. max_rows: fewer heads, then a smaller
    batch, where B * H * N would be larger.
    """
    factors: dict[str, Sequence[Any]] = {
        "head_dim": HEAD_DIMS,
        "kv_blocks": KV_BLOCKS,
        "dtype": dtypes,
        "layout": LAYOUTS,
        "quant": quants,
        "proj": PROJ_SHAPES,
        "alpha": ALPHA_SHAPES,
    }

    def pairs(choice: dict[str, Any]) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(choice.items(), 2))

    rng = random.Random(0)
    missing = set().union(
        *(
            pairs({a: x, b: y})
            for a, b in itertools.combinations(factors, 2)
            for x, y in itertools.product(factors[a], factors[b])
        )
    )
    batches, all_heads = itertools.cycle(BATCHES), itertools.cycle(heads)
    cases: list[Case] = []
    while missing or len(cases) < rounds * len(seqlens):
        seqlen = seqlens[len(cases) % len(seqlens)]
        tried = [{name: rng.choice(values) for name, values in factors.items()} for _ in range(40)]
        best = max(tried, key=lambda choice: len(pairs(choice) & missing))
        missing -= pairs(best)
        batch, num_heads = next(batches), next(all_heads)
        if max_rows is not None:
            num_heads = max(1, min(num_heads, max_rows // seqlen))
            batch = max(1, min(batch, max_rows // (seqlen * num_heads)))
        cases.append(Case(batch, seqlen, num_heads, **best))
    return cases
