"""A trace of a few steps, as torch's profiler sees them: for https://ui.perfetto.dev or chrome://tracing.

::

    profile/000003-0001.json.gz    of start number 3, rank 1
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from orchestrator.storage import Storage
from orchestrator.training.pulse import Pulse
from orchestrator.world import World

FOLDER = "profile"
_STEPS_BEFORE = 10  # of a start: caches fill, and kernels are chosen


class Profiler:
    """Looks at ``steps`` steps of this worker, the eleventh of a start and those after it. 0: at none."""

    def __init__(
        self,
        run: Storage,
        attempt: int,
        world: World,
        first: int,
        steps: int,
        tell: Callable[[str], None],
        pulse: Pulse,
    ) -> None:
        """``attempt``: the number of the start on rank 0; ``first``: number of the first step. Collective."""
        self._run, self._rank, self._tell, self._pulse = run, world.rank, tell, pulse
        self._attempt = world.from_first(attempt) if steps else 0
        self._from, self._until = first + _STEPS_BEFORE, first + _STEPS_BEFORE + steps
        self._steps = steps
        self._profile: Any = None

    def at(self, step: int) -> bool:
        """Step ``step`` is about to begin. Whether this took time of its own."""
        if not self._steps:
            return False
        if step == self._from:
            on_gpu = [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            try:
                profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *on_gpu])
                profile.start()
                self._profile = profile
            except RuntimeError as error:  # another profiler is at work
                self._not_kept(error)
            return True
        if step == self._until:
            self.close()
            return True
        return False

    def close(self) -> None:
        """Write what was seen so far. No error of its own ends a run."""
        profile, self._profile = self._profile, None
        if profile is None:
            return
        name = f"{FOLDER}/{self._attempt:06d}-{self._rank:04d}.json.gz"
        # A trace of many steps takes minutes: that is no hang.
        with self._pulse.storing(), tempfile.TemporaryDirectory(prefix="profile-") as folder:
            path = Path(folder) / "trace.json.gz"
            try:
                profile.stop()
                profile.export_chrome_trace(str(path))
                self._run.publish(name, path.read_bytes())
            except (OSError, ValueError, RuntimeError) as error:
                self._not_kept(error)
                return
        if not self._rank:
            self._tell(
                f"profile of up to {self._steps} steps: {self._run.url}/{name} (open it at https://ui.perfetto.dev)"
            )

    def _not_kept(self, error: Exception) -> None:
        self._tell(f"the profile of rank {self._rank} is not kept: {error}")
