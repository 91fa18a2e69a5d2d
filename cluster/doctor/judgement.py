"""From what was measured to what it means and what to do: pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from cluster.doctor.node import DataProbe, Facts, Reduction, StorageProbe

CLOCK_WARNING_S = 1.0
CLOCK_LIMIT_S = 300.0  # munge's credentials, and with them SLURM, are refused beyond; S3's requests beyond 900
LEAST_SHM_BYTES = 512 << 20  # a container has 64 MiB by default: too little for NCCL
LEAST_SHARE = 0.05  # of memory or disk: Ray kills workers, and writes no objects, when less is free
LEAST_PSNR_DB = 35.0  # DALI's CPU decoder has about 50 against PIL; GPUs decode JPEGs a little differently
RESNET50_GRADIENTS_BYTES = 102e6


class Outcome(Enum):
    OK = "ok"
    WARNING = "warning"  # a campaign can start
    FAILS = "fails"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One line: which check, of which machine ("" for all), what was measured, and what to do."""

    check: str
    where: str
    outcome: Outcome
    measured: str
    advice: str = ""


@dataclass(frozen=True)
class Offer:
    """What Ray has of a node."""

    where: str  # how it is called in findings
    address: str
    cpus: int
    gpus: int


def versions(here: Mapping[str, str], there: Mapping[str, str], where: str) -> Finding:
    """The driver's versions against a node's."""
    told = ", ".join(f"{name} {version}" for name, version in there.items())
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    wrong = [f"{name} {there.get(name, 'none')}, here {here.get(name, 'none')}" for name in names]
    if wrong:
        advice = (
            "install the same versions (constraints.txt) and the same checkout on every node, and restart Ray there"
        )
        return Finding("versions", where, Outcome.FAILS, "; ".join(wrong), advice)
    return Finding("versions", where, Outcome.OK, told)


def machine(facts: Facts, offer: Offer) -> Finding:
    """CPUs, memory, shared memory and disk."""
    measured = (
        f"{offer.cpus} CPUs, {_gb(facts.available_bytes)} of {_gb(facts.memory_bytes)} GB of memory available, "
        f"/dev/shm {_gb(facts.shm_bytes)} GB, {_gb(facts.disk_free_bytes)} GB free for {facts.cache_folder}"
    )
    advice = []
    if offer.cpus > facts.cpus:
        advice.append(f"Ray counts more CPUs than the {facts.cpus} of its processes: ray start --num-cpus {facts.cpus}")
    if facts.available_bytes < LEAST_SHARE * facts.memory_bytes:
        advice.append("memory is nearly used up, and Ray kills workers then: end what else runs there")
    if facts.shm_bytes < LEAST_SHM_BYTES:
        advice.append(
            "/dev/shm is too small for NCCL and Ray: start the container with --shm-size=8g, or mount a larger"
        )
    if facts.disk_free_bytes < LEAST_SHARE * facts.disk_bytes:
        advice.append("the disk is nearly full: clear it, or set TMPDIR to a larger one before ray start")
    return Finding("machine", offer.where, Outcome.WARNING if advice else Outcome.OK, measured, "; ".join(advice))


def token(facts: Facts, where: str, *, is_open: bool) -> Finding:
    """Who may use the cluster. ``is_open``: it was joined without a token."""
    if is_open:
        advice = (
            "whoever reaches its ports runs programs on it: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH for ray start"
        )
        return Finding("token", where, Outcome.WARNING, "the cluster asks for no token", advice)
    if not facts.token_file:
        return Finding("token", where, Outcome.OK, "from the environment")
    measured = f"{facts.token_file} has mode {facts.token_mode:04o}"
    if facts.token_mode & 0o077:
        return Finding("token", where, Outcome.WARNING, measured, f"others can read it: chmod 600 {facts.token_file}")
    return Finding("token", where, Outcome.OK, measured)


def dashboard(url: str, addresses: Sequence[str]) -> Finding:
    """``url``: host:port as Ray tells it, "" for none; the addresses on which that port listens."""
    if not url:
        return Finding("dashboard", "", Outcome.OK, "none: --on ray needs one, nothing else does")
    measured = f"listens at port {url.rpartition(':')[2]} of {', '.join(addresses) or url.rpartition(':')[0]}"
    if all(_is_loopback(address) for address in addresses or [url.rpartition(":")[0]]):
        return Finding("dashboard", "", Outcome.OK, measured)
    advice = "other machines reach it: ray start --head --dashboard-host 127.0.0.1, and an SSH tunnel to it"
    return Finding("dashboard", "", Outcome.WARNING, measured, advice)


