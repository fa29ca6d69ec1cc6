"""An element-wise oracle of SLA2 attention: python loops over numpy float64, for tiny sizes.

Shares no code with the package: it is what `sla2.reference` is checked against. Arrays are
(B, H, N, D). Forward: one score, one weight at a time, no block states but those that int8_fp8
rounds. Backward: the formulas of
"SLA2: Sparse-Linear Attention with Learnable Routing and QAT" (arXiv 2602.12675), Alg. 3, with the
1/sqrt(D) and the `dV +=` that the printed listing lacks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
f32 = np.float32


@dataclass
class Options:
    """What `sla2.reference.sla2_attention` takes by keyword, with the same defaults."""

    num_kv_blocks: int
    scale: float | None = None
    quant: str = "none"
    mode: str = "hard"
    tau: float = 0.1
    router_score: str = "scaled"
    smooth_k: bool = True
    phi_input: str = "smoothed"
    pinned_kv: tuple[int, ...] = ()
    block_q: int = 8
    block_k: int = 4


@dataclass
class Result:
    out: Array  # (B, H, N, D)
    o_s: Array
    o_l: Array
    lse: Array  # (B, H, N)
    mask: Array  # (B, H, T_m, T_n), 0/1 or the soft mask


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def phi(row: Array) -> Array:
    e = np.exp(row - row.max())
    return e / e.sum()


# ---- router -----------------------------------------------------------------------------------


def scores(q: Array, k: Array, proj_q: Array, proj_k: Array, opt: Options) -> Array:
    """P_c of one head: q, k (N, D), k smoothed already -> (T_m, T_n)."""
    n, d = q.shape
    result = np.zeros((ceil_div(n, opt.block_q), ceil_div(n, opt.block_k)))
    for i in range(result.shape[0]):
        q_bar = q[i * opt.block_q : min(n, (i + 1) * opt.block_q)].mean(0)
        for j in range(result.shape[1]):
            k_bar = k[j * opt.block_k : min(n, (j + 1) * opt.block_k)].mean(0)
            result[i, j] = np.dot(proj_q.T @ q_bar, proj_k.T @ k_bar)
            if opt.router_score != "raw":
                result[i, j] /= math.sqrt(d)
        if opt.router_score == "softmax":
            result[i] = phi(result[i])
    return result


def hard_row(row: Array, count: int, pinned: tuple[int, ...]) -> Array:
    """One row of M: pinned blocks, then the best of the rest one after the other."""
    chosen = list(pinned)
    while len(chosen) < count:
        best = -1
        for j, value in enumerate(row):
            if j not in chosen and (best < 0 or value > row[best]):
                best = j
        chosen.append(best)
    return np.array([1.0 if j in chosen else 0.0 for j in range(len(row))])


def soft_row(row: Array, count: int, tau: float, pinned: tuple[int, ...]) -> Array:
    """One row of m: sigmoid(x + lambda), the free entries summing to count - len(pinned)."""
    free = [j for j in range(len(row)) if j not in pinned]
    target = count - len(pinned)
    m = np.ones(len(row))
    if target == len(free):
        return m
    if target == 0:
        m[free] = 0.0
        return m
    x = row / tau
    lo, hi = -np.abs(x).max() - 50.0, np.abs(x).max() + 50.0
    for _ in range(200):
        mid = 0.5 * (lo + hi)
        if sum(1.0 / (1.0 + math.exp(-(x[j] + mid))) for j in free) < target:
            lo = mid
        else:
            hi = mid
    for j in free:
        m[j] = 1.0 / (1.0 + math.exp(-(x[j] + lo)))
    return m


# ---- number formats ---------------------------------------------------------------------------


def _e4m3_values() -> Array:
    """Every non-negative finite e4m3 value, in code order, so that even code = even mantissa."""
    values = []
    for code in range(0x7F):  # 0x7F is NaN
        exponent, mantissa = code >> 3, code & 7
        if exponent == 0:
            values.append(mantissa / 8 * 2.0**-6)
        else:
            values.append((1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.array(values)


E4M3 = _e4m3_values()


def e4m3(x: float) -> float:
    """Nearest e4m3 value, ties to the even code, saturating."""
    distance = np.abs(E4M3 - abs(x))
    code = int(distance.argmin())
    if code + 1 < len(E4M3) and distance[code + 1] == distance[code] and code % 2 == 1:
        code += 1
    return math.copysign(E4M3[code], x)


def bf16(x: Array) -> Array:
    """float32 values with the eight bits of mantissa that bfloat16 has, ties to even."""
    bits = x.astype(f32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(f32)


def quantize_blocks(x: Array, block: int) -> tuple[Array, Array]:
    """int8 values and one float32 scale per token: x (N, D)."""
    n, d = x.shape
    values, scale = np.zeros((n, d)), np.zeros(n, f32)
    for start in range(0, n, block):
        rows = range(start, min(n, start + block))
        amax = f32(max(f32(1e-30), max(abs(f32(x[t, c])) for t in rows for c in range(d))))
        for t in rows:
            scale[t] = amax / f32(127)
            for c in range(d):
                value = float(f32(x[t, c]) * (f32(127) / amax))
                low = math.floor(value)
                nearest = low if value - low < 0.5 else low + 1
                if value - low == 0.5:
                    nearest = low if low % 2 == 0 else low + 1
                values[t, c] = min(127, max(-127, nearest))
    return values, scale


def quantize_v(v: Array, quant: str) -> tuple[Array, Array]:
    """V in its format, and the factor that undoes the channel's scale."""
    values, factor = np.zeros(v.shape), np.zeros(v.shape[1])
    for c in range(v.shape[1]):
        amax = max(f32(1e-30), *(abs(f32(x)) for x in v[:, c]))
        if quant == "int8_fp8":
            factor[c] = f32(amax) / f32(448)
            values[:, c] = [e4m3(float(f32(x) * (f32(448) / amax))) for x in v[:, c]]
        else:
            factor[c] = 2.0 ** math.frexp(float(amax))[1]
            values[:, c] = [float(np.float16(float(f32(x)) / factor[c])) for x in v[:, c]]
    return values, factor


