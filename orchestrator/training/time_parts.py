"""Parts of the time of a run's first worker, by name. The first five are a step's, as its device sees them."""

from __future__ import annotations

INPUT, COPY, COMPUTE, REDUCE, OPTIMIZER = "input", "copy", "compute", "all_reduce", "optimizer"
VALIDATION, CHECKPOINT, OTHER = "validation", "checkpoint", "other"
PARTS = (INPUT, COPY, COMPUTE, REDUCE, OPTIMIZER, VALIDATION, CHECKPOINT, OTHER)