def network(facts: Facts, offer: Offer) -> Finding:
    """Over which interface workers meet: that of Ray's address, where nothing else is set."""
    of_ray = next((name for name, found in facts.interfaces.items() if offer.address in found), "")
    gloo, nccl = facts.gloo_interface, facts.nccl_interface
    told = f"gloo on {gloo or of_ray}, NCCL on {nccl.removeprefix('=') or of_ray}"
    measured = f"Ray on {of_ray or 'none'} ({offer.address}), {told}"
    for variable, value in (("GLOO_SOCKET_IFNAME", gloo), ("NCCL_SOCKET_IFNAME", nccl)):
        names = [name for name in facts.interfaces if selects(value, name, is_prefix=variable.startswith("NCCL"))]
        if value and not names:
            have = ", ".join(facts.interfaces)
            return Finding(
                "network", offer.where, Outcome.FAILS, measured, f"{variable} names none of {have}: correct it"
            )
        if value and of_ray and of_ray not in names:
            advice = (
                f"{variable} is not the interface of Ray's address: is it meant? the all-reduce tells whether it works"
            )
            return Finding("network", offer.where, Outcome.WARNING, measured, advice)
    return Finding("network", offer.where, Outcome.OK, measured)


def selects(value: str, name: str, *, is_prefix: bool) -> bool:
    """Whether a list of interfaces has ``name``: gloo's are names; NCCL's prefixes, "=" exact names, "^" all others."""
    excludes, value = value.startswith("^"), value.removeprefix("^")
    exact, value = not is_prefix or value.startswith("="), value.removeprefix("=")
    found = any(name == each if exact else name.startswith(each) for each in value.split(",") if each)
    return found != excludes


def gpus(facts: Facts, offer: Offer, seen: Sequence[str]) -> Finding:
    """``seen``: names of the GPUs that torch sees in a process that has all of the node's."""
    if len(seen) < offer.gpus:
        advice = "a torch with CUDA, a driver that fits it (nvidia-smi), and no CUDA_VISIBLE_DEVICES that hides GPUs"
        return Finding("gpus", offer.where, Outcome.FAILS, f"Ray has {offer.gpus}, torch sees {len(seen)}", advice)
    if facts.gpu_devices > offer.gpus:
        measured = f"the machine has {facts.gpu_devices}, Ray {offer.gpus}"
        advice = f"if the others are meant too: ray start --num-gpus {facts.gpu_devices}"
        return Finding("gpus", offer.where, Outcome.WARNING, measured, advice)
    kinds = ", ".join(sorted(set(seen)))
    return Finding("gpus", offer.where, Outcome.OK, f"{offer.gpus}{f': {kinds}' if kinds else ''}")


def clock(offset_s: float, bound_s: float, where: str) -> Finding:
    """A node's clock less the driver's, known to within ``bound_s``."""
    measured = f"{offset_s * 1000:+.0f} ms of this machine's clock (within {bound_s * 1000:.0f} ms)"
    least_s = max(0.0, abs(offset_s) - bound_s)
    if least_s <= CLOCK_WARNING_S:
        return Finding("clock", where, Outcome.OK, measured)
    why = "runs compare no clocks (a lease of guard.lease_s is timed by who waits), but"
    if least_s > CLOCK_LIMIT_S:
        advice = f"set it (chrony, NTP): {why} SLURM's munge refuses more than 5 minutes, S3 more than 15"
        return Finding("clock", where, Outcome.FAILS, measured, advice)
    advice = f"set it (chrony, NTP): {why} times in logs and MLflow will not fit together"
    return Finding("clock", where, Outcome.WARNING, measured, advice)


def decoder(psnr_db: float, device: str, where: str) -> Finding:
    """DALI against PIL."""
    measured = f"a JPEG decoded on {device}, {psnr_db:.0f} dB from PIL's"
    if not psnr_db >= LEAST_PSNR_DB:
        advice = "not the picture that was encoded: install the version of DALI in constraints.txt"
        return Finding("dali", where, Outcome.FAILS, measured, advice)
    return Finding("dali", where, Outcome.OK, measured)


