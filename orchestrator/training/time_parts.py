"""Parts of the time of a run's first worker, by name. The first four are a step's, as its device sees them."""

from __future__ import annotations

INPUT, COMPUTE, REDUCE, OPTIMIZER = "input", "compute", "all_reduce", "optimizer"
VALIDATION, CHECKPOINT, OTHER = "validation", "checkpoint", "other"
PARTS = (INPUT, COMPUTE, REDUCE, OPTIMIZER, VALIDATION, CHECKPOINT, OTHER)
