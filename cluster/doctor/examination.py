"""Asks every node of a connected Ray cluster, each question bounded in time, and gathers what it means."""

from __future__ import annotations

import functools
import itertools
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cluster.doctor import judgement, node
from cluster.doctor.judgement import Finding, Offer, Outcome
from orchestrator.storage import Storage

_DRIVER, _HERE = "driver", "this machine"  # its file in a storage, and how it is called
_NUM_CLOCK_READINGS = 5
_LEAST_S = 5.0  # for what comes before or after the questions that were given their time


class CheckName(Enum):
    """What is looked at, in this order. The nodes themselves (versions, machine, token, network) always are."""

    GPUS = "gpus"
    CLOCK = "clock"
    DALI = "dali"
    ALL_REDUCE = "all-reduce"
    STORAGE = "storage"
    MLFLOW = "mlflow"
    DATA = "data"


@dataclass(frozen=True)
class Request:
    """What a campaign would use; "" for what it would not."""

    storage: str = ""
    data: str = ""
    tracking_uri: str = ""
    timeout_s: float = 120.0  # of each question, to all nodes at once
    checks: tuple[CheckName, ...] = tuple(CheckName)


@dataclass(frozen=True)
class Trouble:
    """Instead of an answer: why there is none."""

    text: str


def examine(request: Request) -> Iterator[Finding]:
    """All findings, as they come. Ray is connected. Never raises for what a node or a service does."""
    try:
        examination = _Examination(request)
    except Exception as error:
        yield _failed("ray", "", error)
        return
    yield from examination.findings()


