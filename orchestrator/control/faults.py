"""What a cluster does to a run, done on purpose: the faults of a rehearsal (``python jobs/rehearse.py``).

A fault strikes from outside: a signal to a process, a lost node, a damaged file. What must strike inside a worker (an
exception in the user's code, a loss that is not finite, a clock that jumps) comes through the network of the rehearsal,
which is named as a user's own network is (``model.factory``) and obeys orders left as files in storage: the trainer
knows nothing of it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Protocol

import psutil
from torch import Tensor, nn

from orchestrator import models
from orchestrator.config import Family
from orchestrator.ray_session import ray_session
from orchestrator.storage import Storage
from orchestrator.training.checkpoint import Checkpoints
from orchestrator.training.ownership import newest_attempt

NETWORK = "orchestrator.control.faults:network"
ORDERS_VARIABLE = "REHEARSAL_ORDERS"
_OUTAGE_S = 5.0
_NOTICE_S = 25.0  # between Ray's notice of a preemption and the end of the node


# -- inside a worker: the network that obeys orders -----------------------------------------------------------------


def network(*, num_classes: int, image_size: int) -> nn.Module:
    """A ResNet of 8 layers that obeys the orders in the folder that REHEARSAL_ORDERS names (none: a plain network)."""
    url = os.environ.get(ORDERS_VARIABLE)
    net = models.build(Family.CIFAR_RESNET, 8, num_classes=num_classes, image_size=image_size)
    orders = Orders(url) if url and "RANK" in os.environ else None  # a driver builds it too, to see whether it can
    if orders is not None:
        orders.register()
    return _Rehearsed(net, orders)


class _Rehearsed(nn.Module):
    def __init__(self, net: nn.Module, orders: Orders | None) -> None:
        super().__init__()
        self.net, self._orders = net, orders

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] → logits [N, classes]."""
        order = None
        # Zeros are of the passes that settle gradient buckets: no step.
        if self._orders is not None and self.training and images.device.type != "meta" and bool(images.any()):
            order = self._orders.take()
        logits: Tensor = self.net(images)
        match order:
            case {"kind": "exception"}:
                raise RuntimeError("rehearsed: an exception in the user's code")
            case {"kind": "nan"}:
                return logits * float("nan")
            case {"kind": "clock", "seconds": seconds}:
                _turn_back_the_clock(seconds)
        return logits


def _turn_back_the_clock(seconds: float) -> None:
    """For all of this process that asks Python for the time of day."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() - seconds
    time.time_ns = lambda: now_ns() - int(seconds * 1e9)


@dataclass(frozen=True)
class Worker:
    """A process that trains: where it is, for signals. ``node``: Ray's id."""

    rank: int
    pid: int
    host: str
    node: str


class Orders:
    """A folder of orders to whichever worker sees one first; each is obeyed once. Workers leave there where they are.

    ::

        pace.json           seconds that each step takes longer, so that a short run lasts for its faults
        orders/0007.json    what to do
        taken/0007          somebody does it
        workers/1.json      the newest worker of rank 1
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._storage = Storage(url)

    def give(self, kind: str, **more: Any) -> None:
        number = len(self._storage.files("orders"))
        self._storage.publish(f"orders/{number:04d}.json", json.dumps({"kind": kind, **more}).encode())

    def pace(self, seconds: float) -> None:
        self._storage.publish("pace.json", json.dumps(seconds).encode())

    def take(self) -> dict[str, Any] | None:
        """An order for this process, or None; first the pace is kept."""
        with suppress(FileNotFoundError):
            time.sleep(json.loads(self._storage.read("pace.json")))
        given = self._storage.files("orders")
        taken = {name.rpartition("/")[2] for name in self._storage.files("taken")}
        for name in given:
            key = name.rpartition("/")[2].removesuffix(".json")
            if key not in taken and self._storage.create(f"taken/{key}", str(os.getpid()).encode()):
                return dict(json.loads(self._storage.read(name)))
        return None

    def register(self) -> None:
        """Leave where this worker is."""
        import ray

        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        worker = Worker(int(os.environ["RANK"]), os.getpid(), socket.gethostname(), node)
        self._storage.publish(f"workers/{worker.rank}.json", json.dumps(asdict(worker)).encode())

    def workers(self) -> list[Worker]:
        """The newest worker of each rank."""
        found = [Worker(**json.loads(self._storage.read(name))) for name in self._storage.files("workers")]
        return sorted(found, key=lambda worker: worker.rank)


# -- what can be struck ---------------------------------------------------------------------------------------------


class Nodes(Protocol):
    """A cluster whose nodes may be lost."""

    def node_of(self, worker: Worker) -> Any:
        """The node where this worker is, None for the driver's."""

    def add(self, num_cpus: int) -> Any: ...

    def lose(self, node: Any) -> None: ...

    def drain(self, node: Any, deadline_s: float) -> None: ...

    def lose_all(self) -> None: ...


class Server(Protocol):
    """An MLflow server that may be ended and stopped."""

    def start(self) -> None: ...

    def kill(self) -> None: ...

    def signal(self, number: signal.Signals) -> None: ...


