"""SLA2: sparse-linear attention with a learned router, for diffusion transformers.

Source: "SLA2: Sparse-Linear Attention with Learnable Routing and QAT", arXiv 2602.12675.

Importing `sla2` loads nothing else: torch and the compiled module come with the first use of a name
that needs them, so `sla2.why_not()` and `sla2.collect_env()` can report on a machine where these
are missing or broken.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import reference
    from .block_map import BlockMap
    from .checkpoint import load_router, save_router
    from .env import (
        __git_sha__,
        __version__,
        collect_env,
        get_cmake_dir,
        get_include,
        is_available,
        why_not,
    )
    from .functional import (
        Aux,
        block_sparse_attention,
        complement_linear_attention,
        route,
        sla2_attention,
    )
    from .integrations import apply, dense, remove, set_stage, set_topk
    from .module import SLA2Attention
    from .optim import param_groups

__all__ = [
    "Aux",
    "BlockMap",
    "SLA2Attention",
    "__git_sha__",
    "__version__",
    "apply",
    "block_sparse_attention",
    "collect_env",
    "complement_linear_attention",
    "dense",
    "get_cmake_dir",
    "get_include",
    "is_available",
    "load_router",
    "param_groups",
    "reference",
    "remove",
    "route",
    "save_router",
    "set_stage",
    "set_topk",
    "sla2_attention",
    "why_not",
]

# Public name -> the module that defines it.
_HOME = {
    "Aux": "functional",
    "BlockMap": "block_map",
    "SLA2Attention": "module",
    "__git_sha__": "env",
    "__version__": "env",
    "apply": "integrations",
    "block_sparse_attention": "functional",
    "collect_env": "env",
    "complement_linear_attention": "functional",
    "dense": "integrations",
    "get_cmake_dir": "env",
    "get_include": "env",
    "is_available": "env",
    "load_router": "checkpoint",
    "param_groups": "optim",
    "reference": "reference",
    "remove": "integrations",
    "route": "functional",
    "save_router": "checkpoint",
    "set_stage": "integrations",
    "set_topk": "integrations",
    "sla2_attention": "functional",
    "why_not": "env",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'sla2' has no attribute {name!r}")
    module = importlib.import_module(f"sla2.{home}")
    value = module if name == home else getattr(module, name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
