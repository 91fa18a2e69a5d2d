"""A real MLflow server in a process of its own, and a proxy before it that does to calls what networks do."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """A server on loopback, in a process group of its own so that all of it can be signalled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "server.db"
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.database}", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self.folder, start_new_session=True
            )

    def wait_ready(self, timeout_s: float = 90) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline_s, (self.folder / "server.log").read_text()
            time.sleep(0.05)

    def is_running(self) -> bool:
        return self._process is not None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def stop(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait(timeout=30)
            self._process = None

    def lose(self) -> None:
        """Kill the server, and delete its database and files."""
        self.stop()
        for path in self.folder.glob("server.db*"):
            path.unlink()


class Fate(Enum):
    """What becomes of a call, besides an answer with an error's number."""

    PASS = "passed on, and answered"
    LOSE_ANSWER = "passed on; the connection is cut instead of an answer"
    HOLD = "passed on when it is released"


class Proxy:
    """What stands between a client and the server; ``fate`` decides over each call.

    A call is called by its method and the end of its path: ``POST runs/create``. A number is the status of a refusal.
    """

    def __init__(self, server_port: int) -> None:
        self.fate: Callable[[str], Fate | int] = lambda call: Fate.PASS
        self.released = threading.Event()
        self.calls: Counter[str] = Counter()
        self.held: Counter[str] = Counter()
        self._server_port = server_port
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def _pass(self) -> None:
                with contextlib.suppress(OSError):  # a client that has not waited
                    proxy._handle(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass  # noqa: N815  # their names are the library's

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        call = f"{request.command} {urlsplit(request.path).path.partition('/mlflow/')[2]}"
        with self._lock:
            self.calls[call] += 1
        fate = self.fate(call)
        if isinstance(fate, int):
            request.send_error(fate)
            return
        if fate is Fate.HOLD:
            with self._lock:
                self.held[call] += 1
            self.released.wait()
            with self._lock:
                self.held[call] -= 1
        connection = http.client.HTTPConnection("127.0.0.1", self._server_port, timeout=60)
        try:
            headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "accept-encoding")}
            connection.request(request.command, request.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        except OSError:
            request.send_error(502)
            return
        finally:
            connection.close()
        if fate is Fate.LOSE_ANSWER:
            request.connection.shutdown(socket.SHUT_RDWR)
            return
        request.send_response(answer.status)
        request.send_header("Content-Type", answer.getheader("Content-Type", "application/json"))
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)