@dataclass
class Scene:
    """What the faults of one run strike. None where it is not the rehearsal's to break."""

    run: Storage
    orders: Orders
    rng: random.Random
    driver_pid: Callable[[], int]
    second_driver: Callable[[], tuple[int, str]]  # runs to its end: exit code, output
    address: str
    nodes: Nodes | None
    server: Server | None


def signal_worker(worker: Worker, number: signal.Signals, address: str) -> None:
    """Send a signal to a worker, on whatever machine of the cluster at ``address``. Raises OSError where it is gone."""
    if worker.host == socket.gethostname() and is_alive(worker.pid):
        return os.kill(worker.pid, number)
    with ray_session(address):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(worker.node, soft=False)
        kill = ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=there)
        try:
            ray.get(kill.remote(worker.pid, int(number)), timeout=60)
        except ray.exceptions.RayError as error:
            raise OSError(f"worker {worker.rank} on {worker.host} cannot be signalled: {error}") from None


def _kill(pid: int, number: int) -> None:
    os.kill(pid, number)  # Ray takes no built-in function


# -- faults ---------------------------------------------------------------------------------------------------------


class Promise(Enum):
    """What a run does after a fault."""

    GOES_ON = "goes on"  # as if nothing had happened
    RESTARTS = "workers start again"  # under the same driver
    ENDS = "stops, and the same command goes on"


@dataclass(frozen=True)
class Fault:
    """One class of fault. ``inject`` does it and says to what; ``missing`` says why it cannot be done there, or "".

    message: what the driver's output must say afterwards, a regular expression; exit_codes: of a driver that ends.
    """

    name: str
    what: str
    promise: Promise
    inject: Callable[[Scene], str]
    message: str = ""
    exit_codes: tuple[int, ...] = ()
    missing: Callable[[Scene], str] = lambda scene: ""
    needs_checkpoints: int = 1


def _some_worker(scene: Scene) -> Worker:
    return scene.rng.choice(scene.orders.workers())


def _kill_worker(scene: Scene) -> str:
    worker = _some_worker(scene)
    signal_worker(worker, signal.SIGKILL, scene.address)
    return f"worker {worker.rank}"


def _stop_worker(scene: Scene) -> str:
    worker = _some_worker(scene)
    signal_worker(worker, signal.SIGSTOP, scene.address)
    return f"worker {worker.rank}"


def _order(kind: str, **more: Any) -> Callable[[Scene], str]:
    def inject(scene: Scene) -> str:
        scene.orders.give(kind, **more)
        return "the next worker that begins a step"

    return inject


def _own_cluster(scene: Scene) -> str:
    return "" if scene.nodes else "nodes of your cluster are not the rehearsal's to lose: leave its address out"


def _far_node(scene: Scene) -> tuple[Nodes, Any]:
    """The node of some worker that is not the driver's."""
    assert scene.nodes is not None
    found = [node for worker in scene.orders.workers() if (node := scene.nodes.node_of(worker)) is not None]
    return scene.nodes, scene.rng.choice(found)


def _lose_node(scene: Scene) -> str:
    nodes, node = _far_node(scene)
    nodes.lose(node)
    nodes.add(1)
    return "a node with its worker; another joined at once"


def _drain_node(scene: Scene) -> str:
    nodes, node = _far_node(scene)
    nodes.add(1)
    began_s = time.monotonic()
    nodes.drain(node, _NOTICE_S)
    # The node goes at its deadline, as a cloud takes it.
    left = {worker.pid for worker in scene.orders.workers() if nodes.node_of(worker) == node}
    while any(is_alive(pid) for pid in left) and time.monotonic() - began_s < _NOTICE_S:
        time.sleep(0.2)
    early_s = _NOTICE_S - (time.monotonic() - began_s)
    nodes.lose(node)
    return (
        f"a node with its worker, told {_NOTICE_S:.0f} s before; it was left {max(0.0, early_s):.0f} s before its end"
    )


def _lose_cluster(scene: Scene) -> str:
    assert scene.nodes is not None
    scene.nodes.lose_all()
    return "all nodes; a new cluster for the next start"


def _signal_driver(number: signal.Signals) -> Callable[[Scene], str]:
    def inject(scene: Scene) -> str:
        os.kill(scene.driver_pid(), number)
        return "the driver"

    return inject


def _damage(how: str, change: Callable[[bytes, random.Random], bytes | None]) -> Callable[[Scene], str]:
    """Kill the driver, and change the newest checkpoint before it is read again."""

    def inject(scene: Scene) -> str:
        workers = scene.orders.workers()
        os.kill(scene.driver_pid(), signal.SIGKILL)
        _wait_for_the_end_of(workers)
        record = Checkpoints(scene.run, attempt=0, keep_last=1, notice=lambda text: None).records()[-1]
        name = f"{record.folder}/{scene.rng.choice(sorted(record.files))}"
        content = change(scene.run.read(name), scene.rng)
        if content is None:
            scene.run.delete(name)
        else:
            scene.run.publish(name, content)
        return f"{how} {name.removeprefix('checkpoints/')}"

    return inject


