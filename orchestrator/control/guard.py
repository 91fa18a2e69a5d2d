"""What to do when a worker fails, or does not move: pure decisions, which the supervisor carries out.

A failure has a class, and the class says what helps: nothing (the user's to mend), the newest checkpoint once more
(machines, a loss that is not finite), another place (preemption). ``Guard`` keeps the account of a run's failures;
``Watchdog`` compares where the workers are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

from orchestrator.config import GuardConfig
from orchestrator.training.failures import NotFiniteError, PreemptedError, StorageFailedError
from orchestrator.training.ownership import SupersededError
from orchestrator.training.pulse import Phase

# Environment variable: the seconds that who asks a driver to end gives it, for checkpoints.
ENDING_VARIABLE = "DRIVER_ENDING_S"

# -- classes of failures --------------------------------------------------------------------------------------------


class FailureClass(IntEnum):
    """Why a worker stopped. Where workers of a group differ the highest counts: the others fell with it."""

    INFRASTRUCTURE = 0  # machine, network, driver, a peer: the same again may well succeed
    PREEMPTED = 1  # asked to leave, left with a checkpoint
    NOT_FINITE = 2
    STORAGE = 3  # has been waited for already
    USER = 4  # the same again fails in the same way
    SUPERSEDED = 5


_OF_PEERS = re.compile(r"gloo|nccl|connect|peer|socket|timed? ?out|network|transport|broken pipe", re.I)
_OF_MACHINES = re.compile(
    r"cuda|cudnn|cublas|hip|triton|engine|primitive|driver|\becc\b|memory|alloc|thread|store|file|device", re.I
)


def classify(error: BaseException, phase: Phase) -> FailureClass:
    """The class of what a worker raised in ``phase``. In doubt a machine is at fault: the same is tried again.

    Only what a network of the user's runs in, or what was raised to be mended, is taken for the user's fault: a run of
    two weeks must not end for the bad day of a library.
    """
    match error:
        case SupersededError():
            return FailureClass.SUPERSEDED
        case PreemptedError():
            return FailureClass.PREEMPTED
        case NotFiniteError():
            return FailureClass.NOT_FINITE
        case StorageFailedError():
            return FailureClass.STORAGE
        case ValueError():
            return FailureClass.USER
        case OSError() | MemoryError() | EOFError():
            return FailureClass.INFRASTRUCTURE
    if phase is not Phase.COMPUTE or not isinstance(error, Exception) or type(error).__module__.startswith("ray."):
        return FailureClass.INFRASTRUCTURE
    if isinstance(error, RuntimeError):
        # torch raises it for wrong shapes as for a dead peer or a full memory.
        of_machines = type(error) is not RuntimeError or is_of_peers(str(error)) or _OF_MACHINES.search(str(error))
        return FailureClass.INFRASTRUCTURE if of_machines else FailureClass.USER
    return FailureClass.USER


def is_of_peers(text: str) -> bool:
    """Whether an error tells of having lost another worker, rather than of a fault of its own."""
    return _OF_PEERS.search(text) is not None


@dataclass(frozen=True)
class Failure:
    """What became of one worker: ``where`` names it and its place in the run, ``text`` says what it met."""

    kind: FailureClass
    where: str
    text: str

    @property
    def is_collateral(self) -> bool:
        """Whether it only tells of another worker's end."""
        return self.kind is FailureClass.INFRASTRUCTURE and is_of_peers(self.text)

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


# -- the account of a run -------------------------------------------------------------------------------------------


class Ending(Enum):
    """What a run that is given up ends with."""

    USER = "user"  # ValueError
    SUPERSEDED = "superseded"  # SupersededError
    FAILED = "failed"  # RunFailedError
    LEFT = "left"  # PreemptedError


@dataclass(frozen=True)
class Refusal:
    """Going on is of no use."""

    ending: Ending
    text: str