# ---- forward ----------------------------------------------------------------------------------


def sparse_row(t: int, q: Array, k: Array, v: Array, row: Array, opt: Options) -> tuple:
    """O_s and lse of token t of one head; row (T_n) its mask."""
    n, d = q.shape
    scale = 1.0 / math.sqrt(d) if opt.scale is None else opt.scale
    listed = [j for j in range(n) if row[j // opt.block_k] > 0]
    if not listed:
        return np.zeros(d), -math.inf
    s = [scale * float(np.dot(q[t], k[j])) + math.log(row[j // opt.block_k]) for j in listed]
    lse = max(s) + math.log(sum(math.exp(x - max(s)) for x in s))
    return sum(math.exp(x - lse) * v[j] for x, j in zip(s, listed, strict=True)), lse


def sparse_row_quantized(t: int, q8: tuple, k8: tuple, v8: tuple, row: Array, opt: Options):
    """The same in low bit: q8, k8, v8 are (values, scales)."""
    n, d = q8[0].shape
    scale = f32(1.0 / math.sqrt(d) if opt.scale is None else opt.scale)
    listed = [j for j in range(n) if row[j // opt.block_k] > 0]
    if not listed:
        return np.zeros(d), -math.inf
    log2_e = f32(math.log2(math.e))
    dots = [int(np.dot(q8[0][t], k8[0][j])) for j in listed]
    s2 = [
        f32(x) * (q8[1][t] * k8[1][j] * scale) * log2_e for x, j in zip(dots, listed, strict=True)
    ]
    m = math.ceil(max(s2))
    p = [float(np.exp2(x - f32(m))) for x in s2]
    row_sum = sum(p)
    lse = math.log(2.0) * (m + math.log2(row_sum))
    if opt.quant == "int8_fp8":
        low = [e4m3(float(f32(256) * f32(x))) / 256 for x in p]
    else:
        low = [float(np.float16(x)) for x in p]
    acc = sum(x * v8[0][j] for x, j in zip(low, listed, strict=True))
    return acc * v8[1] / row_sum, lse


def linear_row(t: int, q: Array, k: Array, v: Array, weights: Array, opt: Options) -> Array:
    """O_l of token t: phi(q_t) . phi(k_s) over all keys s, times the weight of their block."""
    a = np.array(
        [weights[s // opt.block_k] * np.dot(phi(q[t]), phi(k[s])) for s in range(q.shape[0])]
    )
    if not weights.any():
        return np.zeros(q.shape[1])
    return sum(a[s] * v[s] for s in range(q.shape[0])) / a.sum()


def states_fp8(k: Array, v: Array, opt: Options) -> tuple[Array, Array]:
    """h_j (T_n, D, D) after its rounding to e4m3, and z_j (T_n, D), of one head."""
    n, d = v.shape
    phi_k = np.array([bf16(phi(x)) for x in k]).astype(np.float64)
    h, z = np.zeros((ceil_div(n, opt.block_k), d, d)), np.zeros((ceil_div(n, opt.block_k), d))
    for t in range(n):
        h[t // opt.block_k] += np.outer(phi_k[t], v[t])
        z[t // opt.block_k] += phi_k[t]
    for c in range(d):
        amax = max(f32(1e-30), *(abs(f32(x)) for x in v[:, c]))
        factor, unit = f32(448) / amax / f32(opt.block_k), amax / f32(448) * f32(opt.block_k)
        h[:, :, c] = [[e4m3(float(f32(x) * factor)) * unit for x in row] for row in h[:, :, c]]
    return h, z


def linear_row_fp8(t: int, q: Array, states: tuple[Array, Array], weights: Array) -> Array:
    """O_l of token t from rounded states."""
    if not weights.any():
        return np.zeros(q.shape[1])
    h, z = (sum(w * x for w, x in zip(weights, part, strict=True)) for part in states)
    return phi(q[t]) @ h / (phi(q[t]) @ z)


def alpha_of(logit: Array, h: int, t: int, n: int, block_q: int) -> float:
    """alpha of token t: logit (T_m,), (H, T_m) or (H, N)."""
    row = logit if logit.ndim == 1 else logit[h]
    return 1.0 / (1.0 + math.exp(-row[t // block_q if len(row) == ceil_div(n, block_q) else t]))


def forward(
    q: Array,
    k: Array,
    v: Array,
    proj_q: Array,
    proj_k: Array,
    alpha_logit: Array,
    opt: Options,
    block_map: Array | None = None,
) -> Result:
    """SLA2 attention, one row at a time."""
    batch, heads, n, _ = q.shape
    t_m, t_n = ceil_div(n, opt.block_q), ceil_div(n, opt.block_k)
    res = Result(*(np.zeros(q.shape) for _ in range(3)), np.zeros(q.shape[:3]), np.zeros((0,)))
    res.mask = np.zeros((batch, heads, t_m, t_n))
    for b in range(batch):
        for h in range(heads):
            k_raw = k[b, h]
            k_h = k_raw - k_raw.mean(0) if opt.smooth_k else k_raw
            w_q, w_k = (w[h] if w.ndim == 3 else w for w in (proj_q, proj_k))
            for i, row in enumerate(scores(q[b, h], k_h, w_q, w_k, opt)):
                if block_map is not None:
                    res.mask[b, h, i] = block_map[b, h, i]
                elif opt.mode == "soft":
                    res.mask[b, h, i] = soft_row(row, opt.num_kv_blocks, opt.tau, opt.pinned_kv)
                else:
                    res.mask[b, h, i] = hard_row(row, opt.num_kv_blocks, opt.pinned_kv)
            if opt.quant != "none":
                low = (
                    quantize_blocks(q[b, h], opt.block_q),
                    quantize_blocks(k_h, opt.block_k),
                    quantize_v(v[b, h], opt.quant),
                )
            phi_k = k_raw if opt.phi_input == "raw" else k_h
            if opt.quant == "int8_fp8":
                states = states_fp8(phi_k, v[b, h], opt)
            for t in range(n):
                row = res.mask[b, h, t // opt.block_q]
                if opt.quant == "none":
                    o_s, lse = sparse_row(t, q[b, h], k_h, v[b, h], row, opt)
                else:
                    o_s, lse = sparse_row_quantized(t, *low, row, opt)
                if opt.quant == "int8_fp8":
                    o_l = linear_row_fp8(t, q[b, h], states, 1.0 - row)
                else:
                    o_l = linear_row(t, q[b, h], phi_k, v[b, h], 1.0 - row, opt)
                alpha = alpha_of(alpha_logit, h, t, n, opt.block_q)
                if (row == 1.0).all():
                    alpha = 1.0
                elif (row == 0.0).all():
                    alpha = 0.0
                res.o_s[b, h, t], res.lse[b, h, t], res.o_l[b, h, t] = o_s, lse, o_l
                res.out[b, h, t] = alpha * o_s + (1.0 - alpha) * o_l
    return res


# ---- backward ---------------------------------------------------------------------------------


@dataclass
class Gradients:
    dq: Array  # (N, D)
    dk: Array  # (N, D), of the raw K
    dv: Array  # (N, D)
    dalpha: Array  # (T_m,), of alpha itself
    dmask: Array  # (T_m, T_n), of the soft mask m


def backward(
    q: Array,
    k: Array,
    v: Array,
    alpha: Array,
    mask: Array,
    o_s: Array,
    lse: Array,
    d_o: Array,
    block_q: int,
    block_k: int,
) -> Gradients:
    """Alg. 3 for one head, block by block: q, k (raw), v, o_s, d_o (N, D); alpha (T_m,); lse (N,).

    mask (T_m, T_n): 0/1, or m in (0, 1), whose logarithm is part of the scores. O_s and lse are the
    forward's, low-bit or not; everything else is recomputed from unquantised, smoothed K.
    """
    n, d = q.shape
    t_m, t_n = mask.shape
    rows = [slice(i * block_q, min(n, (i + 1) * block_q)) for i in range(t_m)]
    cols = [slice(j * block_k, min(n, (j + 1) * block_k)) for j in range(t_n)]
    k = k - k.mean(0)
    phi_q, phi_k = np.array([phi(x) for x in q]), np.array([phi(x) for x in k])
    h = np.array([phi_k[c].T @ v[c] for c in cols])
    z = np.array([phi_k[c].sum(0) for c in cols])

    grad = Gradients(*(np.zeros((n, d)) for _ in range(3)), np.zeros(t_m), np.zeros(mask.shape))
    dphi_q, dphi_k = np.zeros((n, d)), np.zeros((n, d))
    dh, dz = np.zeros(h.shape), np.zeros(z.shape)
    for i, r in enumerate(rows):
        w = 1.0 - mask[i]
        big_h, big_z = np.tensordot(w, h, 1), np.tensordot(w, z, 1)
        den = (phi_q[r] @ big_z)[:, None]
        o_l = phi_q[r] @ big_h / den
        dot_s, dot_l = (d_o[r] * o_s[r]).sum(1), (d_o[r] * o_l).sum(1)
        grad.dalpha[i] = (dot_s - dot_l).sum()
        d_s, d_l = alpha[i] * dot_s[:, None], (1.0 - alpha[i]) * dot_l[:, None]
        d_os, d_ol = alpha[i] * d_o[r], (1.0 - alpha[i]) * d_o[r]

        unit = phi_q[r] / den
        d_big_h, d_big_z = unit.T @ d_ol, -(unit.T @ d_l)[:, 0]
        dphi_q[r] = (d_ol @ big_h.T - d_l * big_z) / den
        for j, c in enumerate(cols):
            dh[j] += w[j] * d_big_h
            dz[j] += w[j] * d_big_z
            grad.dmask[i, j] = -(d_big_h * h[j]).sum() - (d_big_z * z[j]).sum()
            if mask[i, j] == 0.0:
                continue
            s = q[r] @ k[c].T / math.sqrt(d) + math.log(mask[i, j])
            p = np.exp(s - lse[r][:, None])
            grad.dv[c] += p.T @ d_os
            ds = p * (d_os @ v[c].T - d_s)
            grad.dq[r] += ds @ k[c] / math.sqrt(d)
            grad.dk[c] += ds.T @ q[r] / math.sqrt(d)
            grad.dmask[i, j] += ds.sum() / mask[i, j]
    for j, c in enumerate(cols):
        dphi_k[c] = v[c] @ dh[j].T + dz[j]
        grad.dv[c] += phi_k[c] @ dh[j]
    grad.dq += phi_q * (dphi_q - (dphi_q * phi_q).sum(1, keepdims=True))
    grad.dk += phi_k * (dphi_k - (dphi_k * phi_k).sum(1, keepdims=True))
    grad.dk -= grad.dk.mean(0)
    return grad


def soft_topk_gradient(m: Array, g: Array, tau: float) -> Array:
    """dL/dP_c of one row from dL/dm: (1/tau) v (g - sum(g v) / sum(v)), v = m (1 - m)."""
    v = m * (1.0 - m)
    return v * (g - (g * v).sum() / v.sum()) / tau
