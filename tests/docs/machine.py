"""A machine of its own, made of this one: the same programs, but files, ports and processes that nobody else sees.

``/`` is an overlay in memory with empty ``/data`` and ``/runs``, the network a loopback of its own, process 1 a shell:
commands may write where they like, take port 6379 and leave servers behind. All of it goes with the process that made
it, however that ends. The kernel is shared, its settings are read-only. Needs root, ``unshare``, ``nsenter``, ``ip``.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ADDRESS = "10.0.0.1"  # beside 127.0.0.1; the name HEAD leads to it

# Before chroot nothing is written: links of the overlay would lead to this machine's own files.
_OUTSIDE = r"""
set -e
mount -t tmpfs -o size=8g tmpfs {folder}
mkdir {folder}/upper {folder}/work {folder}/root
mount -t overlay overlay -o lowerdir=/,upperdir={folder}/upper,workdir={folder}/work {folder}/root
cd {folder}/root
mount -t proc proc proc
mount -o bind,ro proc/sys proc/sys
mount -t sysfs -o ro sysfs sys
mount --rbind /sys/fs/cgroup sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/shm dev/pts
for each in null zero full random urandom tty; do touch dev/$each; mount --bind /dev/$each dev/$each; done
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ip link set lo up
ip address add {address}/32 dev lo
ip route add default dev lo src {address}
exec chroot . bash -c "$0"
"""
_INSIDE = r"""
set -e
ln -s pts/ptmx /dev/ptmx; ln -s /proc/self/fd /dev/fd
ln -s fd/0 /dev/stdin; ln -s fd/1 /dev/stdout; ln -s fd/2 /dev/stderr
for each in /dev/shm /tmp /data /runs /report /submissions /reader; do
    mkdir -p $each; mount -t tmpfs -o size=8g tmpfs $each
done
rm -f /etc/hosts /etc/resolv.conf
echo "127.0.0.1 localhost $(uname -n)" > /etc/hosts
echo "{address} HEAD" >> /etc/hosts
echo "nameserver 127.0.0.1" > /etc/resolv.conf
echo ready
while read -r _; do :; done
"""


@functools.cache
def missing() -> str:
    """Why there can be no such machine here; "" where there can: it is tried."""
    if os.geteuid() != 0:
        return "a machine of its own needs root"
    lacking = [name for name in ("unshare", "nsenter", "ip", "chroot") if shutil.which(name) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Machine(Path(folder) / "m") as machine:
                code, text = machine.run(f"test -e {ROOT}/pyproject.toml && {sys.executable} -c pass", 60)
        except OSError as error:
            return str(error)
    return f"the checkout and its Python are not on the root file system: {text}" if code else ""


class Machine:
    """Commands run in the checkout, one after another; what one exports, the next finds."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is made; what was printed last lies beside it."""
        self._folder = folder
        self._init: subprocess.Popen[str] | None = None

    def __enter__(self) -> Machine:
        self._folder.mkdir()
        outside, inside = (
            text.replace("{folder}", str(self._folder)).replace("{address}", ADDRESS) for text in (_OUTSIDE, _INSIDE)
        )
        spaces = ("--mount", "--net", "--ipc", "--uts", "--cgroup", "--pid")
        pipe = subprocess.PIPE
        # Process 1 ends with the pipe to its input, and with it the machine.
        self._init = subprocess.Popen(
            ["unshare", *spaces, "--fork", "--kill-child", "bash", "-c", outside, inside],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        assert self._init.stdout
        if self._init.stdout.readline() != "ready\n":
            self._init.kill()
            raise OSError(f"no machine of its own: {self._init.communicate()[1]}")
        self._pid = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().strip()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._init is not None
        self._init.kill()  # --kill-child: and process 1, and with it all others
        self._init.communicate()

    def path(self, name: str) -> Path:
        """Where a file of the machine is seen from outside."""
        return Path(f"/proc/{self._pid}/root{name}")

    def forget_exports(self) -> None:
        self.path("/environment").unlink(missing_ok=True)

    def run(self, script: str, timeout_s: float) -> tuple[int, str]:
        """Exit code and what was printed; 124 or 137 if it did not end in time: then it is killed, without what it has
        put into sessions of their own. An exception in the meantime is the end of the machine."""
        lines = f"""
            set -e
            test ! -e /environment || source /environment
            trap 'export -p > /environment' EXIT
            cd {ROOT}
            {script}
        """
        place = [
            "nsenter",
            f"--target={self._pid}",
            "--mount",
            "--net",
            "--ipc",
            "--uts",
            "--cgroup",
            "--pid",
            "--root",
            "--wd",
        ]
        kept = {k: os.environ[k] for k in ("LANG", "TERM", "REAL_DATA") if k in os.environ}
        own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin", "HOME": "/reader"}
        own |= {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(ROOT)}
        command = ["timeout", "--kill-after=10", str(timeout_s), "bash", "-c", lines]
        log = self._folder.with_suffix(".log")
        try:
            with log.open("wb") as file:  # no pipe: servers that it leaves behind would keep that open
                done = subprocess.run(
                    [*place, *command], env=kept | own, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
                )
        except BaseException:  # a test's time is over: what it has begun must not run beside the next
            self.__exit__()
            raise
        return done.returncode, log.read_text(errors="replace")