class Guard:
    """The failures of one run under one driver, and whether to go on after each.

    A budget of ``max_failures`` is drawn on by every failure of machines and refilled by one with every checkpoint;
    where ``max_stalled_restarts`` restarts have not brought a new checkpoint the run is given up too. A loss that is
    not finite gets one more try from the newest checkpoint: what comes again there is no fault of a machine.
    Preemptions and changes of the number of workers are free.
    """

    def __init__(self, run: str, limits: GuardConfig) -> None:
        self._run, self._limits = run, limits
        self.refusal: Refusal | None = None
        self.num_groups = 0  # worker groups that have begun
        self._size = 0
        self._step = -1  # of the newest checkpoint, as far as this driver knows
        self._has_saved = False  # this group
        self._failures: list[Failure] = []  # of this group, as told by its workers
        self._spent = 0
        self._tried: list[Failure] = []  # one a restart, since the newest checkpoint
        self._scored: dict[str, int] = {}  # images by test
        self._not_finite_at = -2  # newest checkpoint when a loss was last not finite
        self._leaves = False

    def saved(self, step: int) -> None:
        """A checkpoint of ``step`` is durable."""
        if step > self._step:
            self._step, self._tried, self._has_saved = step, [], True
            self._spent = max(0, self._spent - 1)

    def scored(self, test: str, images: int) -> None:
        """Scores of so many images of a test are durable; more than before are worth as much as a checkpoint."""
        if images > self._scored.get(test, 0):
            self._scored[test], self._tried, self._has_saved = images, [], True
            self._spent = max(0, self._spent - 1)

    def goes_on_from(self, step: int) -> None:
        """Workers have begun at ``step``, the newest checkpoint that is whole; 0: there is none."""
        self._step = step or -1

    def begin(self, size: int, silent: Sequence[str] = ()) -> None:
        """A group of ``size`` workers begins; ``silent``: workers of the one before that have told no failure."""
        if self.num_groups:
            self._settle(size, silent)
        if self._leaves:
            self.leave(is_at_work=False)
        self._size, self._failures, self._has_saved = size, [], False
        self.num_groups += 1

    def failed(self, failure: Failure) -> None:
        """A worker of this group has stopped, or was stopped. What cannot be helped is refused at once."""
        self._failures.append(failure)
        kept = f"the checkpoint of step {self._step}" if self._step >= 0 else "what was saved before"
        if failure.kind is FailureClass.USER:
            self._refuse(
                Ending.USER, f"{failure.text} ({failure.where}; {kept} is kept: mend it, and the same command goes on)"
            )
        elif failure.kind is FailureClass.SUPERSEDED:
            self._refuse(Ending.SUPERSEDED, failure.text)
        elif failure.kind is FailureClass.STORAGE:
            self._refuse(Ending.FAILED, failure.text)
        elif failure.kind is FailureClass.PREEMPTED and self._leaves:
            self._refuse(Ending.LEFT, failure.text)
        elif failure.kind is FailureClass.NOT_FINITE and self._not_finite_at == self._step:
            self._refuse(Ending.USER, f"{failure.text} (after going back to step {max(0, self._step)}, it came again)")

    def give_up(self, why: str) -> None:
        """End the run, which cannot go on for a reason that no worker knows."""
        self._refuse(Ending.FAILED, f"{why}{self._told()}; {self._goes_on()}")

    def leave(self, *, is_at_work: bool) -> None:
        """The driver's own machine is about to go away: a checkpoint where workers are at work, and no new group."""
        self._leaves = True
        if not is_at_work:
            self._refuse(Ending.LEFT, f"left its place between two groups of workers; {self._goes_on()}")

    def _settle(self, new_size: int, silent: Sequence[str]) -> None:
        """The group before is gone: what it costs."""
        own = [failure for failure in self._failures if not (failure.is_collateral)]
        if not own and self._has_saved and (new_size > self._size or (not self._failures and new_size < self._size)):
            return  # Ray has changed the number of workers
        # Who lost a peer is not to blame, nor are those whom Ray ended then, where another has told what happened.
        fallen = [
            Failure(FailureClass.INFRASTRUCTURE, w, "ended without a word (killed? out of memory?)") for w in silent
        ]
        worst = max(own or fallen or self._failures, key=lambda f: f.kind)
        if worst.kind is FailureClass.NOT_FINITE:
            self._not_finite_at = self._step
        if worst.kind is not FailureClass.INFRASTRUCTURE:
            return
        self._spent += 1
        self._tried.append(worst)
        tried = f"{self._told()}; {self._goes_on()}"
        restarts = len(self._tried) - 1
        if restarts >= self._limits.max_stalled_restarts:
            self._refuse(Ending.FAILED, f"no new checkpoint after {restarts} restarts{tried}")
        elif self._spent > self._limits.max_failures:
            limit = f"guard.max_failures {self._limits.max_failures} (a checkpoint gives one back)"
            self._refuse(Ending.FAILED, f"more failures than {limit}{tried}")

    def _told(self) -> str:
        lines = [f"{number}. {failure}" for number, failure in enumerate(self._tried[-5:], 1)]
        return f" ({'; '.join(lines)})" if lines else ""

    def _goes_on(self) -> str:
        if self._step < 0:
            return "nothing was saved by this start; what earlier ones saved is kept: the same command tries again"
        return f"the checkpoint of step {self._step} is kept: the same command goes on from it"

    @property
    def pause_s(self) -> float:
        """Seconds that a starting group should wait: a machine that fails at once is given time."""
        return min(30.0, 2.0 ** (len(self._tried) - 1)) if len(self._tried) > 1 else 0.0

    def _refuse(self, ending: Ending, text: str) -> None:
        named = text if repr(self._run) in text else f"run {self._run!r}: {text}"
        self.refusal = self.refusal or Refusal(ending, named)


