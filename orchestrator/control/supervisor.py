"""One run on Ray: check, place the workers, restart them, report. The workers train, finish the model and test it.

Ray places processes and owns no state: its storage path is a fresh folder per attempt that nobody reads back. What a
run remembers is in our storage, so every process may be killed at any line and the same call made again. ``guard``
decides what to do about failures; here it is done.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from types import FrameType
from typing import Any

from orchestrator.config import TrainConfig
from orchestrator.control import checks
from orchestrator.control.guard import Ending, FailureClass, Refusal, classify
from orchestrator.control.mailbox import Heart, Mailbox, failure_of
from orchestrator.control.placement import Placement, resources_of_worker
from orchestrator.control.stuck import Place, tells_its_stacks
from orchestrator.control.waiting import place_in_time
from orchestrator.control.watch import Watch
from orchestrator.control.worker_log import WorkerLog, speaks
from orchestrator.data.shards import DataSet
from orchestrator.evaluation.results import is_tested
from orchestrator.evaluation.stages import do_job
from orchestrator.ray_session import Cluster, ray_session
from orchestrator.remote import stop_waiting, trust_stores
from orchestrator.storage import Storage
from orchestrator.training.failures import PreemptedError
from orchestrator.training.notices import Event, notice, warnings_told
from orchestrator.training.ownership import Claim, SupersededError, claim, next_start
from orchestrator.training.pulse import Phase, Pulse, Wish
from orchestrator.training.run import Outcome, check_identity, finished, fix_identity, run_storage
from orchestrator.world import World, largest_share, share_of

_log = logging.getLogger(__name__)

_SAME_SIGNAL_S = 5.0  # Ray signals a job's driver and its children; a campaign passes on to its members what it got

Listener = Callable[[Event], None]


class RunFailedError(RuntimeError):
    """A run stopped before its end for another reason than the user's input. What was saved is kept."""


def check(config: TrainConfig, *, trains: bool = True) -> DataSet:
    """Everything that can be known before anything is taken or written. Raises ValueError, saying what to do.

    trains: False where the run is only tested, as far as it has come.
    """
    start = checks.Start(config)
    for each in checks.BEFORE_PLACEMENT if trains else checks.BEFORE_TESTS:
        each.look(start)
    assert start.data is not None
    return start.data


def resolve(config: TrainConfig) -> TrainConfig:
    """``config`` with absolute URLs: workers have other working directories. Raises ValueError for an unusable URL."""
    data = Storage(config.data).url if config.data else ""
    return replace(config, data=data, storage=Storage(config.storage).url if config.storage else "")


def outcome_of(config: TrainConfig) -> Outcome | None:
    """The outcome of a run that is done with all that ``config`` asks for, without a look at data or cluster.

    Raises ValueError for a changed config.
    """
    if not config.storage or not config.name:
        return None
    with checks.reading_storage(config.storage):
        done = finished(run_storage(config))
        if done is None:
            return None
        check_identity(run_storage(config), config, None)
        return done if is_tested(config) else None


def run_job(config: TrainConfig, listen: Listener) -> Outcome:
    """Do ``config`` on Ray, to the end; goes on from where the run stands, and returns at once if all of it is done.

    ``listen`` takes the events of the run (``stages.do_job``) in a thread of this process. Raises ValueError for what
    the user must mend, RunFailedError where the run could not be finished.
    """
    config = resolve(config)
    done = outcome_of(config) or _on_ray(config, listen, trains=True)
    assert done is not None
    return done


def score_job(config: TrainConfig, listen: Listener) -> None:
    """Test a run on Ray as far as it has come. As ``run_job`` otherwise."""
    _on_ray(resolve(config), listen, trains=False)


def run_in_process_group(config: TrainConfig, listen: Listener) -> Outcome:
    """``run_job`` without Ray: this process is one worker of the group that torchrun's environment describes."""
    config = resolve(config)
    done = outcome_of(config) or _in_process_group(config, listen, trains=True)
    assert done is not None
    return done


def score_in_process_group(config: TrainConfig, listen: Listener) -> None:
    """``score_job`` without Ray."""
    _in_process_group(resolve(config), listen, trains=False)


def _on_ray(config: TrainConfig, listen: Listener, *, trains: bool) -> Outcome | None:
    with asked_to_leave() as leaves:
        data, run = check(config, trains=trains), run_storage(config)
        _leave(config, leaves)
        with ray_session(config.placement.ray_address, hears=True) as cluster:
            placement = _place(config, cluster, listen, leaves)
            _leave(config, leaves)
            with _begin(config, data, run, listen, trains=trains) as owner:
                event = {"kind": "placed", "workers": placement.num_workers, "gpu": placement.use_gpu}
                listen(event | {"attempt": owner.number})
                return _fit(config, data, placement, run, owner, listen, leaves, trains=trains)


