"""Numbers every layer of SLA2 agrees on; `csrc/include/sla2/sla2.h` has them for C and C++."""

from __future__ import annotations

from typing import Final

BLOCK_Q: Final = 128
"""Rows of a query block (b_q of the paper)."""

BLOCK_K: Final = 64
"""Rows of a key/value block (b_k of the paper)."""

EPS: Final = 1e-30
"""Lower bound of every quantiser's amax and of the linear branch's denominator."""

E4M3_MAX: Final = 448.0
"""Largest finite value of the fp8 format e4m3."""

E4M3_P_FACTOR: Final = 256.0
"""What multiplies P in (0, 1] before it rounds: a power of two, so that p itself is what rounds."""

INT8_MAX: Final = 127
"""Largest magnitude of the symmetric int8 quantiser."""

HEAD_DIMS: Final = (64, 128)
"""Head dimensions the kernels are built for; `sla2.reference` takes any."""

QUANT_MODES: Final = ("none", "int8_fp16", "int8_fp8")
"""Precisions of the forward pass."""

SOFT_MAP_MIN: Final = 2.0**-16
"""Smallest m of stage 1's soft map that the sparse branch of the kernels attends to.

The m of a row sum to K, those below this to less than T_n times it: of keys with like scores, a
share under SOFT_MAP_MIN / topk, 5e-4 at 3 %, a quarter of what rounding P to bfloat16 may cost. No
row is left without a block, as its largest m is at least 1 / 16384. In the linear branch 1 - m of a
block left out is 1 in bfloat16.
"""

MAX_SEQLEN: Final = 1 << 20
"""Longest supported sequence: T_n = 16384 key blocks, whose indices fit uint16."""