def ranks(gpus: Mapping[str, int]) -> tuple[list[str], bool]:
    """Nodes that add up together, one rank each time that one is named, and whether on GPUs. ``gpus``: by node.

    As workers would: on GPUs wherever there are some, so that a head without one leaves NCCL to the others.
    """
    with_gpus = [node for node, number in gpus.items() if number]
    if len(with_gpus) > 1:
        return with_gpus, True
    if with_gpus and gpus[with_gpus[0]] > 1:
        return with_gpus * 2, True
    nodes = list(gpus)
    return nodes if len(nodes) > 1 else nodes * 2, False


def reduction(found: Sequence[Reduction], backend: str, over: str) -> Finding:
    """``found``: of every rank; ``over``: who took part."""
    slowest = max(found, key=lambda each: each.time_s)
    rate, latency_s = slowest.bus_bytes_per_s, max(each.latency_s for each in found)
    step_s = RESNET50_GRADIENTS_BYTES / rate * 2 * (slowest.size - 1) / slowest.size
    measured = (
        f"{backend}, {over}: {rate / 1e6:.0f} MB/s bus bandwidth ({slowest.nbytes / slowest.time_s / 1e6:.0f} MB/s of "
        f"sums), {latency_s * 1e6:.0f} µs latency; ResNet-50's gradients take {step_s:.2f} s a step"
    )
    if deviation := max(each.deviation for each in found):
        advice = (
            "memory or a network card spoils data: do not train on these machines; dmesg, and each pair of nodes alone"
        )
        return Finding("all-reduce", "", Outcome.FAILS, f"a sum is wrong by {deviation:g} ({measured})", advice)
    if step_s > 1:
        advice = "slow: is a faster interface there (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, set before ray start)?"
        return Finding("all-reduce", "", Outcome.WARNING, measured, advice)
    return Finding("all-reduce", "", Outcome.OK, measured)


def storage(
    found: Mapping[str, StorageProbe], unseen: Mapping[str, Sequence[str]], url: str, failed: Collection[str] = ()
) -> list[Finding]:
    """``found``: by machine, of all that have written; ``unseen``: the machines whose file it does not see; ``failed``:
    those that could not write, or not read, which has been told.
    """
    findings = []
    for where, probe in found.items():
        if where in failed:
            continue
        if missing := unseen.get(where):
            measured = f"does not see in {url} what {', '.join(missing)} wrote"
            advice = "it is a folder of its own there: mount the same one on every node, or give a bucket"
            findings.append(Finding("storage", where, Outcome.FAILS, measured, advice))
        elif not probe.creates_exclusively:
            advice = "two drivers of one run may not notice each other: keep to one, or use S3 or a shared folder"
            findings.append(Finding("storage", where, Outcome.WARNING, "no exclusive creation is known of it", advice))
        else:
            measured = f"written, read, created exclusively, deleted; the others' files seen ({probe.time_s:.2f} s)"
            findings.append(Finding("storage", where, Outcome.OK, measured))
    winners = [where for where, probe in found.items() if probe.is_winner]
    exclusive = all(probe.creates_exclusively for probe in found.values())
    # Where folders are not the same, that is what has to be told; of a machine that did not answer nobody knows.
    is_one_folder = any(where not in failed for where in found) and not any(unseen.values())
    nobody = not winners and set(failed) <= found.keys()
    if exclusive and is_one_folder and (len(winners) > 1 or nobody):
        measured = f"one name was created by {len(winners)} of {len(found)} machines"
        advice = "no driver could own a run" if nobody else "two drivers could own one run"
        advice += ": use a file system with hard links or O_EXCL (NFS 4), or S3"
        findings.append(Finding("storage", "", Outcome.FAILS, measured, advice))
    return findings


def data(found: Mapping[str, DataProbe]) -> list[Finding]:
    """``found``: by node."""
    digests = {probe.digest for probe in found.values()}
    findings = []
    for where, probe in found.items():
        counts = ", ".join(f"{count} {name}" for name, count in probe.counts.items())
        rate = probe.nbytes / max(probe.time_s, 1e-6) / 1e6
        measured = f"manifest {probe.digest[:12]} ({counts}), a shard's beginning at {rate:.0f} MB/s"
        advice = "nodes see different data sets: mount or copy the same one" if len(digests) > 1 else ""
        findings.append(Finding("data", where, Outcome.FAILS if advice else Outcome.OK, measured, advice))
    return findings


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f}" if nbytes < 100e9 else f"{nbytes / 1e9:.0f}"