# -- workers that do not move ---------------------------------------------------------------------------------------

_PATIENCE_AT_START = 5.0  # times the timeout: compiling, first batches, a cold file system


@dataclass(frozen=True)
class Beat:
    """A worker's last sign of life: where it was, and when this was heard (monotonic seconds of one clock for all)."""

    rank: int
    step: int
    phase: Phase
    count: int  # grows with every move
    heard_s: float
    waits_for_storage: bool = False


@dataclass(frozen=True)
class Hang:
    """Nobody has moved for ``seconds``; ``late`` are those that hold the others up (all, where that cannot be told)."""

    seconds: float
    late: tuple[Beat, ...]
    silent: bool  # these give no sign at all


class Watchdog:
    """Sees from outside that a group of workers does not move, and who holds it up."""

    def __init__(self, hang_timeout_s: float) -> None:
        self._timeout_s = hang_timeout_s
        self._group, self._moved_s = "", 0.0
        self._counts: dict[int, int] = {}
        self._first_step: int | None = None

    def look(self, now_s: float, group: str, beats: Sequence[Beat]) -> Hang | None:
        """What is wrong with ``group``, whose workers were last heard of as ``beats``; tells each hang once."""
        if group != self._group:
            self._group, self._moved_s, self._counts, self._first_step = group, now_s, {}, None
        if not beats:
            return None
        counts = {beat.rank: beat.count for beat in beats}
        silence_s = min(self._timeout_s, max(5.0, self._timeout_s / 2))
        silent = [beat for beat in beats if now_s - beat.heard_s > silence_s]
        if counts != self._counts or any(b.waits_for_storage for b in beats if b not in silent):
            self._counts, self._moved_s = counts, now_s
        step = max(beat.step for beat in beats)
        if self._first_step is None and all(b.phase is not Phase.START for b in beats):
            self._first_step = step
        is_testing = any(b.phase >= Phase.SCORE for b in beats)
        starting = self._first_step is None or (step <= self._first_step and not is_testing)
        seconds = now_s - self._moved_s
        if seconds < self._timeout_s * (_PATIENCE_AT_START if starting and not silent else 1.0):
            return None
        self._moved_s = now_s  # it is told once, and again if killing has not helped
        if silent:
            return Hang(seconds, tuple(silent), silent=True)
        last = min((beat.step, beat.phase) for beat in beats)
        return Hang(seconds, tuple(b for b in beats if (b.step, b.phase) == last), silent=False)