def _place(config: TrainConfig, cluster: Cluster, listen: Listener, leaves: threading.Event) -> Placement:
    try:
        return place_in_time(config, cluster, lambda text: listen(notice(text)), lambda: _leave(config, leaves))
    except TimeoutError as error:
        raise RunFailedError(f"run {config.name!r} was not begun: {error}; the same command waits again") from None


def _leave(config: TrainConfig, leaves: threading.Event) -> None:
    if leaves.is_set():
        raise PreemptedError(
            f"run {config.name!r} left its place before anything was trained: the same command goes on"
        )


@contextmanager
def asked_to_leave() -> Iterator[threading.Event]:
    """An event that SIGTERM sets within it (ray job stop, SLURM). One that comes later does what it did before."""
    leaves = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield leaves
        return
    asked_s = math.inf

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal asked_s
        if not leaves.is_set():
            asked_s = time.monotonic()
            leaves.set()
        elif time.monotonic() - asked_s > _SAME_SIGNAL_S:
            signal.signal(signal.SIGTERM, before)
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield leaves
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_process_group(config: TrainConfig, listen: Listener, *, trains: bool) -> Outcome | None:
    data, run = check(config, trains=trains), run_storage(config)
    if os.environ.get("RANK", "0") != "0" or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        trust_stores()  # the first process, or the first start, has reached them
    world = World.from_environment()
    owner: Claim | None = None
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        share_of(world.rank, world.size, config.batch.global_batch_size, config.batch.bn_group_size)
        owner = _begin(config, data, run, listen, trains=trains) if world.is_first else None
        attempt = owner.number if owner else 0
        if owner:
            use_gpu = world.device.type == "cuda"
            listen({"kind": "placed", "workers": world.size, "gpu": use_gpu, "attempt": attempt})
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cpus = config.placement.cpus_per_worker or max(1, len(os.sched_getaffinity(0)) // local_size)
        pulse = Pulse()
        # What torchrun and SLURM send before they take the machines away.
        signal.signal(signal.SIGTERM, lambda number, frame: setattr(pulse, "wish", Wish.LEAVE))
        with warnings_told(listen, world.rank):
            return do_job(config, world, attempt=attempt, cpus=cpus, emit=listen, pulse=pulse, trains=trains)
    finally:
        signal.signal(signal.SIGTERM, on_terminate)
        if owner:
            owner.release()
        world.leave()


def _begin(config: TrainConfig, data: DataSet, run: Storage, listen: Listener, *, trains: bool) -> Claim:
    """Fix the identity of a new run, and take it for this process."""
    run.check_writable()
    if trains:
        fix_identity(run, config, data)
    guard = config.guard
    return claim(run, lease_s=guard.lease_s, take_over=guard.take_over, tell=lambda text: listen(notice(text)))


def _fit(
    config: TrainConfig,
    data: DataSet,
    placement: Placement,
    run: Storage,
    owner: Claim,
    listen: Listener,
    leaves: threading.Event,
    *,
    trains: bool,
) -> Outcome | None:
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if placement.is_elastic:  # after a node was lost Ray waits so long for it before it takes fewer workers
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from orchestrator.control.process_group import TorchOnNodes

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    limits = config.guard
    mailbox = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote(config.name, asdict(limits))
    resources = resources_of_worker(placement.use_gpu, placement.cpus_per_worker, config.placement.runs_per_gpu)
    with suppress(OSError, ValueError):
        run.delete("ray")  # what a killed driver has left
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "config": config.to_json(),
            "attempt": owner.number,
            "token": owner.token,
            "cpus": placement.cpus_per_worker,
            "trains": trains,
            "mailbox": mailbox,
        },
        scaling_config=ScalingConfig(
            num_workers=(placement.least_workers, placement.most_workers)
            if placement.is_elastic
            else placement.num_workers,
            use_gpu=placement.use_gpu,
            resources_per_worker=resources,
            placement_strategy="PACK",  # as few nodes as can be, and ranks side by side on each
        ),
        # Hangs are the watchdog's; whoever waits for a worker that waits for storage must have more patience than it.
        torch_config=TorchOnNodes(timeout_s=int(max(600, 2 * limits.storage_patience_s, 6 * limits.hang_timeout_s))),
        run_config=RunConfig(
            name=f"{owner.number:06d}",
            **_ray_storage(run.sub("ray")),
            # How often to try again, and when not to, is the guard's.
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),
        ),
    )
    worker_log = WorkerLog(run, owner.number)
    watch = Watch(config.name, mailbox, limits, placement, owner, listen, leaves)
    failure: Exception | None = None
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        watch.start()
        try:
            with worker_log:
                trainer.fit()
        finally:
            watch.fit_has_ended()
    except (SystemExit, KeyboardInterrupt):  # what Ray's own SIGINT handler makes of Ctrl-C, and of the watch's call
        if not watch.gave_up:
            stop_waiting()
            raise KeyboardInterrupt from None
    except Exception as error:  # Ray wraps whatever a worker raised in types of its own
        failure = error
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        watch.stop()
        with suppress(OSError, ValueError):
            run.delete("ray")
    with suppress(ray.exceptions.RayError):  # the cluster itself may be gone
        watch.refusal = watch.refusal or ray.get(mailbox.take.remote(0), timeout=30).refusal
    outcome = finished(run)
    is_done = (outcome is not None or not trains) and is_tested(config, data.digest)
    if watch.refusal is not None and (not is_done or watch.refusal.ending is Ending.SUPERSEDED):
        raise _as_error(watch.refusal)
    if not is_done:
        raise RunFailedError(
            f"run {config.name!r} stopped before its end"
            + (f" ({_cause(failure)})" if failure else "")
            + "; its checkpoints are kept: the same command goes on from the newest"
        ) from failure
    return outcome


