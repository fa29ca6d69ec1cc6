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

MAX_SEQLEN: Final = 1 << 20
"""Longest supported sequence: T_n = 16384 key blocks, whose indices fit uint16."""
