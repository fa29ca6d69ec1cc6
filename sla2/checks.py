"""Argument checks of the public functions: every rule once, every message with what is allowed.

Only types, shapes, strides, dtypes, devices and whether there is a tangent are looked at, never a
tensor's values: the checks neither wait for the GPU nor break a `torch.compile` graph. Values (the
range of `pinned_kv`, the entries of a block list) are checked where that is free, on the CPU, and
ignored safely by the kernels otherwise; `BlockMap.validate()` reports them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .constants import BLOCK_K, BLOCK_Q, HEAD_DIMS, MAX_SEQLEN, QUANT_MODES

LAYOUTS = ("BNHD", "BHND")
MODES = ("hard", "soft")
ROUTER_SCORES = ("scaled", "raw", "softmax")
PHI_INPUTS = ("smoothed", "raw")

Grid = tuple[int, int, int]
"""Frames, rows and columns of tokens, in whose raster order a sequence has them."""

_CPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_CUDA_DTYPES = (torch.bfloat16, torch.float16)
# "meta" computes shapes alone; it follows the CPU's rules.
_DEVICE_TYPES = ("cpu", "cuda", "meta")
_INT_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


class Shape(NamedTuple):
    """The sizes every operation shares."""

    batch: int
    seqlen: int
    num_heads: int
    head_dim: int

    @property
    def num_q_blocks(self) -> int:
        """T_m."""
        return num_q_blocks(self.seqlen)

    @property
    def num_k_blocks(self) -> int:
        """T_n."""
        return num_k_blocks(self.seqlen)


def num_q_blocks(seqlen: int) -> int:
    """T_m = ceil(N / BLOCK_Q)."""
    return (seqlen + BLOCK_Q - 1) // BLOCK_Q


def num_k_blocks(seqlen: int) -> int:
    """T_n = ceil(N / BLOCK_K)."""
    return (seqlen + BLOCK_K - 1) // BLOCK_K


def num_tokens(grid: Grid) -> int:
    """N."""
    return math.prod(grid)


def check_grid(grid: Sequence[int]) -> Grid:
    """The grid as a tuple. Raises TypeError / ValueError unless it is three positive integers."""
    sizes = tuple(grid) if isinstance(grid, Sequence) and not isinstance(grid, str) else ()
    if len(sizes) != 3 or any(isinstance(x, bool) or not isinstance(x, int) for x in sizes):
        raise TypeError(f"grid must be three ints, (frames, rows, columns) of tokens; got {grid!r}")
    if min(sizes) < 1:
        raise ValueError(f"grid={sizes} must be positive in every dimension")
    return sizes[0], sizes[1], sizes[2]


def check_grid_of(grid: Sequence[int] | None, seq_len: int) -> Grid | None:
    """`check_grid` of a grid or None, unknown; raises ValueError too for other than N tokens."""
    if grid is None:
        return None
    checked = check_grid(grid)
    if num_tokens(checked) != seq_len:
        raise ValueError(f"grid={checked} has {num_tokens(checked)} tokens; seq_len is {seq_len}")
    return checked


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def check_flag(name: str, value: bool) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def check_tensor(name: str, value: Tensor) -> None:
    """Raises TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")


def has_tangent(x: Tensor) -> bool:
    """Whether `x` has a tangent of forward mode, or may have one as a graph's input.

    A traced tensor does not tell; a graph is traced anew where a dual level begins.
    """
    if forward_ad._current_level < 0:  # nobody is in forward mode
        return False
    return torch.compiler.is_compiling() or forward_ad.unpack_dual(x).tangent is not None