def _wait_for_the_end_of(workers: list[Worker], timeout_s: float = 30) -> None:
    """Ray ends the workers of a dead driver; what they still publish must be there before it is damaged."""
    here = [worker.pid for worker in workers if worker.host == socket.gethostname()]
    deadline_s = time.monotonic() + timeout_s
    while any(is_alive(pid) for pid in here) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    if len(here) < len(workers):
        time.sleep(10)


def is_alive(pid: int) -> bool:
    """Of this machine; what has ended and is not reaped does not live."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _flip(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def _damage_rays_files(scene: Scene) -> str:
    """As a kill within a write leaves them: Ray Train's own resume stops for good at such a snapshot."""
    folder = scene.run.sub("ray")
    names = sorted(folder.find())
    for name in names:
        with suppress(OSError):
            folder.delete(name)
    attempts = sorted(folder.folders("")) or [f"{newest_attempt(scene.run):06d}"]
    for attempt in attempts:
        folder.publish(f"{attempt}/checkpoint_manager_snapshot.json", b'{"checkpoint_results": [{')
    worker = _some_worker(scene)
    signal_worker(worker, signal.SIGKILL, scene.address)
    return f"{len(names)} files deleted, {len(attempts)} torn, then worker {worker.rank} killed"


def _local_storage(scene: Scene) -> str:
    return "" if scene.run.is_local else "needs a local storage"


def _fail_store(scene: Scene) -> str:
    folder = scene.run.local_path("checkpoints")
    assert folder is not None
    aside = folder.with_name("checkpoints-aside")
    folder.rename(aside)
    folder.write_bytes(b"")
    try:
        time.sleep(_OUTAGE_S)
    finally:
        folder.unlink()
        aside.rename(folder)
    return f"no checkpoint could be written or read for {_OUTAGE_S:.0f} s"


def _own_server(scene: Scene) -> str:
    return "" if scene.server else "the MLflow server is not the rehearsal's"


def _stop_server(scene: Scene) -> str:
    assert scene.server is not None
    scene.server.kill()
    time.sleep(_OUTAGE_S)
    scene.server.start()
    return f"the server was killed, and another started {_OUTAGE_S:.0f} s later"


def _slow_server(scene: Scene) -> str:
    assert scene.server is not None
    scene.server.signal(signal.SIGSTOP)
    try:
        time.sleep(_OUTAGE_S)
    finally:
        scene.server.signal(signal.SIGCONT)
    return f"the server took calls and answered none for {_OUTAGE_S:.0f} s"


def _second_driver(scene: Scene) -> str:
    code, output = scene.second_driver()
    if code != 2 or "is at work" not in output:
        raise RuntimeError(f"a second driver was not refused: it ended with {code}: {output[-500:]}")
    return "the same command while it is at work: refused with exit code 2"


_UNUSABLE = "is not usable"
FAULTS: tuple[Fault, ...] = (
    Fault("worker-kill", "a worker is killed (SIGKILL)", Promise.RESTARTS, _kill_worker),
    Fault("worker-stop", "a worker is stopped (SIGSTOP)", Promise.RESTARTS, _stop_worker, r"no progress for .* killed"),
    Fault("nan", "a loss is not finite", Promise.RESTARTS, _order("nan"), "not finite"),
    Fault("clock-back", "a clock jumps back an hour", Promise.GOES_ON, _order("clock", seconds=3600)),
    Fault("ray-files", "Ray's own files are damaged", Promise.RESTARTS, _damage_rays_files),
    Fault("store-failing", "storage fails", Promise.GOES_ON, _fail_store, missing=_local_storage),
    Fault("mlflow-down", "MLflow is down and back", Promise.GOES_ON, _stop_server, missing=_own_server),
    Fault("mlflow-slow", "MLflow does not answer", Promise.GOES_ON, _slow_server, missing=_own_server),
    Fault("two-drivers", "the same run is started again", Promise.GOES_ON, _second_driver),
    Fault("node-lost", "a node is lost, another joins", Promise.RESTARTS, _lose_node, missing=_own_cluster),
    Fault("node-drained", "a node is preempted", Promise.RESTARTS, _drain_node, missing=_own_cluster),
    Fault("exception", "an exception in the user's code", Promise.ENDS, _order("exception"), "rehearsed", (2,)),
    Fault("driver-kill", "the driver is killed (SIGKILL)", Promise.ENDS, _signal_driver(signal.SIGKILL), "", (-9,)),
    Fault("ctrl-c", "Ctrl-C", Promise.ENDS, _signal_driver(signal.SIGINT), "interrupted:", (130,)),
    Fault("cluster-lost", "all nodes are lost", Promise.ENDS, _lose_cluster, "", (1,), _own_cluster),
    *(
        Fault(
            f"checkpoint-{how}",
            f"the newest checkpoint is {how}",
            Promise.ENDS,
            inject,
            _UNUSABLE,
            (-9,),
            needs_checkpoints=2,
        )
        for how, inject in (
            ("torn", _damage("cut in half:", lambda content, rng: content[: len(content) // 2])),
            ("flipped", _damage("one bit changed:", _flip)),
            ("deleted", _damage("deleted:", lambda content, rng: None)),
        )
    ),
)