def _as_error(refusal: Refusal) -> Exception:
    match refusal.ending:
        case Ending.USER:
            return ValueError(refusal.text)
        case Ending.SUPERSEDED:
            return SupersededError(refusal.text)
        case Ending.FAILED:
            return RunFailedError(refusal.text)
        case Ending.LEFT:
            return PreemptedError(refusal.text)


def _work(settings: dict[str, Any]) -> None:
    """A worker of the group that Ray Train has made."""
    import ray
    from ray.train import get_context
    from ray.train.torch import get_device
    from ray.util import get_current_placement_group

    mailbox, context, pulse = settings["mailbox"], get_context(), Pulse()
    group, size = get_current_placement_group().id.hex(), context.get_world_size()
    here = Place.of(context.get_world_rank(), os.getpid(), ray.get_runtime_context().get_node_id())
    may_start, number, pause_s = ray.get(mailbox.begin.remote(group, size, here))
    if not may_start:
        return  # started again after that was found to be no use
    time.sleep(pause_s)
    config = TrainConfig.from_json(settings["config"])
    batch = config.batch
    device = get_device() if config.placement.use_gpu is not False else "cpu"
    trust_stores()  # the driver has reached them

    def emit(event: Event) -> None:
        mailbox.put.remote([event])

    what = f"{device}, {settings['cpus']} CPU(s), start {number} of this driver's workers"
    heart = Heart(mailbox, group, here, size, pulse)
    with tells_its_stacks(), heart, warnings_told(emit, here.rank), speaks(here.rank, size, what):
        try:
            share = largest_share(size, batch.global_batch_size, batch.bn_group_size)
            world = World.from_process_group(device, share)
            if world.stands_by:
                ray.get(mailbox.stand_by.remote(group, here.rank))
                while not ray.get(mailbox.is_over.remote(group)):
                    time.sleep(2.0)
                return
            attempt = settings["attempt"]
            if number > 1 and world.is_first:  # what the group before still publishes must not count
                attempt = next_start(run_storage(config), settings["token"])
            trains = settings["trains"]
            do_job(config, world, attempt=attempt, cpus=settings["cpus"], emit=emit, pulse=pulse, trains=trains)
            ray.get(mailbox.end.remote(group))
            _log.info("done")
        except Exception as error:
            _log.exception("this worker ends")
            kind = classify(error, pulse.phase)
            if kind is FailureClass.USER and pulse.phase is Phase.START and number > 1:
                kind = FailureClass.INFRASTRUCTURE  # it has worked before: this machine lacks something
            text = (
                str(error)
                if isinstance(error, ValueError | PreemptedError)
                else f"{type(error).__name__}: {_cause(error)}{_at(error)}"
            )
            failure = failure_of(error, kind, here, pulse, text)
            goes_on = ray.get(mailbox.failed.remote(group, here.rank, failure))
            if goes_on and (kind is not FailureClass.PREEMPTED or here.rank == 0):
                ray.get(mailbox.put.remote([notice(f"{failure}; all workers start again")]))
            raise


def _at(error: BaseException) -> str:
    """The line of code that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" (at {frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _ray_storage(folder: Storage) -> dict[str, Any]:
    """Ray's arguments for a folder of ours."""
    if folder.is_local:
        return {"storage_path": folder.root}
    return {"storage_path": folder.root, "storage_filesystem": _arrow_file_system(folder.url)}


def _arrow_file_system(url: str) -> Any:
    """The file system of ``url`` for pyarrow. Ray keeps what it is given: an address, not the credentials."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    class ByAddress(FSSpecHandler):
        def __reduce__(self) -> tuple[Any, ...]:
            return _arrow_handler, (url,)

    return PyFileSystem(ByAddress(Storage(url).fs))


def _arrow_handler(url: str) -> Any:
    return _arrow_file_system(url).handler


def _cause(error: Exception) -> str:
    """The telling line of a worker's error: Ray's text holds whole tracebacks, torch's of its own library after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = lines[0 if type(error).__module__ == "builtins" else -1]
    return line.partition(". This is typically caused")[0][:300]  # gloo's advice
