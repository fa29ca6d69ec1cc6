"""Training of the router: stage 1 learns from the q, k, v that attention met in a real model.

`param_groups` and `set_stage`, which both stages need, are those of `sla2`.
"""

from __future__ import annotations

from ..integrations import set_stage
from ..optim import param_groups
from .calibrate import calibrate_alpha
from .fit import fit_router
from .fit_folder import FitReport, read_report
from .recorder import QKVRecorder
from .samples import Sample, read_samples

__all__ = [
    "FitReport",
    "QKVRecorder",
    "Sample",
    "calibrate_alpha",
    "fit_router",
    "param_groups",
    "read_report",
    "read_samples",
    "set_stage",
]
