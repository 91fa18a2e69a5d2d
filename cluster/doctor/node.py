"""What the doctor measures on a node. Each function is a Ray task there, or is called here; none judges."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import re
import socket
import stat
import statistics
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil

_VISIBLE_WITHIN_S = 10.0  # NFS keeps for some seconds that a name was not there
_PAUSE_S = 0.2
_RANGE_BYTES = 1 << 20
_NUM_LATENCIES, _NUM_BANDWIDTHS = 20, 5
_REDUCED_BYTES = 32 << 20


@dataclass(frozen=True)
class Facts:
    """A machine, as one of its processes sees it."""

    hostname: str
    versions: dict[str, str]  # of Python, Ray, torch, DALI, and a digest of this project's sources
    cpus: int
    memory_bytes: int
    available_bytes: int  # of memory
    shm_bytes: int  # size of /dev/shm, 0 where there is none
    gpu_devices: int  # /dev/nvidia0 …, whatever Ray shows of them
    cache_folder: str  # of staged shards
    disk_bytes: int  # of the disk that it lies on
    disk_free_bytes: int
    interfaces: dict[str, tuple[str, ...]]  # IP addresses by name
    gloo_interface: str  # GLOO_SOCKET_IFNAME, "" where it is not set
    nccl_interface: str  # NCCL_SOCKET_IFNAME
    token_file: str  # "" where the token does not come from a file
    token_mode: int  # its permissions; 0: it cannot be looked at


def facts() -> Facts:
    from orchestrator.data.cache import default_folder

    memory, folder = psutil.virtual_memory(), default_folder()
    existing = folder
    while not existing.exists():
        existing = existing.parent
    disk = psutil.disk_usage(str(existing))
    shm = Path("/dev/shm")
    families = socket.AF_INET, socket.AF_INET6
    addresses = {
        name: tuple(a.address.partition("%")[0] for a in found if a.family in families)
        for name, found in psutil.net_if_addrs().items()
    }
    token_file, token_mode = token()
    return Facts(
        hostname=socket.gethostname(),
        versions=versions(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=memory.total,
        available_bytes=memory.available,
        shm_bytes=psutil.disk_usage(str(shm)).total if shm.is_dir() else 0,
        gpu_devices=sum(bool(re.fullmatch(r"nvidia\d+", each.name)) for each in Path("/dev").iterdir()),
        cache_folder=str(folder),
        disk_bytes=disk.total,
        disk_free_bytes=disk.free,
        interfaces=addresses,
        gloo_interface=os.environ.get("GLOO_SOCKET_IFNAME", ""),
        nccl_interface=os.environ.get("NCCL_SOCKET_IFNAME", ""),
        token_file=token_file,
        token_mode=token_mode,
    )


def versions() -> dict[str, str]:
    """What has to be the same on all nodes."""
    found = {"Python": platform.python_version()}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        label = "DALI" if name.startswith("nvidia-dali") else {"ray": "Ray", "torch": "torch"}.get(name)
        if label:
            found.setdefault(label, distribution.version)
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for package in ("orchestrator", "cluster"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found | {"sources": digest.hexdigest()[:12]}


def token() -> tuple[str, int]:
    """File that Ray's token is read from, and its permissions; "" where it is in the environment, or not used."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return "", 0
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return str(path), stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return str(path), 0


def now_s() -> float:
    """This machine's clock, seconds since 1970."""
    return time.time()


