"""The same function over many items: in this process, or as Ray tasks on all machines of a cluster."""

from __future__ import annotations

import contextlib
import queue
import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

from orchestrator.ray_session import ray_session
from orchestrator.remote import StoreUnreachableError, trust_stores

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    or as tasks of their own. ValueError and StoreUnreachableError of the function arrive as such; any other OSError,
    and the loss of a task, as an OSError without errno, whose message is for the user.
    """
    if num_tasks is not None and num_tasks <= 1:
        yield from _in_process(function, items, beside)
        return
    with ray_session(ray_address, num_tasks) as cluster:
        yield from _in_ray(function, items, beside, num_tasks or cluster.cpus)


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far, in bytes."""
    with contextlib.suppress(OSError, StopIteration):
        # Linux's getrusage counts what the process that started this one held.
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


class _Failure:
    """The message of a ValueError, instead of a result."""

    def __init__(self, message: str) -> None:
        self.message = message


Outcome: TypeAlias = Result | _Failure | OSError


def _guarded(function: Callable[[Item], Result], item: Item) -> tuple[Outcome[Result], int]:
    # Exceptions of other libraries may not survive the way to another process.
    try:
        return function(item), peak_rss_bytes()
    except ValueError as error:
        return _Failure(str(error)), peak_rss_bytes()
    except StoreUnreachableError as error:
        return StoreUnreachableError(str(error)), peak_rss_bytes()
    except OSError as error:
        return OSError(f"{type(error).__name__}: {error}"), peak_rss_bytes()


def _in_task(function: Callable[[Item], Result], item: Item) -> tuple[Outcome[Result], int]:
    trust_stores()  # the driver has reached them
    return _guarded(function, item)


def _in_process(
    function: Callable[[Item], Result], items: Sequence[Item], beside: Sequence[Item]
) -> Iterator[tuple[Item, Result, int]]:
    finished: queue.Queue[tuple[Item, tuple[Outcome[Result], int] | BaseException]] = queue.Queue()

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
    task = ray.remote(max_retries=3, num_cpus=1)(_in_task)
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
                raise OSError(f"a Ray task failed ({type(error).__name__}: {reason})") from None
            yield _unpacked(item, outcome)


def _unpacked(item: Item, outcome: tuple[Outcome[Result], int]) -> tuple[Item, Result, int]:
    result, peak_bytes = outcome
    if isinstance(result, OSError):
        raise result
    if isinstance(result, _Failure):
        raise ValueError(result.message)
    return item, result, peak_bytes