def _check_no_tangent(name: str, x: Tensor) -> None:
    # The operators would return a tangent of zero.
    if has_tangent(x):
        raise RuntimeError(
            "forward-mode derivatives of SLA2 attention are not implemented (torch.func.jvp, "
            f"torch.autograd.forward_ad): {name} has a tangent, or is traced by torch.compile in a "
            "dual level, where it may have one. Where no derivative is wanted, pass "
            f"{name}.detach(), and run compiled code outside of the level"
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor | None, layout: str) -> Shape:
    """Checks q, k and (unless None) v against each other and the device; returns their sizes.

    Raises TypeError for a wrong type or dtype, ValueError for shapes, strides, devices and sizes,
    RuntimeError for a tangent.
    """
    check_choice("layout", layout, LAYOUTS)
    tensors = (("q", q), ("k", k)) if v is None else (("q", q), ("k", k), ("v", v))
    for name, x in tensors:
        check_tensor(name, x)
        _check_no_tangent(name, x)
    dims = ", ".join(layout)
    if q.dim() != 4:
        raise ValueError(f"q must be ({dims}) for layout={layout!r}; got shape {tuple(q.shape)}")
    for name, x in tensors[1:]:
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype; got q {q.dtype} and {name} {x.dtype}")
        if x.device != q.device:
            raise ValueError(
                f"q, k and v must be on one device; got q on {q.device} and {name} on {x.device}"
            )
        if x.shape != q.shape:
            raise ValueError(
                f"q, k and v must have one shape ({dims}); got q {tuple(q.shape)} and "
                f"{name} {tuple(x.shape)}. SLA2 is self-attention with as many key as query heads: "
                "use dense attention for cross-attention, and repeat the heads of k and v for "
                "grouped-query attention"
            )
    if layout == "BNHD":
        shape = Shape(*q.shape)
    else:
        shape = Shape(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    _check_dtype_and_head_dim(q, shape)
    if shape.seqlen > MAX_SEQLEN:
        raise ValueError(f"N={shape.seqlen} tokens; at most {MAX_SEQLEN} are supported")
    if shape.head_dim > 1:
        for name, x in tensors:
            if x.stride(3) != 1:
                raise ValueError(
                    f"the last dimension of {name} must have stride 1; got strides {x.stride()}. "
                    f"Call {name}.contiguous()"
                )
    return shape


def _check_dtype_and_head_dim(q: Tensor, shape: Shape) -> None:
    device_type = q.device.type
    if device_type not in _DEVICE_TYPES:
        raise ValueError(
            f"q is on {q.device}; SLA2 runs on NVIDIA GPUs ('cuda') and on the CPU ('cpu'). "
            "sla2.why_not() tells what this installation can use"
        )
    if shape.head_dim < 1:
        raise ValueError(f"head_dim must be at least 1; got q with shape {tuple(q.shape)}")
    if device_type == "cuda":
        if q.dtype not in _CUDA_DTYPES:
            raise TypeError(
                f"q, k and v are {q.dtype} on {q.device}; the kernels take torch.bfloat16 or "
                "torch.float16. Cast them, or run under "
                "torch.autocast('cuda', dtype=torch.bfloat16)"
            )
        if shape.head_dim not in HEAD_DIMS:
            raise ValueError(
                f"head_dim={shape.head_dim} on {q.device}; the kernels are built for "
                f"{' and '.join(map(str, HEAD_DIMS))}. Padding would change the feature map of the "
                "linear branch (a softmax over head_dim): use dense attention for this layer"
            )
    elif q.dtype not in _CPU_DTYPES:
        raise TypeError(
            f"q, k and v are {q.dtype}; on the CPU torch.bfloat16, torch.float16, torch.float32 "
            "and torch.float64 are supported"
        )


def _check_float32(name: str, x: Tensor, q: Tensor) -> None:
    # float64 next to float64 q, k, v is for checks of the mathematics on the CPU.
    check_tensor(name, x)
    _check_no_tangent(name, x)
    if x.dtype != torch.float32 and not (x.dtype == q.dtype == torch.float64):
        raise TypeError(
            f"{name} must be torch.float32 whatever the dtype of q; got {x.dtype}. In 16 bit the "
            "router chooses other blocks: keep it out of .to(dtype) (SLA2Attention does) and, "
            "under FSDP2, wrap it on its own with MixedPrecisionPolicy()"
        )
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}; got {x.device}")


def check_router(proj_q: Tensor, proj_k: Tensor, q: Tensor, shape: Shape) -> None:
    """Raises TypeError / ValueError unless both projections are (D, D) or (H, D, D) float32, and
    RuntimeError for a tangent."""
    for name, x in (("proj_q", proj_q), ("proj_k", proj_k)):
        _check_float32(name, x, q)
        d, h = shape.head_dim, shape.num_heads
        ok = x.shape == ((h, d, d) if x.dim() == 3 else (d, d))
        if not ok:
            raise ValueError(
                f"{name} must have shape (D, D) = ({d}, {d}) or (H, D, D) = ({h}, {d}, {d}); "
                f"got {tuple(x.shape)}"
            )
    if proj_q.shape != proj_k.shape:
        raise ValueError(
            "proj_q and proj_k must both be (D, D) or both (H, D, D); got "
            f"{tuple(proj_q.shape)} and {tuple(proj_k.shape)}"
        )


def check_router_frozen(proj_q: Tensor, proj_k: Tensor) -> None:
    """Raises RuntimeError where a gradient of the hard map would be expected: there is none."""
    if not torch.is_grad_enabled():
        return
    for name, x in (("proj_q", proj_q), ("proj_k", proj_k)):
        if x.requires_grad:
            raise RuntimeError(
                f"{name} requires grad, but mode='hard' has no gradient to the router (top-k is a "
                f"step): train it with mode='soft', or pass {name}.detach()"
            )


