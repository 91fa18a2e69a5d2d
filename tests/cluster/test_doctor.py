"""The doctor on a real cluster of two raylets: everything in order, and each failure for real; what it judges, pure."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.doctor import examination, judgement, node
from cluster.doctor.judgement import Finding, Offer, Outcome
from cluster.raylets import LocalCluster
from orchestrator.world import World
from tests.mlflow_server import free_port

ROOT = Path(__file__).parents[2]

# Several examinations over one connection: each is a list of options, each answer a JSON object.
SEVERAL = """
import json, sys
from cluster.doctor.__main__ import main
from orchestrator.ray_session import ray_session
address = sys.argv[1]
with ray_session(address):
    for options in json.loads(sys.argv[2]):
        main(["--ray-address", address, "--json", *options])
        print("NEXT", flush=True)
"""


def doctor(
    *arguments: str, script: str = "", environment: Mapping[str, str] = {}, folder: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "IMAGENET_", "MLFLOW_TRACKING"))}
    command = [sys.executable, *(("-c", script) if script else ("-m", "cluster.doctor")), *arguments]
    return subprocess.run(
        command,
        env=plain | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"} | dict(environment),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def findings_of(answer: str) -> list[Finding]:
    found = json.loads(answer)["findings"]
    return [Finding(**each | {"outcome": Outcome(each["outcome"])}) for each in found]


def of(findings: list[Finding], check: str) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as cluster:
        cluster.add(1)
        cluster.add(1)
        yield cluster


@pytest.mark.ray_cluster
def test_a_cluster_in_order(cluster: LocalCluster, prepared: Path, tmp_path: Path) -> None:
    options = ["--ray-address", cluster.address, "--storage", str(tmp_path), "--data", str(prepared)]
    options += ["--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db", "--json"]
    done = doctor(*options, environment=cluster.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    findings = findings_of(done.stdout)
    assert answer["can_start"]
    # The machine itself may be full or its name unknown; the rest is this test's own.
    for check in ("ray", "versions", "token", "dashboard", "clock", "dali", "all-reduce", "storage", "mlflow", "data"):
        assert {finding.outcome for finding in of(findings, check)} == {Outcome.OK}, check
    for check in ("versions", "machine", "network", "token", "gpus", "clock", "dali", "data"):
        assert len({finding.where for finding in of(findings, check)}) == 2, check
    assert {finding.where for finding in of(findings, "storage")} > {"this machine"}
    assert "2 nodes" in of(findings, "all-reduce")[0].measured
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.ray_cluster
def test_what_fails_is_told_and_the_rest_is_looked_at(cluster: LocalCluster, prepared: Path, tmp_path: Path) -> None:
    """Storage that is missing, read-only, or the driver's alone; no data set; MLflow away or impossible; a token file
    that others can read."""
    own = tmp_path / "store"
    own.mkdir()
    few = ["--checks", "storage", "mlflow", "data"]
    runs = [
        [*few, "--storage", str(tmp_path / "missing"), "--data", str(tmp_path), "--tracking-uri", "sqlite:////no/m.db"],
        [*few, "--storage", "/proc/sys", "--tracking-uri", f"http://127.0.0.1:{free_port()}"],
        # The working directory of whoever looks: the driver's holds the store, the nodes' does not.
        [*few, "--storage", "/proc/self/cwd/store", "--data", str(prepared)],
        [*few],
    ]
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"])
    token.chmod(0o644)
    try:
        done = doctor(
            cluster.address, json.dumps(runs), script=SEVERAL, environment=cluster.environment, folder=tmp_path
        )
    finally:
        token.chmod(0o600)
    assert done.returncode == 0, done.stderr
    missing, read_only, elsewhere, nothing = map(findings_of, done.stdout.split("NEXT\n")[:-1])

    fails = [(f.check, f.where == "this machine") for f in missing if f.outcome is Outcome.FAILS]
    assert fails == [("storage", True), *[("storage", False)] * 2, ("mlflow", False), *[("data", False)] * 2]
    assert f"this machine has no folder {tmp_path}/missing" in of(missing, "storage")[0].measured
    assert "no prepared data set" in of(missing, "data")[0].measured
    assert "the folder /no does not exist" in of(missing, "mlflow")[0].measured
    assert not (tmp_path / "missing").exists()

    assert {f.outcome for f in of(read_only, "storage")} == {Outcome.FAILS}
    assert "cannot be written" in of(read_only, "storage")[0].measured
    assert [f.outcome for f in of(read_only, "mlflow")] == [Outcome.WARNING]  # training goes on without it

    assert [f.outcome for f in of(elsewhere, "storage") if f.where == "this machine"] == [Outcome.OK]
    assert [f.outcome for f in of(elsewhere, "storage") if f.where != "this machine"] == [Outcome.FAILS] * 2
    assert {f.outcome for f in of(elsewhere, "data")} == {Outcome.OK}
    assert list(own.iterdir()) == []

    asked = {f.check: f.advice for f in nothing if f.outcome is Outcome.SKIPPED}
    assert asked.keys() == {"storage", "mlflow", "data"}
    assert "--storage" in asked["storage"]
    assert {(f.outcome, f.measured[-4:]) for f in of(nothing, "token")} == {(Outcome.WARNING, "0644")}


@pytest.mark.ray_cluster
@pytest.mark.skipif("TEST_CLUSTER" not in os.environ, reason="Ray tries for 20 s with it: make test-cluster")
def test_another_token_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    environment = cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(token)}
    done = doctor("--ray-address", cluster.address, environment=environment)
    assert done.returncode == 1, done.stderr
    assert "RAY_AUTH_TOKEN_PATH" in done.stdout
    assert done.stdout.endswith("a campaign cannot start: 1 fails\n")


def test_no_cluster_and_no_sense() -> None:
    nobody = doctor("--ray-address", f"127.0.0.1:{free_port()}", "--json")
    assert nobody.returncode == 1
    assert "no Ray cluster answers" in findings_of(nobody.stdout)[0].measured
    assert doctor("--timeout-s", "0").returncode == 2
    assert doctor("--checks", "feelings").returncode == 2


def test_a_rendezvous_that_nobody_comes_to_is_left() -> None:
    with pytest.raises(RuntimeError):
        node.all_reduce("127.0.0.1", free_port(), rank=1, size=2, use_gpu=False, timeout_s=1)
    with pytest.raises(RuntimeError):
        node.all_reduce("127.0.0.1", free_port(), rank=0, size=2, use_gpu=False, timeout_s=1)


class Together:
    """Stands in for a process group, one rank of it at a time: ``total`` is its first sum, None: it fails."""

    def __init__(self, total: torch.Tensor | None) -> None:
        self.given: list[torch.Tensor] = []
        self._total = total

    def sum_(self, tensor: torch.Tensor) -> None:
        self.given.append(tensor.clone())
        if self._total is None:
            raise RuntimeError("nobody is met")
        if len(self.given) == 1:
            tensor.copy_(self._total)

    def barrier(self) -> None:
        pass

    leave = barrier


def test_a_sum_of_ten_thousand_ranks_is_exact_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 10_000

    def reduce(rank: int, world: Together) -> float:
        monkeypatch.setattr(World, "from_address", lambda *arguments: world)
        return node.all_reduce("127.0.0.1", 1, rank, size, use_gpu=False, timeout_s=1, nbytes=4 * 251).deviation

    def given_by(rank: int) -> torch.Tensor:
        world = Together(None)
        with pytest.raises(RuntimeError, match="nobody is met"):
            reduce(rank, world)
        return world.given[0]

    monkeypatch.setattr("orchestrator.control.interface.choose_interface", lambda: None)
    given = torch.stack([given_by(rank) for rank in range(size)])
    assert given.dtype == torch.float32
    assert not torch.equal(given[0], given[1])  # a rank that is counted twice does not go unnoticed
    one_by_one = torch.zeros(251)
    for each in given:
        one_by_one += each
    for total in (one_by_one, given.sum(0)):
        assert reduce(7, Together(total)) == 0
    one_by_one[250] += 1
    assert reduce(7, Together(one_by_one)) == 1


# -- what is judged ---------------------------------------------------------------------------------------------------

VERSIONS = {"Python": "3.12.1", "Ray": "2.60.0", "torch": "2.13.0", "DALI": "2.4.0", "sources": "abc"}
FACTS = node.Facts(
    hostname="n1",
    versions=VERSIONS,
    cpus=8,
    memory_bytes=64 << 30,
    available_bytes=60 << 30,
    shm_bytes=8 << 30,
    gpu_devices=2,
    cache_folder="/tmp/cache",
    disk_bytes=1 << 40,
    disk_free_bytes=1 << 39,
    interfaces={"lo": ("127.0.0.1",), "eth0": ("192.168.0.1",), "ib0": ("10.0.0.1",)},
    gloo_interface="",
    nccl_interface="",
    token_file="/home/u/.ray/token",
    token_mode=0o600,
)
OFFER = Offer("10.0.0.1", "10.0.0.1", cpus=8, gpus=2)


def changed(**fields: Any) -> node.Facts:
    return dataclasses.replace(FACTS, **fields)


def test_versions() -> None:
    assert judgement.versions(VERSIONS, VERSIONS, "n").outcome is Outcome.OK
    other = judgement.versions(VERSIONS, VERSIONS | {"torch": "2.12.0"}, "n")
    assert (other.outcome, other.measured) == (Outcome.FAILS, "torch 2.12.0, here 2.13.0")
    without = {name: version for name, version in VERSIONS.items() if name != "DALI"}
    assert judgement.versions(VERSIONS, without, "n").measured == "DALI none, here 2.4.0"


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({}, ""),
        ({"cpus": 4}, "ray start --num-cpus 4"),
        ({"available_bytes": 1 << 30}, "Ray kills workers"),
        ({"shm_bytes": 64 << 20}, "--shm-size"),
        ({"disk_free_bytes": 1 << 30}, "TMPDIR"),
    ],
)
def test_a_machine(fields: dict[str, Any], advice: str) -> None:
    found = judgement.machine(changed(**fields), OFFER)
    assert found.outcome is (Outcome.WARNING if fields else Outcome.OK)
    assert advice in found.advice
    assert bool(found.advice) == bool(fields)


@pytest.mark.parametrize(
    ("fields", "outcome", "advice"),
    [
        ({}, Outcome.OK, ""),
        ({"gloo_interface": "ib0"}, Outcome.OK, ""),
        ({"gloo_interface": "eth1"}, Outcome.FAILS, "none of lo, eth0, ib0"),
        ({"gloo_interface": "eth0"}, Outcome.WARNING, "is it meant"),
        ({"nccl_interface": "ib"}, Outcome.OK, ""),
        ({"nccl_interface": "=ib0"}, Outcome.OK, ""),
        ({"nccl_interface": "=ib"}, Outcome.FAILS, "NCCL_SOCKET_IFNAME names none"),
        ({"nccl_interface": "^lo,eth"}, Outcome.OK, ""),
    ],
)
def test_a_network(fields: dict[str, Any], outcome: Outcome, advice: str) -> None:
    found = judgement.network(changed(**fields), OFFER)
    assert found.outcome is outcome
    assert "=" not in found.measured
    assert advice in found.advice


def test_gpus() -> None:
    assert judgement.gpus(FACTS, OFFER, ["H100", "H100"]).measured == "2: H100"
    assert judgement.gpus(FACTS, OFFER, ["H100"]).outcome is Outcome.FAILS
    assert judgement.gpus(FACTS, dataclasses.replace(OFFER, gpus=0), []).outcome is Outcome.WARNING
    assert judgement.gpus(changed(gpu_devices=0), dataclasses.replace(OFFER, gpus=0), []).outcome is Outcome.OK


@pytest.mark.parametrize(
    ("offset_s", "bound_s", "outcome"),
    [
        (0.5, 0.01, Outcome.OK),
        (-1.5, 0.01, Outcome.WARNING),
        (1.5, 0.6, Outcome.OK),  # it may have been the way there
        (-301.0, 0.01, Outcome.FAILS),
    ],
)
def test_a_clock(offset_s: float, bound_s: float, outcome: Outcome) -> None:
    assert judgement.clock(offset_s, bound_s, "n").outcome is outcome


def test_who_may_use_the_cluster() -> None:
    assert judgement.token(FACTS, "n", is_open=False).outcome is Outcome.OK
    assert "chmod 600" in judgement.token(changed(token_mode=0o640), "n", is_open=False).advice
    assert judgement.token(FACTS, "n", is_open=True).outcome is Outcome.WARNING
    assert judgement.dashboard("127.0.0.1:8265", ["127.0.0.1"]).outcome is Outcome.OK
    assert judgement.dashboard("10.0.0.1:8265", ["0.0.0.0"]).outcome is Outcome.WARNING
    assert judgement.dashboard("10.0.0.1:8265", []).outcome is Outcome.WARNING


@pytest.mark.parametrize(
    ("gpus", "places", "use_gpu"),
    [
        ({"head": 0, "a": 8, "b": 8}, ["a", "b"], True),
        ({"head": 0, "a": 2}, ["a", "a"], True),
        ({"a": 1, "b": 1}, ["a", "b"], True),
        ({"head": 0, "a": 1}, ["head", "a"], False),
        ({"a": 1}, ["a", "a"], False),
        ({"a": 0, "b": 0, "c": 0}, ["a", "b", "c"], False),
        ({"a": 0}, ["a", "a"], False),
    ],
)
def test_who_adds_up(gpus: dict[str, int], places: list[str], use_gpu: bool) -> None:
    assert judgement.ranks(gpus) == (places, use_gpu)


@pytest.mark.parametrize(
    ("gpus", "told"),
    [
        ((0, 8, 8), [(Outcome.OK, "NCCL, 2 nodes: ")]),
        ((0, 1), [(Outcome.SKIPPED, "NCCL was not tested"), (Outcome.OK, "gloo, 2 nodes: ")]),
        ((4,), [(Outcome.OK, "NCCL, 2 processes: ")]),
    ],
)
def test_gpus_are_what_adds_up(gpus: tuple[int, ...], told: list[tuple[Outcome, str]], monkeypatch: Any) -> None:
    """The examination of a cluster that is not there: its nodes answer in this process."""
    asked: list[tuple[int, int]] = []  # rank, and its GPUs

    def answers(self: Any, calls: Any, function: Any, gpus: Any = lambda _: 0) -> list[Any]:
        if function is node.free_port:
            return [1]
        asked.extend((arguments[2], gpus(OFFER)) for _, arguments in calls)
        return [node.Reduction(len(calls), 1e-4, 8_000_000, 0.01, 0.0)] * len(calls)

    alive = [
        {"Alive": True, "NodeID": f"id{i}", "NodeManagerAddress": f"10.0.0.{i}", "Resources": {"CPU": 8, "GPU": n}}
        for i, n in enumerate(gpus)
    ]
    monkeypatch.setattr("ray.nodes", lambda: alive)
    monkeypatch.setattr(examination._Examination, "_ask_each", answers)
    examined = examination._Examination(examination.Request())
    examined._facts = dict.fromkeys(examined._offers, FACTS)
    found = list(examined._all_reduce())
    assert [(f.outcome, f.measured[: len(text)]) for f, (_, text) in zip(found, told, strict=True)] == told
    assert asked == [(rank, int("NCCL" in told[-1][1])) for rank in range(2)]


def test_a_reduction() -> None:
    # 8 MB in 10 ms among 4: 800 MB/s of sums, three halves of it on each link
    right = node.Reduction(size=4, latency_s=1e-4, nbytes=8_000_000, time_s=0.01, deviation=0.0)
    found = judgement.reduction([right, right], "gloo", "4 nodes")
    assert found.outcome is Outcome.OK
    assert "1200 MB/s bus bandwidth (800 MB/s of sums), 100 µs latency" in found.measured
    assert "0.13 s a step" in found.measured
    wrong = judgement.reduction([right, dataclasses.replace(right, deviation=2.0)], "gloo", "4 nodes")
    assert wrong.outcome is Outcome.FAILS
    assert "wrong by 2" in wrong.measured
    slow = judgement.reduction([dataclasses.replace(right, time_s=0.1)], "gloo", "4 nodes")
    assert slow.outcome is Outcome.WARNING


def test_a_picture_that_is_another() -> None:
    assert judgement.decoder(20.0, "cpu", "n").outcome is Outcome.FAILS
    assert judgement.decoder(float("nan"), "cpu", "n").outcome is Outcome.FAILS


def test_storage_that_lets_two_have_a_name() -> None:
    winner, other = node.StorageProbe(True, True, 0.1), node.StorageProbe(False, True, 0.1)
    in_order = judgement.storage({"a": winner, "b": other}, {}, "/s")
    assert [f.outcome for f in in_order] == [Outcome.OK] * 2
    both = judgement.storage({"a": winner, "b": winner}, {}, "/s")
    assert both[-1].outcome is Outcome.FAILS
    assert both[-1].advice.startswith("two drivers could own one run")
    nobody = judgement.storage({"a": other, "b": other}, {}, "/s")
    assert (nobody[-1].outcome, nobody[-1].measured) == (Outcome.FAILS, "one name was created by 0 of 2 machines")
    assert nobody[-1].advice.startswith("no driver could own a run")
    unknown = judgement.storage({"a": dataclasses.replace(winner, creates_exclusively=False)}, {}, "/s")
    assert [f.outcome for f in unknown] == [Outcome.WARNING]


def test_a_machine_that_failed_is_not_taken_for_storage_that_fails() -> None:
    winner, other = node.StorageProbe(True, True, 0.1), node.StorageProbe(False, True, 0.1)
    # It created the name, and failed later; or may have created it, and did not answer.
    assert [f.where for f in judgement.storage({"a": winner, "b": other}, {"b": []}, "/s", {"a"})] == ["b"]
    assert [f.outcome for f in judgement.storage({"b": other}, {"b": []}, "/s", {"a"})] == [Outcome.OK]
    two = judgement.storage({"a": winner, "b": winner, "c": other}, {"b": [], "c": []}, "/s", {"a"})
    assert two[-1].measured == "one name was created by 2 of 3 machines"
    assert judgement.storage({"a": winner, "b": winner}, {}, "/s", {"a", "b"}) == []  # of one folder or of two?


def test_storage_whose_winner_cannot_read_is_one_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An examination of two nodes that answer in this process; the driver is the first to write, and cannot read."""

    def answers(self: Any, calls: Any, function: Any, gpus: Any) -> list[Any]:
        return [function(*arguments) for _, arguments in calls]

    def here(self: Any, function: Any, *arguments: Any) -> Any:
        return examination.Trouble("away") if function is node.read_storage else function(*arguments)

    alive = [{"Alive": True, "NodeID": i, "NodeManagerAddress": f"10.0.0.{i}", "Resources": {"CPU": 1}} for i in "12"]
    monkeypatch.setattr("ray.nodes", lambda: alive)
    monkeypatch.setattr(examination._Examination, "_ask_each", answers)
    monkeypatch.setattr(examination._Examination, "_here", here)
    examined = examination._Examination(examination.Request(storage=str(tmp_path)))
    examined._facts = dict.fromkeys(examined._offers, FACTS)
    found = list(examined._storage())
    assert [f.measured for f in found if f.outcome is Outcome.FAILS] == ["away"]
    assert [f.where for f in found if f.outcome is Outcome.OK] == ["10.0.0.1", "10.0.0.2"]


def test_storage_that_is_another_folder_on_a_node() -> None:
    probes = {"a": node.StorageProbe(True, True, 0.1), "b": node.StorageProbe(True, True, 0.1)}
    found = judgement.storage(probes, {"a": ["b"], "b": []}, "/s")
    assert [(f.where, f.outcome) for f in found] == [("a", Outcome.FAILS), ("b", Outcome.OK)]
    assert "does not see in /s what b wrote" in found[0].measured
    assert "mount the same one on every node" in found[0].advice


def test_data_sets_that_differ() -> None:
    one, other = (node.DataProbe(digest, {"train": 3}, 1 << 20, 0.01) for digest in ("a" * 64, "b" * 64))
    assert [f.outcome for f in judgement.data({"n1": one, "n2": one})] == [Outcome.OK] * 2
    assert [f.outcome for f in judgement.data({"n1": one, "n2": other})] == [Outcome.FAILS] * 2