def visible_gpus() -> list[str]:
    """Names of the GPUs that torch sees."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def listening(port: int) -> list[str]:
    """Addresses of this machine on which something listens at ``port``."""
    connections = psutil.net_connections(kind="tcp")
    return sorted({c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port})


# -- DALI -----------------------------------------------------------------------------------------------------------


def decode(device: str) -> float:
    """A JPEG made here, decoded and resized by DALI on ``device`` ("cpu", "cuda"): dB (PSNR) against PIL."""
    from PIL import Image

    from orchestrator.data.decoder import Decoder, DecodeSettings
    from orchestrator.data.views import Views

    width, height, crop = 256, 192, 64
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture = Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=95)
    with Image.open(io.BytesIO(stream.getvalue())) as stored:
        resized = stored.convert("RGB").resize((crop, crop), Image.Resampling.BILINEAR)
    one = np.ones(1)
    view = Views(0 * one, 0 * one, width * one, height * one, one < 0, np.zeros((1, 3), np.float32))
    decoder = Decoder(DecodeSettings(device=device), 1, crop, np.zeros(3, np.float32), of_whole=True)
    decoder.submit([np.frombuffer(stream.getvalue(), np.uint8)], view, width * one, height * one)
    pixels = decoder.collect().cpu().numpy()[0]
    error = float(np.mean((pixels - np.asarray(resized, np.float32)) ** 2))
    return 10 * float(np.log10(255**2 / max(error, 1e-6)))


# -- all-reduce -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reduction:
    """Of one rank: medians of its times, and how far the sum is from what it has to be."""

    size: int  # ranks
    latency_s: float
    nbytes: int
    time_s: float  # for nbytes
    deviation: float

    @property
    def bus_bytes_per_s(self) -> float:
        """What each link carries: a ring moves 2 (n - 1) / n of the bytes over each."""
        return self.nbytes / self.time_s * 2 * (self.size - 1) / self.size


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def all_reduce(
    host: str, port: int, rank: int, size: int, use_gpu: bool, timeout_s: float, nbytes: int = _REDUCED_BYTES
) -> Reduction:
    """Take part in a process group of ``size`` whose first rank listens at host:port. Raises RuntimeError, within
    about ``timeout_s``, where the others are not met.
    """
    import torch

    from orchestrator.control.interface import choose_interface
    from orchestrator.world import World

    choose_interface()  # as a worker of a run does
    device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
    world = World.from_address(host, port, rank, size, device, timeout_s)
    try:

        def timed_s(tensor: torch.Tensor) -> float:
            world.barrier()
            if use_gpu:
                torch.cuda.synchronize()
            start_s = time.perf_counter()
            world.sum_(tensor)
            if use_gpu:
                torch.cuda.synchronize()
            return time.perf_counter() - start_s

        # Whole numbers below 2^24 (up to 14,000 ranks): every order of additions gives the same float.
        pattern = (torch.arange(nbytes // 4, device=device) % 251).float()
        mine = pattern * (rank % 8 + 1)
        world.sum_(mine)
        deviation = float((mine - pattern * sum(each % 8 + 1 for each in range(size))).abs().max())
        one, zeros = torch.zeros(1, device=device), torch.zeros_like(pattern)
        latency_s = statistics.median(timed_s(one) for _ in range(_NUM_LATENCIES))
        time_s = statistics.median(timed_s(zeros) for _ in range(_NUM_BANDWIDTHS))
        return Reduction(size, latency_s, pattern.nbytes, time_s, deviation)
    finally:
        world.leave()


# -- storage and data -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StorageProbe:
    """What one machine could do in the storage; it raises what it could not."""

    is_winner: bool  # of the name that all machines have tried to create
    creates_exclusively: bool  # as far as is known of this kind of store
    time_s: float


def write_storage(url: str, folder: str, me: str) -> StorageProbe:
    """Write, read, delete; create a file that others will read; race for one name. Raises ValueError, OSError."""
    from orchestrator.storage import Storage

    start_s = time.monotonic()
    storage = Storage(url)
    here = storage.local_path(folder)
    if here is not None and not here.parent.is_dir():
        raise ValueError(f"this machine has no folder {storage.url}")
    storage.check_writable()
    storage.create(f"{folder}/{me}", me.encode())
    if storage.creates_exclusively and storage.create(f"{folder}/{me}", b"a second time"):
        raise ValueError("a name that exists was created again")
    is_winner = storage.create(f"{folder}/race", me.encode())
    return StorageProbe(is_winner, storage.creates_exclusively, time.monotonic() - start_s)


def read_storage(url: str, folder: str, others: list[str]) -> list[str]:
    """Those of ``others`` whose file cannot be seen from here."""
    from orchestrator.storage import Storage

    storage, until_s = Storage(url), time.monotonic() + _VISIBLE_WITHIN_S
    missing = list(others)
    while True:
        missing = [other for other in missing if not _is_there(storage, f"{folder}/{other}", other.encode())]
        if not missing or time.monotonic() > until_s:
            return missing
        time.sleep(_PAUSE_S)


def clear_storage(url: str, folder: str) -> None:
    from orchestrator.storage import Storage

    Storage(url).delete(folder)


def _is_there(storage: object, name: str, data: bytes) -> bool:
    from orchestrator.storage import Storage

    assert isinstance(storage, Storage)
    try:
        return storage.read(name) == data
    except (FileNotFoundError, NotADirectoryError):
        return False


@dataclass(frozen=True)
class DataProbe:
    """What was read of a data set."""

    digest: str  # of the manifest
    counts: dict[str, int]  # images by split
    nbytes: int  # of the range of a shard
    time_s: float  # that it took


def read_data(url: str) -> DataProbe:
    """The manifest, and the beginning of a shard. Raises ValueError, OSError."""
    from orchestrator.data.shards import DataSet
    from orchestrator.storage import Storage

    storage = Storage(url)
    data = DataSet(storage)
    shard = next(shard for split in data.manifest.splits.values() for shard in split.shards)
    start_s = time.monotonic()
    found = storage.read_range(shard.name, 0, min(_RANGE_BYTES, shard.nbytes))
    time_s = time.monotonic() - start_s
    if found[257:262] != b"ustar":
        raise ValueError(f"{storage.url}/{shard.name} does not begin as a tar file: copy or prepare the data set again")
    counts = {name: split.count for name, split in data.manifest.splits.items()}
    return DataProbe(data.digest, counts, len(found), time_s)
