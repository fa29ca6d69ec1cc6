"""What changes during a run of stage 1's fit: rate and temperature, functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ..checks import check_tau

SCHEDULES = ("cosine", "constant")


class Schedule(NamedTuple):
    """The rate and SoftTop-k's temperature at each step of a run, counted from 0.

    Nothing here has a state, so a resumed run needs none.
    """

    steps: int
    lr: float
    warmup: int  # steps of linear growth; at most half of the run
    kind: str  # of SCHEDULES
    tau: tuple[float, float]  # of the first and the last step, geometric in between

    def lr_at(self, step: int) -> float:
        """`lr` after the warm-up; with "cosine" it then falls towards 0, which it never is."""
        warmup = min(self.warmup, self.steps // 2)
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        if self.kind == "constant":
            return self.lr
        share = (step - warmup) / (self.steps - warmup)
        return self.lr * (0.5 + 0.5 * math.cos(math.pi * share))

    def tau_at(self, step: int) -> float:
        """Exactly `tau` at both ends."""
        first, last = self.tau
        if step >= self.steps - 1:
            return last
        share = step / (self.steps - 1)
        return first * (last / first) ** share


def check_tau_range(tau: tuple[float, float] | None) -> tuple[float, float] | None:
    """Raises TypeError / ValueError unless `tau` is None or two temperatures."""
    if tau is None:
        return None
    if not isinstance(tau, Sequence) or len(tau) != 2:
        raise TypeError(f"tau must be two floats, at the first and the last step; got {tau!r}")
    return check_tau(tau[0]), check_tau(tau[1])
