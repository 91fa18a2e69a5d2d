"""Two hosts with addresses of their own on this machine: network namespaces on a bridge, whose cable can be cut.

Disks are shared, as storage is: a partition cuts the hosts off from each other alone. Needs root and ``ip``.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.cluster.slurm_cluster import wait_for

_NET = "10.77.0."
_PORT = 6379  # each host has all of its ports to itself


def missing() -> str:
    """Why there can be no hosts here; "" where there can."""
    if shutil.which("ip") is None:
        return "ip is not installed: apt-get install iproute2"
    name = f"probe{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return f"no network namespaces: {done.stderr.strip()}" if done.returncode else ""


def _clear_up() -> None:
    """What a test that was killed has left."""
    listed = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    for name, pid in re.findall(r"^\d+: (rh(\d+)(?:b|p1|p2))[@:]", listed, re.MULTILINE):
        if not psutil.pid_exists(int(pid)):
            subprocess.run(["ip", "link", "del", name], capture_output=True, check=False)
            for host in (1, 2):
                subprocess.run(["ip", "netns", "del", f"rh{pid}h{host}"], capture_output=True, check=False)


class Hosts:
    """Host 1 with the Ray head, host 2 with a node that joins it again whenever it ends: one CPU each, one token."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: unix sockets lie in it
        token = self.folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and "SOCKET_IFNAME" not in k}
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        own["PYTHONPATH"] = str(Path(__file__).parents[2])
        self.environment = plain | own
        self.address = f"{_NET}11:{_PORT}"
        self._mark = f"rh{os.getpid()}"
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        _clear_up()
        try:
            self._build()
            head = ["--head", f"--port={_PORT}", "--dashboard-host=127.0.0.1", f"--temp-dir={self.folder}/s"]
            self._ray(1, "exec", head)
            wait_for(lambda: self._answers(), lambda: self._log(1), 120)
            # As a service that is started again: Ray ends a node that was cut off from the head for long.
            self._ray(2, "while true; do", [f"--address={self.address}"])
            wait_for(lambda: self.nodes() == 2, lambda: self._log(2), 120)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, host: int, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start ``command`` on that host."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*self._in(host), *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def cut(self) -> None:
        """Pull host 2's cable at the switch: what it sends is lost, and nobody is told."""
        self._ip("link", "set", self._port(2), "nomaster")

    def mend(self) -> None:
        self._ip("link", "set", self._port(2), "master", f"{self._mark}b")

    def nodes(self) -> int:
        """Nodes that the head counts as alive."""
        code = "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False); "
        code += "print(sum(n['Alive'] for n in ray.nodes()))"
        done = subprocess.run(
            [*self._in(1), sys.executable, "-c", code, self.address],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        return int(done.stdout.split()[0]) if done.returncode == 0 else 0  # Ray adds words of its own

    def close(self) -> None:
        for process in self._processes:
            try:
                tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                tree[0].send_signal(signal.SIGSTOP)  # it starts nothing again
            except psutil.Error:
                tree = []
            for each in tree:
                try:
                    each.kill()
                except psutil.Error:
                    continue
            process.wait()
        for each in psutil.process_iter(["cmdline"]):
            if any(str(self.folder) in word for word in each.info["cmdline"] or []):
                with suppress(psutil.Error):
                    each.kill()
        for host in (1, 2):
            self._ip("link", "del", self._port(host), check=False)  # the namespace lives as long as its last process
            self._ip("netns", "del", self._name(host), check=False)
        self._ip("link", "del", f"{self._mark}b", check=False)
        for _ in range(50):
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
            time.sleep(0.1)

    # -- wires --------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        self._ip("link", "add", f"{self._mark}b", "type", "bridge")
        self._ip("link", "set", f"{self._mark}b", "up")
        for host in (1, 2):
            name, port = self._name(host), self._port(host)
            self._ip("netns", "add", name)
            self._ip("link", "add", port, "type", "veth", "peer", "name", "cable0", "netns", name)
            self._ip("link", "set", port, "master", f"{self._mark}b", "up")
            for words in (["link", "set", "lo", "up"], ["link", "set", "cable0", "up"]):
                self._ip("-n", name, *words)
            self._ip("-n", name, "addr", "add", f"{_NET}1{host}/24", "dev", "cable0")

    def _ray(self, host: int, how: str, words: list[str]) -> None:
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={_NET}1{host}"]
        ray += ["--num-cpus=1", "--object-store-memory=80000000", *words]
        line = f"{how} {' '.join(ray)}" + ("; sleep 1; done" if how.startswith("while") else "")
        self.run(host, ["bash", "-c", line], self.folder / f"host{host}.log")

    def _answers(self) -> bool:
        probe = f"import socket; socket.create_connection(('{_NET}11', {_PORT}), 2)"
        done = subprocess.run([*self._in(1), sys.executable, "-c", probe], capture_output=True, check=False)
        return done.returncode == 0

    def _log(self, host: int) -> str:
        return (self.folder / f"host{host}.log").read_text()[-3000:]

    def _in(self, host: int) -> list[str]:
        return ["ip", "netns", "exec", self._name(host)]

    def _name(self, host: int) -> str:
        return f"{self._mark}h{host}"

    def _port(self, host: int) -> str:
        return f"{self._mark}p{host}"

    def _ip(self, *words: str, check: bool = True) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
