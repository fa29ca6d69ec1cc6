"""Training of the router: stage 1 learns from the q, k, v that attention met in a real model."""

from __future__ import annotations

from .recorder import QKVRecorder
from .samples import Sample, read_samples

__all__ = ["QKVRecorder", "Sample", "read_samples"]