def check_alpha(alpha_logit: Tensor, q: Tensor, shape: Shape) -> None:
    """Raises TypeError / ValueError unless alpha_logit is (T_m,), (H, T_m) or (H, N) float32, and
    RuntimeError for a tangent."""
    _check_float32("alpha_logit", alpha_logit, q)
    heads, t_m = shape.num_heads, shape.num_q_blocks
    given = alpha_logit.shape
    if alpha_logit.dim() == 1:
        ok = given[0] == t_m
    elif alpha_logit.dim() == 2:
        ok = given[0] == heads and (given[1] == t_m or given[1] == shape.seqlen)
    else:
        ok = False
    if not ok:
        raise ValueError(
            f"alpha_logit has shape {tuple(given)}, but q has N={shape.seqlen} tokens and "
            f"H={heads} heads: allowed are (T_m,) = ({t_m},), (H, T_m) = ({heads}, {t_m}) and "
            f"(H, N) = ({heads}, {shape.seqlen}), where T_m = ceil(N / {BLOCK_Q}) counts query "
            "blocks. Alpha belongs to one token grid: (1) bring the input to the grid alpha was "
            "trained on, (2) calibrate a new alpha for this grid (SLA2Attention.calibrate_alpha), "
            "or (3) interpolate the logits along the query blocks"
        )


def check_pinned(pinned_kv: Tensor | None, q: Tensor, num_kv_blocks: int) -> None:
    """Raises TypeError / ValueError unless pinned_kv is None or (P,) integer, P <= K."""
    if pinned_kv is None:
        return
    check_tensor("pinned_kv", pinned_kv)
    if pinned_kv.dtype not in _INT_DTYPES:
        raise TypeError(f"pinned_kv must hold integer indices of key blocks; got {pinned_kv.dtype}")
    if pinned_kv.dim() != 1:
        raise ValueError(f"pinned_kv must have shape (P,); got {tuple(pinned_kv.shape)}")
    if pinned_kv.device != q.device:
        raise ValueError(
            f"pinned_kv must be on the device of q, {q.device}; got {pinned_kv.device}"
        )
    if pinned_kv.shape[0] > num_kv_blocks:
        raise ValueError(
            f"pinned_kv has {pinned_kv.shape[0]} key blocks, but only {num_kv_blocks} are kept per "
            "query block (pinned blocks count toward topk): raise topk or num_kv_blocks"
        )


def check_pinned_range(pinned_kv: Tensor | None, seqlen: int) -> None:
    """On the CPU, where looking at values is cheap; the kernels ignore entries out of range."""
    if pinned_kv is None or pinned_kv.device.type != "cpu" or pinned_kv.numel() == 0:
        return
    t_n = num_k_blocks(seqlen)
    low, high = int(pinned_kv.min()), int(pinned_kv.max())
    if low < 0 or high >= t_n:
        raise ValueError(
            f"pinned_kv holds key blocks from {low} to {high}; allowed are 0..{t_n - 1} "
            f"(T_n={t_n} key blocks for N={seqlen})"
        )


def resolve_num_kv_blocks(topk: float, num_kv_blocks: int | None, shape: Shape) -> int:
    """K, the key blocks kept per query block: num_kv_blocks, or max(1, int(topk * T_n)).

    With zero tokens there is no block to keep: 0. Raises TypeError for an integer topk (1 would
    mean one block or all of them) and ValueError for values out of range."""
    t_n = shape.num_k_blocks
    if num_kv_blocks is not None:
        if isinstance(num_kv_blocks, bool) or not isinstance(num_kv_blocks, (int, torch.SymInt)):
            raise TypeError(
                f"num_kv_blocks must be an int, the number of key blocks kept; got "
                f"{num_kv_blocks!r}. For a fraction use topk"
            )
        if shape.seqlen == 0:
            return 0
        if num_kv_blocks < 1 or num_kv_blocks > t_n:
            raise ValueError(
                f"num_kv_blocks={num_kv_blocks} is out of range: N={shape.seqlen} tokens have "
                f"T_n={t_n} key blocks of {BLOCK_K}, allowed are 1..{t_n}. For a fraction use topk"
            )
        return num_kv_blocks
    if not isinstance(topk, float):
        raise TypeError(
            f"topk must be a float, the fraction of key blocks kept, in (0, 1]; got {topk!r} of "
            f"type {type(topk).__name__} (is 1 one block or all of them?). For an exact count of "
            f"the T_n={t_n} key blocks use num_kv_blocks"
        )
    if not 0.0 < topk <= 1.0:
        raise ValueError(
            f"topk={topk} is out of range: it is the fraction of the T_n={t_n} key blocks kept, in "
            "(0, 1]. For an exact count use num_kv_blocks"
        )
    if shape.seqlen == 0:
        return 0
    count = torch.sym_int(topk * t_n)
    # Under torch.compile max() is symbolic by itself, and torch 2.11 cannot trace sym_max of ints.
    return torch.sym_max(1, count) if isinstance(count, torch.SymInt) else max(1, count)


