"""One training run on Ray: check, place the workers, restart them, report.

Ray places processes and owns no state: its storage path is a fresh folder per attempt that nobody reads back. What a
run remembers is in our storage, so every process may be killed at any line and the same call made again.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.config import TrainConfig
from orchestrator.control import checks
from orchestrator.data.shards import DataSet
from orchestrator.ray_session import Cluster, ray_session
from orchestrator.remote import stop_waiting, trust_stores
from orchestrator.storage import Storage
from orchestrator.training.notices import Event, notice, warnings_told
from orchestrator.training.run import (
    Outcome,
    SupersededError,
    check_identity,
    finished,
    fix_identity,
    next_attempt,
    run_storage,
)
from orchestrator.training.trainer import train
from orchestrator.world import World, share_of

Listener = Callable[[Event], None]
_POLL_S = 0.25


class RunFailedError(RuntimeError):
    """A run stopped before its end for another reason than the user's input. What was saved is kept."""


@dataclass(frozen=True)
class Placement:
    """Workers of a run: their number, and what each is given."""

    num_workers: int
    cpus_per_worker: int
    use_gpu: bool


def check(config: TrainConfig) -> DataSet:
    """Everything that can be known before anything is taken or written. Raises ValueError, saying what to do."""
    start = checks.Start(config)
    for each in checks.BEFORE_PLACEMENT:
        each.look(start)
    assert start.data is not None
    return start.data


def resolve(config: TrainConfig) -> TrainConfig:
    """``config`` with absolute URLs: workers have other working directories. Raises ValueError for an unusable URL."""
    data = Storage(config.data).url if config.data else ""
    return replace(config, data=data, storage=Storage(config.storage).url if config.storage else "")


def outcome_of(config: TrainConfig) -> Outcome | None:
    """The outcome of a run that is done, without a look at data or cluster. Raises ValueError for a changed config."""
    if not config.storage or not config.name:
        return None
    with checks.reading_storage(config.storage):
        done = finished(run_storage(config))
        if done is not None:
            check_identity(run_storage(config), config, None)
    return done


