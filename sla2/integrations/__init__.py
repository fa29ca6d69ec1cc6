"""SLA2 in models of other libraries: one call replaces their self-attention.

Nothing here imports diffusers: an adapter looks for its classes only where they are loaded already.
"""

from . import ltx, wan
from .adapter import Adapter, register_adapter
from .model import apply, dense, remove, set_stage, set_topk
from .report import ApplyReport

__all__ = [
    "Adapter",
    "ApplyReport",
    "apply",
    "dense",
    "ltx",
    "register_adapter",
    "remove",
    "set_stage",
    "set_topk",
    "wan",
]
