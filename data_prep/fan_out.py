"""The same function over many items: in this process, or as Ray tasks on all machines of a cluster."""

from __future__ import annotations

import functools
import logging
import os
import queue
import resource
import secrets
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def ray_session(address: str | None = None, num_cpus: int | None = None) -> Iterator[int]:
    """A connection to the Ray cluster at ``address`` or RAY_ADDRESS, else to one started here; yields its CPU count.

    The machines of a cluster that is joined have this project installed, or in the job's working directory. A process
    that is connected already stays so. Raises ValueError where the cluster cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
        settings = {"RAY_USAGE_STATS_ENABLED": "0"}
        if not address:
            # Started processes inherit it; the project need not be installed.
            path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            settings["PYTHONPATH"] = os.pathsep.join(path)
            if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
                # Else ray.init makes one that the whole machine can read. A cluster that is joined has its own.
                settings["RAY_AUTH_TOKEN_PATH"] = f"{folder}/token"
                with os.fdopen(os.open(f"{folder}/token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
                    stream.write(_token())
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            # Ray reads some of its settings when it is imported.
            import ray

            if ray.is_initialized():
                yield int(ray.cluster_resources().get("CPU", 1))
                return
            if address:
                _check_reachable(address)
            quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
            # object_store_memory: nothing large passes through it
            start = {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": 100 << 20}
            try:
                ray.init(**({"address": address} if address else start), **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                where = f"the Ray cluster at {address}" if address else "a local Ray cluster"
                raise ValueError(f"{where} cannot be used: {error} (--num-tasks 0 works without Ray)") from None
            try:
                yield int(ray.cluster_resources().get("CPU", 1))
            finally:
                ray.shutdown()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@functools.cache
def _token() -> str:
    """One for all sessions of this process: Ray reads the token once and keeps it."""
    return secrets.token_hex(32)


def _check_reachable(address: str) -> None:
    """Ray itself tries for more than a minute. Raises ValueError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ValueError(f"no Ray cluster answers at {address} ({error}): --num-tasks 0 works without") from None


def fan_out(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    beside: Sequence[Item] = (),
    num_tasks: int | None,
    ray_address: str | None = None,
) -> Iterator[tuple[Item, Result, int]]:
    """(item, ``function(item)``, peak memory in bytes of the process that computed it), in the order of completion.

    ``num_tasks``: 0 or 1 for this process, without Ray; None for as many Ray tasks at once as the cluster has CPUs.
    ``beside``: long items of the same kind that mostly wait for their input; they run beside the others, in a thread
    or as tasks of their own. ValueError and OSError of the function arrive as ValueError with the same message.
    """
    if num_tasks is not None and num_tasks <= 1:
        yield from _in_process(function, items, beside)
        return
    with ray_session(ray_address, num_tasks) as num_cpus:
        yield from _in_ray(function, items, beside, num_tasks or num_cpus)


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far, in bytes."""
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


class _Failure:
    """A message for the user, instead of a result."""

    def __init__(self, message: str) -> None:
        self.message = message


def _guarded(function: Callable[[Item], Result], item: Item) -> tuple[Result | _Failure, int]:
    try:
        return function(item), peak_rss_bytes()
    except ValueError as error:
        return _Failure(str(error)), peak_rss_bytes()
    except OSError as error:
        return _Failure(f"{type(error).__name__}: {error}"), peak_rss_bytes()


def _in_process(
    function: Callable[[Item], Result], items: Sequence[Item], beside: Sequence[Item]
) -> Iterator[tuple[Item, Result, int]]:
    finished: queue.Queue[tuple[Item, tuple[Result | _Failure, int] | BaseException]] = queue.Queue()

    def work() -> None:
        for item in beside:
            try:
                finished.put((item, _guarded(function, item)))
            except BaseException as error:
                finished.put((item, error))
                return

    # A daemon: an error or Ctrl-C in the main thread must not wait for the MD5 of 140 GB.
    threading.Thread(target=work, daemon=True).start()
    for item in items:
        yield _unpacked(item, _guarded(function, item))
    for _ in beside:
        item, outcome = finished.get()
        if isinstance(outcome, BaseException):
            raise outcome
        yield _unpacked(item, outcome)


def _in_ray(
    function: Callable[[Item], Result], items: Sequence[Item], beside: Sequence[Item], num_tasks: int
) -> Iterator[tuple[Item, Result, int]]:
    import ray

    # Units are idempotent: Ray may run one again when its machine is lost.
    task = ray.remote(max_retries=3, num_cpus=1)(_guarded)
    running = {task.options(num_cpus=0).remote(function, item): item for item in beside}
    waiting = list(reversed(items))
    while running or waiting:
        while waiting and len(running) < num_tasks + len(beside):
            item = waiting.pop()
            running[task.remote(function, item)] = item
        # A timeout keeps Ctrl-C prompt.
        done, _ = ray.wait(list(running), num_returns=1, timeout=0.5)
        for reference in done:
            item = running.pop(reference)
            try:
                outcome = ray.get(reference)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().split("\n")[-1]
                raise ValueError(f"a Ray task failed ({type(error).__name__}: {reason}): run again to go on") from None
            yield _unpacked(item, outcome)


def _unpacked(item: Item, outcome: tuple[Result | _Failure, int]) -> tuple[Item, Result, int]:
    result, peak_bytes = outcome
    if isinstance(result, _Failure):
        raise ValueError(result.message)
    return item, result, peak_bytes
