"""Why a run stops before its end, where that is not the user's fault."""

from __future__ import annotations


class NotFiniteError(RuntimeError):
    """More losses or gradients were not finite than are put up with: the run goes back to its newest checkpoint."""


class PreemptedError(RuntimeError):
    """The run was asked to leave its place; it has made a checkpoint and goes on elsewhere."""


class StorageFailedError(OSError):
    """A checkpoint could not be stored for as long as it was worth trying: a full disk, a store that is away."""
