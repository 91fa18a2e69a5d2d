"""A real S3 protocol server in a process of its own, that can be made to fail: ``python -m tests.s3_server PORT``.

Moto's server behind a door that answers every n-th request with an error, drops it, or is shut for a while. What was
stored stays. Commands come line by line on standard input: ``fail N`` (0: never), ``stop``, ``start``,
``hang SECONDS``, ``count``.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY, SECRET = "test-access-key", "test-secret-that-must-not-be-seen"
BUCKET = "bucket"


@dataclass
class S3Server:
    """The running server, as a test sees it."""

    port: int
    _process: subprocess.Popen[str]

    @property
    def environment(self) -> dict[str, str]:
        """How users tell an fsspec program where the store is."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def tell(self, command: str) -> str:
        """Do ``command``; what the server says when it is done."""
        assert self._process.stdin
        assert self._process.stdout
        print(command, file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()

    def num_requests(self) -> int:
        return int(self.tell("count"))


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server with one empty bucket, on a free port of this machine."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.s3_server", "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    try:
        assert process.stdout
        port = int(process.stdout.readline())
        yield S3Server(port, process)
    finally:
        process.kill()
        process.wait()


class _Faulty:
    """A WSGI application that fails now and then, each time in another way."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()
        self._ways = itertools.cycle(["500", "503", "dropped", "cut"])
        self.every = 0
        self.count = 0
        self.hangs_until_s = 0.0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        time.sleep(max(0.0, self.hangs_until_s - time.monotonic()))
        with self._lock:
            self.count += 1
            way = next(self._ways) if self.every and self.count % self.every == 0 else ""
        if way in ("500", "503"):
            code = {"500": "InternalError", "503": "SlowDown"}[way]
            body = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
            start_response(f"{way} on purpose", [("Content-Type", "application/xml")])
            return [body]
        if way == "dropped":
            self._hang_up(environ)
        answer = self._application(environ, start_response)
        return self._cut(environ, b"".join(answer)) if way == "cut" else answer

    def _cut(self, environ: dict[str, Any], body: bytes) -> Iterator[bytes]:
        """Less than its Content-Length promises."""
        yield body[: len(body) // 2]
        self._hang_up(environ)

    def _hang_up(self, environ: dict[str, Any]) -> None:
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("on purpose")


def main(port: int) -> None:
    os.environ |= {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import BaseWSGIServer, make_server

    logging.getLogger("werkzeug").disabled = True
    faulty = _Faulty(DomainDispatcherApplication(create_backend_app))

    def start(port: int) -> BaseWSGIServer:
        server = make_server("127.0.0.1", port, faulty, threaded=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    server: BaseWSGIServer | None = start(port)
    assert server
    port = server.port
    import botocore.session

    client = botocore.session.get_session().create_client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    client.create_bucket(Bucket=BUCKET)
    print(port, flush=True)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        match command:
            case "fail":
                faulty.every = int(argument)
            case "hang":
                faulty.hangs_until_s = time.monotonic() + float(argument)
            case "stop" if server:
                server.shutdown()
                server.server_close()
                server = None
            case "start" if not server:
                server = start(port)
        print(faulty.count if command == "count" else command, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