def check_scale(scale: float | None, shape: Shape) -> float:
    """The softmax scale: `scale`, by default 1 / sqrt(D). Raises TypeError / ValueError."""
    if scale is None:
        return 1.0 / math.sqrt(shape.head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float or None; got {type(scale).__name__}")
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale={scale} is out of range: it must be positive and finite")
    return float(scale)


def check_quant(quant: str) -> None:
    """Raises ValueError for an unknown precision."""
    check_choice("quant", quant, QUANT_MODES)


def check_tau(tau: float) -> float:
    """The temperature of SoftTop-k as a float. Raises TypeError / ValueError."""
    if isinstance(tau, bool) or not isinstance(tau, (int, float)):
        raise TypeError(f"tau must be a float; got {type(tau).__name__}")
    if not 0.0 < tau < math.inf:
        raise ValueError(f"tau={tau} is out of range: the temperature must be positive and finite")
    return float(tau)


def check_block_map_fits(
    lists: Sequence[int], seqlen: int, device: Any, q: Tensor, shape: Shape
) -> None:
    """Raises ValueError unless a map with lists of shape (B, H, T_m, K) belongs to q."""
    wanted = (shape.batch, shape.num_heads, shape.num_q_blocks)
    if seqlen != shape.seqlen or tuple(lists[:3]) != wanted:
        raise ValueError(
            f"block_map was made for seqlen={seqlen} and (B, H, T_m) = {tuple(lists[:3])}; q has "
            f"N={shape.seqlen} and (B, H, T_m) = {wanted}"
        )
    if device != q.device:
        raise ValueError(
            f"block_map is on {device}, q on {q.device}: use block_map.to({str(q.device)!r})"
        )


def check_lists(lut: Tensor, counts: Tensor, seqlen: int) -> None:
    """Shapes, dtypes and devices of a BlockMap's two tensors. Raises TypeError / ValueError."""
    for name, x, dtype in (("lut", lut, torch.uint16), ("counts", counts, torch.int32)):
        check_tensor(name, x)
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}; got {x.dtype}")
    if isinstance(seqlen, bool) or not isinstance(seqlen, (int, torch.SymInt)):
        raise TypeError(f"seqlen must be an int; got {type(seqlen).__name__}")
    if seqlen < 0 or seqlen > MAX_SEQLEN:
        raise ValueError(f"seqlen={seqlen} is out of range: allowed are 0..{MAX_SEQLEN}")
    t_m = num_q_blocks(seqlen)
    if lut.dim() != 4 or lut.shape[2] != t_m:
        raise ValueError(
            f"lut must have shape (B, H, T_m, K) with T_m={t_m} query blocks for seqlen={seqlen}; "
            f"got {tuple(lut.shape)}"
        )
    t_n = num_k_blocks(seqlen)
    if seqlen > 0 and not 1 <= lut.shape[3] <= t_n:
        raise ValueError(
            f"lut must have K = 1..{t_n} columns (T_n={t_n} key blocks; a query block that lists "
            f"none has counts 0); got shape {tuple(lut.shape)}"
        )
    if counts.shape != lut.shape[:3]:
        raise ValueError(
            f"counts must have shape (B, H, T_m) = {tuple(lut.shape[:3])}; "
            f"got {tuple(counts.shape)}"
        )
    if counts.device != lut.device:
        raise ValueError(
            f"lut and counts must be on one device; got {lut.device} and {counts.device}"
        )


def check_layer_options(
    options: Mapping[str, Any] | None,
    parameters: Iterable[str],
    own: Collection[str],
    function: str,
) -> dict[str, Any]:
    """Further arguments of a layer with these parameters, but those that `function` sets itself.

    Names alone; the values are checked by the layer. Raises TypeError.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(
            f"layer_options must be a mapping such as {{'per_head_router': True}}; got {options!r}"
        )
    allowed = [name for name in parameters if name not in own]
    for name in options:
        if name not in allowed:
            what = f"which {function} sets itself" if name in own else "which is no option"
            raise TypeError(f"layer_options has {name!r}, {what}: allowed are {', '.join(allowed)}")
    return dict(options)