class _Examination:
    def __init__(self, request: Request) -> None:
        import ray

        self._request = request
        alive = sorted((each for each in ray.nodes() if each["Alive"]), key=_head_first)
        counts = itertools.groupby(sorted(each["NodeManagerAddress"] for each in alive))
        several = {address for address, group in counts if len(list(group)) > 1}
        self._offers: dict[str, Offer] = {}  # by Ray's id of the node
        for each in alive:
            address, node_id = each["NodeManagerAddress"], each["NodeID"]
            where = f"{address} ({node_id[:6]})" if address in several else address
            resources = each["Resources"]
            self._offers[node_id] = Offer(where, address, int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))
        self._facts: dict[str, node.Facts] = {}

    def findings(self) -> Iterator[Finding]:
        yield from self._guarded("nodes", self._nodes)
        if not self._facts:
            return
        checks: dict[CheckName, Callable[[], Iterator[Finding]]] = {
            CheckName.GPUS: self._gpus,
            CheckName.CLOCK: self._clock,
            CheckName.DALI: self._dali,
            CheckName.ALL_REDUCE: self._all_reduce,
            CheckName.STORAGE: self._storage,
            CheckName.MLFLOW: self._mlflow,
            CheckName.DATA: self._data,
        }
        for name, check in checks.items():
            if name in self._request.checks:
                yield from self._guarded(name.value, check)

    def _guarded(self, name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
        try:
            yield from check()
        except Exception as error:  # this check's failure: those that follow are still made
            yield _failed(name, "", error)

    # -- the checks -------------------------------------------------------------------------------------------------

    def _nodes(self) -> Iterator[Finding]:
        here, is_open = node.versions(), not _has_token()
        answers = self._ask(dict.fromkeys(self._offers, ()), node.facts)
        for node_id, found in answers.items():
            offer = self._offers[node_id]
            if isinstance(found, Trouble):
                advice = "it cannot take part: its raylet.out and worker logs, or `ray status`"
                if "ModuleNotFoundError" in found.text or "failed to import" in found.text:
                    advice = (
                        "the project and its packages are not there: the same checkout at the same path, or PYTHONPATH"
                    )
                yield Finding("nodes", offer.where, Outcome.FAILS, found.text, advice)
                continue
            self._facts[node_id] = found
            yield judgement.versions(here, found.versions, offer.where)
            yield judgement.machine(found, offer)
            yield judgement.network(found, offer)
            if not is_open:
                yield judgement.token(found, offer.where, is_open=False)
        if is_open:
            yield judgement.token(node.facts(), "", is_open=True)
        yield from self._dashboard()

    def _dashboard(self) -> Iterator[Finding]:
        from ray._private.worker import get_dashboard_url

        url = (get_dashboard_url() or "").removeprefix("http://")
        addresses: list[str] = []
        head = next(iter(self._offers))
        if url and head in self._facts:
            (found,) = self._ask({head: (int(url.rpartition(":")[2]),)}, node.listening).values()
            addresses = [] if isinstance(found, Trouble) else found
            if isinstance(found, list) and not found:
                url = ""  # Ray tells an address even where it has started none
        yield judgement.dashboard(url, addresses)

    def _gpus(self) -> Iterator[Finding]:
        with_gpus = {node_id: () for node_id in self._facts if self._offers[node_id].gpus}
        answers = self._ask(with_gpus, node.visible_gpus, lambda offer: offer.gpus)
        for node_id, facts in self._facts.items():
            offer, seen = self._offers[node_id], answers.get(node_id, [])
            if isinstance(seen, Trouble):
                advice = "something else may hold them (`ray status`): end it, and ask again"
                yield Finding("gpus", offer.where, Outcome.FAILS, seen.text, advice)
            else:
                yield judgement.gpus(facts, offer, seen)

    def _clock(self) -> Iterator[Finding]:
        best: dict[str, tuple[float, float]] = {}
        for _ in range(_NUM_CLOCK_READINGS):
            for node_id in self._facts:
                before_s = node.now_s()
                (found,) = self._ask({node_id: ()}, node.now_s).values()
                after_s = node.now_s()
                if not isinstance(found, Trouble):
                    bound_s = (after_s - before_s) / 2
                    reading = bound_s, found - before_s - bound_s
                    best[node_id] = min(best.get(node_id, reading), reading)
        for node_id in self._facts:
            where = self._offers[node_id].where
            if node_id in best:
                bound_s, offset_s = best[node_id]
                yield judgement.clock(offset_s, bound_s, where)
            else:
                yield Finding("clock", where, Outcome.FAILS, "it did not answer", "ask again; `ray status`")

    def _dali(self) -> Iterator[Finding]:
        advice = "DALI does not work there: the version in constraints.txt; for a GPU a driver for CUDA 13"
        for device in ("cpu", "cuda"):
            has = {n: (device,) for n in self._facts if device == "cpu" or self._offers[n].gpus}
            num_gpus = int(device == "cuda")
            answers = self._ask(has, node.decode, functools.partial(_always, num_gpus))
            for node_id, found in answers.items():
                where = self._offers[node_id].where
                if isinstance(found, Trouble):
                    yield Finding("dali", where, Outcome.FAILS, f"{device}: {found.text}", advice)
                else:
                    yield judgement.decoder(found, device, where)

    def _all_reduce(self) -> Iterator[Finding]:
        places, use_gpu = judgement.ranks({each: self._offers[each].gpus for each in self._facts})
        size, nodes = len(places), set(places)
        if not use_gpu and any(self._offers[each].gpus for each in nodes):
            measured = "NCCL was not tested: the cluster has one GPU, and a sum takes two"
            yield Finding("all-reduce", "", Outcome.SKIPPED, measured)
        host = self._offers[places[0]].address
        (port,) = self._ask({places[0]: ()}, node.free_port).values()
        if isinstance(port, Trouble):
            yield Finding("all-reduce", self._offers[places[0]].where, Outcome.FAILS, port.text, "`ray status`")
            return
        # The process group gives up first: it says more.
        timeout_s = max(1.0, self._request.timeout_s / 2)
        calls = [(each, (host, port, rank, size, use_gpu, timeout_s)) for rank, each in enumerate(places)]
        answers = self._ask_each(calls, node.all_reduce, functools.partial(_always, int(use_gpu)))
        backend, over = "NCCL" if use_gpu else "gloo", f"{len(nodes)} nodes" if len(nodes) > 1 else "2 processes"
        troubles = [(where, each) for where, each in zip(places, answers, strict=True) if isinstance(each, Trouble)]
        for node_id, trouble in troubles:
            facts = self._facts[node_id]
            variable = "NCCL_SOCKET_IFNAME" if use_gpu else "GLOO_SOCKET_IFNAME"
            advice = (
                f"workers do not meet ({backend} at {host}): open all TCP ports between the nodes, and set {variable} "
                f"to an interface that they share (of {', '.join(facts.interfaces)}) before ray start"
            )
            yield Finding("all-reduce", self._offers[node_id].where, Outcome.FAILS, trouble.text, advice)
        if not troubles:
            yield judgement.reduction(answers, backend, over)

    def _storage(self) -> Iterator[Finding]:
        if not self._request.storage:
            yield Finding("storage", "", Outcome.SKIPPED, "no storage was named", "--storage URL or IMAGENET_STORAGE")
            return
        url = Storage(self._request.storage).url
        folder = f".tmp-doctor-{secrets.token_hex(8)}"
        is_there, advice = (
            True,
            "the folder must exist and be writable on every node; a bucket's settings on all of them",
        )
        try:
            own = self._here(node.write_storage, url, folder, _DRIVER)
            is_there = not isinstance(own, Trouble)
            calls = {node_id: (url, folder, node_id) for node_id in self._facts}
            written = {_DRIVER: own, **self._ask(calls, node.write_storage)}
            names = [each for each, answer in written.items() if not isinstance(answer, Trouble)]
            readers = {each: (url, folder, names) for each in names if each != _DRIVER}
            seen = self._ask(readers, node.read_storage)
            if is_there:
                seen[_DRIVER] = self._here(node.read_storage, url, folder, names)
        finally:
            self._here(node.clear_storage, url, folder)
            self._ask(dict.fromkeys(self._facts, (url, folder)), node.clear_storage)
        called = {_DRIVER: _HERE} | {node_id: offer.where for node_id, offer in self._offers.items()}
        for answers in (written, seen):
            for each, answer in answers.items():
                if isinstance(answer, Trouble):
                    yield Finding("storage", called[each], Outcome.FAILS, answer.text, advice)
        failed = {called[each] for answers in (written, seen) for each in answers if isinstance(answers[each], Trouble)}
        found = {called[each]: written[each] for each in names}
        unseen = {called[each]: [called[name] for name in seen[each]] for each in names if called[each] not in failed}
        yield from judgement.storage(found, unseen, url, failed)

    def _mlflow(self) -> Iterator[Finding]:
        from orchestrator.control import tracking
        from orchestrator.masking import masked

        uri = self._request.tracking_uri
        if not uri:
            hint = "--tracking-uri URI or MLFLOW_TRACKING_URI"
            yield Finding("mlflow", "", Outcome.SKIPPED, "no tracking URI was given", hint)
            return
        found = self._here(tracking.check, uri)
        if isinstance(found, Trouble):
            yield Finding("mlflow", "", Outcome.FAILS, found.text, "as it says; a start would be refused")
        elif found:
            advice = (
                "training goes on without it, and what is missing arrives later: start the server, or correct the URI"
            )
            yield Finding("mlflow", "", Outcome.WARNING, found, advice)
        else:
            yield Finding("mlflow", "", Outcome.OK, masked(uri))

    def _data(self) -> Iterator[Finding]:
        if not self._request.data:
            yield Finding("data", "", Outcome.SKIPPED, "no data set was named", "--data URL or IMAGENET_DATA")
            return
        url, found = Storage(self._request.data).url, {}
        for node_id, each in self._ask(dict.fromkeys(self._facts, (url,)), node.read_data).items():
            where = self._offers[node_id].where
            if isinstance(each, Trouble):
                advice = "every node reads the data set itself: mount it there at the same path, or give a bucket"
                yield Finding("data", where, Outcome.FAILS, each.text, advice)
            else:
                found[where] = each
        yield from judgement.data(found)

    # -- asking -----------------------------------------------------------------------------------------------------

    def _ask(
        self,
        calls: dict[str, tuple[Any, ...]],
        function: Callable[..., Any],
        gpus: Callable[[Offer], int] = lambda _: 0,
    ) -> dict[str, Any]:
        """``function`` on several nodes at once, with the arguments of each: its result by node, or a Trouble."""
        return dict(zip(calls, self._ask_each(list(calls.items()), function, gpus), strict=True))

    def _ask_each(
        self,
        calls: Sequence[tuple[str, tuple[Any, ...]]],
        function: Callable[..., Any],
        gpus: Callable[[Offer], int],
    ) -> list[Any]:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.remote(num_cpus=0, max_retries=0)(function)
        refs = []
        for node_id, arguments in calls:
            pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
            num_gpus = gpus(self._offers[node_id])
            refs.append(task.options(scheduling_strategy=pinned, num_gpus=num_gpus).remote(*arguments))
        if not refs:
            return []
        done, late = ray.wait(refs, num_returns=len(refs), timeout=self._request.timeout_s)
        for ref in late:
            ray.cancel(ref, force=True)
        return [self._answer(ref) if ref in done else Trouble(self._silence()) for ref in refs]

    def _answer(self, ref: Any) -> Any:
        import ray

        try:
            return ray.get(ref, timeout=_LEAST_S)
        except ray.exceptions.RayTaskError as error:
            return Trouble(_one_line(error.cause))
        except ray.exceptions.RayError as error:
            return Trouble(_one_line(error))

    def _here(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """As ``_ask``, in this process: a mount that hangs takes a thread with it, not the doctor."""
        answers: list[Any] = []

        def answer() -> None:
            try:
                answers.append(function(*arguments))
            except Exception as error:
                answers.append(Trouble(_one_line(error)))

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        thread.join(self._request.timeout_s)
        return answers[0] if answers else Trouble(self._silence())

    def _silence(self) -> str:
        return f"no answer within {self._request.timeout_s:g} s (--timeout-s)"


def _head_first(each: dict[str, Any]) -> tuple[bool, str, str]:
    return "node:__internal_head__" not in each["Resources"], each["NodeManagerAddress"], each["NodeID"]


def _always(number: int, _: Offer) -> int:
    return number


def _has_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _one_line(error: BaseException | None) -> str:
    from orchestrator.control.mlflow_store import first_line

    lines = [line for line in str(error).splitlines() if line.strip()]
    text = first_line(lines[0]) if lines else ""
    last = first_line(lines[-1]) if len(lines) > 1 and "Error" in lines[-1] else ""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return f"{kind}{text}{f' … {last}' if last else ''}"


def _failed(check: str, where: str, error: Exception) -> Finding:
    return Finding(check, where, Outcome.FAILS, _one_line(error), "this check could not be made: what is told is why")