def place(config: TrainConfig, cluster: Cluster) -> Placement:
    """Workers for this cluster. Raises ValueError where a fixed-size cluster has too few CPUs or GPUs."""
    p, batch = config.placement, config.batch
    use_gpu = cluster.gpus > 0 if p.use_gpu is None else p.use_gpu
    slots = _slots(cluster, use_gpu, max(1, p.cpus_per_worker))
    each = f", {p.cpus_per_worker} for each on one node" if p.cpus_per_worker > 1 else ""
    if p.num_workers > slots:
        kind = "GPUs" if use_gpu and p.num_workers > cluster.gpus else "CPUs"
        have = f"{cluster.gpus}" if kind == "GPUs" else f"{cluster.cpus}{each}"
        raise ValueError(
            f"{p.num_workers} workers need more {kind} than the cluster's {have}: lower --placement.num-workers "
            "(0 takes what is there)" + (" or --placement.cpus-per-worker" if each else "")
        )
    if slots < 1 and use_gpu and not cluster.gpus:
        raise ValueError("the cluster has no GPUs for a worker: start one with some, or change --placement.use-gpu")
    if slots < 1:
        raise ValueError(
            f"no node of the cluster has the CPUs for a worker{each}: start one with some, or lower "
            "--placement.cpus-per-worker"
        )
    num_workers = p.num_workers or max(
        n for n in range(1, slots + 1) if _can_share(n, batch.global_batch_size, batch.bn_group_size)
    )
    share_of(0, num_workers, batch.global_batch_size, batch.bn_group_size)
    cpus = p.cpus_per_worker
    if not cpus and use_gpu:
        cpus = max(1, min(node.cpus // node.gpus for node in cluster.nodes if node.gpus))
    elif not cpus:
        cpus = max(n for n in range(1, cluster.cpus + 1) if _slots(cluster, use_gpu, n) >= num_workers)
    return Placement(num_workers, cpus, use_gpu)


def _slots(cluster: Cluster, use_gpu: bool, cpus_per_worker: int) -> int:
    """Workers that fit, node by node."""
    if use_gpu:
        return sum(min(node.gpus, node.cpus // cpus_per_worker) for node in cluster.nodes)
    return sum(node.cpus // cpus_per_worker for node in cluster.nodes)


def run_job(config: TrainConfig, listen: Listener) -> Outcome:
    """Train ``config`` to the end on Ray; goes on from where the run stands, and returns at once if it is finished.

    ``listen`` takes the events of the run (``trainer.train``) in a thread of this process. Raises ValueError for what
    the user must mend, RunFailedError where the run could not be finished.
    """
    config = resolve(config)
    done = outcome_of(config)
    if done is not None:
        return done
    data, run = check(config), run_storage(config)
    with ray_session(config.placement.ray_address) as cluster:
        placement = place(config, cluster)
        attempt = _begin(config, data, run)
        listen({"kind": "placed", "workers": placement.num_workers, "gpu": placement.use_gpu, "attempt": attempt})
        return _fit(config, placement, run, attempt, listen)


def run_in_process_group(config: TrainConfig, listen: Listener) -> Outcome:
    """The same without Ray: this process is one worker of the group that torchrun's environment describes."""
    config = resolve(config)
    done = outcome_of(config)
    if done is not None:
        return done
    data, run = check(config), run_storage(config)
    if os.environ.get("RANK", "0") != "0" or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        trust_stores()  # the first process, or the first start, has reached them
    world = World.from_environment()
    try:
        share_of(world.rank, world.size, config.batch.global_batch_size, config.batch.bn_group_size)
        attempt = _begin(config, data, run) if world.is_first else 0
        if world.is_first:
            use_gpu = world.device.type == "cuda"
            listen({"kind": "placed", "workers": world.size, "gpu": use_gpu, "attempt": attempt})
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cpus = config.placement.cpus_per_worker or max(1, len(os.sched_getaffinity(0)) // local_size)
        with warnings_told(listen, world.rank):
            return train(config, world, attempt=attempt, cpus=cpus, emit=listen)
    finally:
        world.leave()


def _begin(config: TrainConfig, data: DataSet, run: Storage) -> int:
    """Fix the identity of a new run, and take the number of this start."""
    run.check_writable()
    fix_identity(run, config, data)
    return next_attempt(run, {"host": socket.gethostname(), "pid": os.getpid(), "time_s": int(time.time())})


def _fit(config: TrainConfig, placement: Placement, run: Storage, attempt: int, listen: Listener) -> Outcome:
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here).remote()
    resources: dict[str, float] = {"CPU": placement.cpus_per_worker}
    if placement.use_gpu:
        resources["GPU"] = 1
    ray_folder = f"ray/{attempt:06d}"
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "config": config.to_json(),
            "attempt": attempt,
            "cpus": placement.cpus_per_worker,
            "mailbox": mailbox,
        },
        scaling_config=ScalingConfig(
            num_workers=placement.num_workers, use_gpu=placement.use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(timeout_s=600),
        run_config=RunConfig(
            name=f"{attempt:06d}",
            **_ray_storage(run.sub("ray")),
            failure_config=FailureConfig(
                max_failures=config.guard.max_failures,
                controller_failure_limit=3,  # a fixed-size group that lost a node would else wait for ever
            ),
        ),
    )
    stop = threading.Event()

    def forward() -> None:
        while True:
            last_round = stop.is_set()
            events: list[Event] = []
            with suppress(ray.exceptions.RayError):
                events = ray.get(mailbox.take.remote())
            for event in events:
                with suppress(Exception):  # whatever goes wrong in showing the run must not end it
                    listen(event)
            if last_round:
                return
            stop.wait(_POLL_S)

    listener = threading.Thread(target=forward, name="events", daemon=True)
    listener.start()
    failure: Exception | None = None
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:  # what Ray's own SIGINT handler makes of Ctrl-C
        stop_waiting()
        raise KeyboardInterrupt from None
    except Exception as error:  # Ray wraps whatever a worker raised in types of its own
        failure = error
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        stop.set()
        listener.join(timeout=15)
        with suppress(OSError, ValueError):
            run.delete(ray_folder)
    refusal: tuple[bool, str] | None = None
    with suppress(ray.exceptions.RayError):  # the cluster itself may be gone
        refusal = ray.get(mailbox.refusal.remote())
    if refusal is not None:
        is_users, reason = refusal
        raise ValueError(reason) if is_users else SupersededError(reason)
    outcome = finished(run)
    if outcome is None:
        raise RunFailedError(
            f"run {config.name!r} stopped before its end"
            + (f" ({_cause(failure)})" if failure else "")
            + "; its checkpoints are kept: the same command goes on from the newest"
        ) from failure
    return outcome


class Mailbox:
    """The actor between rank 0 and the driver: events one way, the refusal to go on the other."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._refusal: tuple[bool, str] | None = None

    def put(self, events: list[Event]) -> None:
        self._events += events

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def refuse(self, is_users: bool, reason: str) -> None:
        """Trying again is no use: the user has something to mend, or another driver owns the run."""
        self._refusal = self._refusal or (is_users, reason)

    def refusal(self) -> tuple[bool, str] | None:
        return self._refusal


def _work(settings: dict[str, Any]) -> None:
    """A worker of the group that Ray Train has made."""
    import ray
    from ray.train.torch import get_device

    mailbox = settings["mailbox"]
    if ray.get(mailbox.refusal.remote()) is not None:
        return  # restarted after trying again was found to be no use
    config = TrainConfig.from_json(settings["config"])
    device = get_device() if config.placement.use_gpu is not False else "cpu"
    world = World.from_process_group(device)
    trust_stores()  # the driver has reached them

    def emit(event: Event) -> None:
        mailbox.put.remote([event])

    try:
        with warnings_told(emit, world.rank):
            train(config, world, attempt=settings["attempt"], cpus=settings["cpus"], emit=emit)
    except (ValueError, SupersededError) as error:
        ray.get(mailbox.refuse.remote(isinstance(error, ValueError), str(error)))
        raise
    except Exception as error:
        text = f"worker {world.rank} failed ({type(error).__name__}: {_cause(error)}); all workers start again"
        ray.get(mailbox.put.remote([notice(text)]))
        raise


def _can_share(num_workers: int, global_batch_size: int, bn_group_size: int) -> bool:
    try:
        share_of(0, num_workers, global_batch_size, bn_group_size)
    except ValueError:
        return False
    return True


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
    """The last line of a worker's error: Ray's text holds whole tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
