"""Object stores that fail, are away, or are named wrongly, over a real S3 server."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import pickle
import random
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

import orchestrator.storage
from orchestrator import remote
from orchestrator.remote import Line, StoreUnreachableError
from orchestrator.storage import Storage, sha256_hex
from tests.s3_server import BUCKET, KEY, SECRET, S3Server

ROOT = Path(__file__).parents[1]
# How long the store is away, seconds. `make outage` makes it a minute.
OUTAGE_S = float(os.environ.get("OUTAGE_S", "4"))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The S3 library tries once and waits a second: what holds is ours."""
    monkeypatch.setattr(orchestrator.storage, "_S3_TRIES", 1)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1}})


@pytest.mark.usefixtures("alone")
def test_one_request_in_ten_may_fail(s3: S3Server, tmp_path: Path) -> None:
    storage = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    large = random.Random(0).randbytes(40 << 20)
    s3.tell("fail 10")
    with storage.publishing("large") as stream:
        stream.write(large)
    for i in range(12):
        storage.publish(f"small/{i}", b"%d" % i)
        assert storage.create(f"lease/{i}", b"mine %d" % i)
        assert not storage.create(f"lease/{i}", b"yours %d" % i)
    assert [storage.read(f"small/{i}") for i in range(12)] == [b"%d" % i for i in range(12)]
    assert storage.read_ranges([(f"lease/{i}", 0, 4) for i in range(12)]) == [b"mine"] * 12
    assert storage.read("large", sha256_hex(large))
    with storage.reading("large") as stream:
        assert stream.read(100) == large[:100]
        stream.seek(33 << 20)
        assert stream.read() == large[33 << 20 :]
    assert len(storage.files("small")) == 12
    assert len(storage.find()) == 25
    storage.delete("small")
    assert storage.files("small") == []


@pytest.mark.usefixtures("alone")
def test_an_outage_is_waited_for(s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    storage.publish("x", b"before")
    s3.tell("stop")
    timer = threading.Timer(OUTAGE_S, s3.tell, ["start"])
    timer.start()
    with caplog.at_level(logging.WARNING):
        storage.publish("y", b"after")
    timer.join()
    assert "no answer; waiting up to 300 s" in caplog.text
    assert (storage.read("x"), storage.read("y")) == (b"before", b"after")


@pytest.mark.usefixtures("alone")
def test_a_store_that_hangs_is_waited_for(s3: S3Server, tmp_path: Path) -> None:
    storage = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    s3.tell(f"hang {OUTAGE_S}")
    storage.publish("x", b"late")
    assert storage.read("x") == b"late"


def _fails_until(end_s: float, text: str = "nobody there") -> str:
    if time.monotonic() < end_s:
        raise ConnectionRefusedError(text)
    return "back"


def test_patience_ends() -> None:
    line = Line(first_contact_s=0.2, patience_s=0.6)
    with pytest.raises(ValueError, match="AWS_ENDPOINT_URL"):
        line.call("s3://x/y", lambda: _fails_until(math.inf))
    assert line.call("s3://x/y", lambda: _fails_until(0)) == "back"
    with pytest.raises(StoreUnreachableError, match="the same command goes on"):
        line.call("s3://x/y", lambda: _fails_until(math.inf))


def test_waiting_is_told_once_by_many_threads(caplog: pytest.LogCaptureFixture) -> None:
    line = Line(patience_s=30)
    line.call("s3://x/y", lambda: None)
    end_s = time.monotonic() + 3
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(4) as threads:
        assert (
            list(threads.map(lambda i: line.call(f"s3://x/{i}", lambda: _fails_until(end_s)), range(4))) == ["back"] * 4
        )
    told = [record.message for record in caplog.records if record.name == remote.__name__]
    assert len(told) == 2
    assert "no answer; waiting up to 30 s (ConnectionRefusedError: nobody there)" in told[0]
    assert "waited" in told[1]


@pytest.mark.parametrize("name", ["SSL-resnet50", "r50-403", "train/n01440764-403.tar", "certificate/Forbidden"])
def test_names_do_not_look_like_errors(s3: S3Server, tmp_path: Path, name: str) -> None:
    storage = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    assert storage.sub(name).files("attempts") == []
    assert not storage.exists(name)
    with pytest.raises(FileNotFoundError):
        storage.read(name)
    line, end_s = Line(), time.monotonic() + 0.3
    line.call(name, lambda: None)
    assert line.call(name, lambda: _fails_until(end_s, f"s3://{name} of {name}")) == "back"


class NoCredentialsError(Exception):
    """Of the name that botocore's has, for a metadata service that is away for a moment."""


def test_what_passes_is_not_refused_by_a_store_that_has_answered() -> None:
    for kind in (NoCredentialsError, ssl.SSLError, PermissionError):
        line, end_s = Line(), time.monotonic() + 0.3

        def fails(kind: type[Exception] = kind, end_s: float = end_s) -> str:
            if time.monotonic() < end_s:
                raise kind("for now")
            return "back"

        with pytest.raises(ValueError, match="AWS_"):
            Line(first_contact_s=0).call("s3://x/y", fails)
        line.call("s3://x/y", lambda: None)
        if kind is PermissionError:  # this does not pass
            with pytest.raises(ValueError, match="the credentials do not allow this"):
                line.call("s3://x/y", fails)
        else:
            assert line.call("s3://x/y", fails) == "back"


def test_nothing_waits_in_a_process_that_ends() -> None:
    line = Line()
    line.call("s3://x/y", lambda: None)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(line.call, "s3://x/y", lambda: _fails_until(math.inf))
        time.sleep(0.5)
        started_s = time.monotonic()
        remote.stop_waiting()
        with pytest.raises(StoreUnreachableError):
            waiting.result()
    assert time.monotonic() - started_s < 1


def test_a_fault_of_the_program_is_not_tried_again() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise KeyError("x")

    with pytest.raises(KeyError):
        Line().call("s3://x/y", fail)
    assert len(calls) == 1


PROBE = "import sys; from orchestrator.storage import Storage; Storage(sys.argv[1]).check_writable()"


def _probe(url: str, environment: dict[str, str | None]) -> subprocess.Popen[str]:
    settings = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    command = [sys.executable, "-W", "error:::orchestrator", "-c", PROBE, url]
    return subprocess.Popen(command, env=settings, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_a_wrong_setting_is_named_and_no_secret_is_shown(s3: S3Server, tmp_path: Path) -> None:
    good = f"s3://{BUCKET}/{tmp_path.name}"
    virtual = json.dumps({"config_kwargs": {"s3": {"addressing_style": "virtual"}}, "key": KEY, "secret": SECRET})
    cases: list[tuple[str, dict[str, str | None], str]] = [
        ("s3://no-such-bucket/x", {}, "there is no such bucket: create it"),
        ("s3://Not_A_Bucket!/x", {}, "check the URL"),
        (good, {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "check AWS_ENDPOINT_URL"),
        (good, {"AWS_ENDPOINT_URL": "somewhere"}, "AWS_ENDPOINT_URL (or FSSPEC_S3_ENDPOINT_URL) is no URL"),
        (good, {"AWS_ENDPOINT_URL": f"https://127.0.0.1:{s3.port}"}, "says https only where the store speaks it"),
        (good, {"AWS_PROFILE": "nobody"}, "AWS_PROFILE names a profile"),
        (good, {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no credentials were found: set AWS_"),
        (good, {"AWS_ENDPOINT_URL": f"http://store.invalid:{s3.port}", "FSSPEC_S3": virtual}, "addressing_style"),
    ]
    # Fewer tries than usual, inside botocore: less to wait for.
    environment = {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path), "AWS_MAX_ATTEMPTS": "1"}
    running = [_probe(url, environment | changed) for url, changed, _ in cases]
    for process, (url, changed, saying) in zip(running, cases, strict=True):
        text = process.communicate(timeout=120)[1]
        assert process.returncode == 1, (url, changed)
        assert saying in text.splitlines()[-1], (changed, text)
        assert SECRET not in text


def test_settings_are_those_of_fsspec(s3: S3Server, tmp_path: Path) -> None:
    """Path addresses, an endpoint and credentials from FSSPEC_S3 alone, and from a file."""
    url = f"s3://{BUCKET}/{tmp_path.name}"
    bare: dict[str, str | None] = {**dict.fromkeys(s3.environment), "AWS_EC2_METADATA_DISABLED": "true"}
    options: dict[str, object] = {"endpoint_url": f"http://127.0.0.1:{s3.port}", "key": KEY, "secret": SECRET}
    options["config_kwargs"] = {"s3": {"addressing_style": "path"}}
    folder = tmp_path / ".config" / "fsspec"
    folder.mkdir(parents=True)
    (folder / "conf.json").write_text(json.dumps({"s3": options}))
    running = [
        _probe(url, bare | {"FSSPEC_S3": json.dumps(options), "HOME": "/nowhere"}),
        _probe(url, bare | {"HOME": str(tmp_path)}),
    ]
    for process in running:
        text = process.communicate(timeout=120)[1]
        assert process.returncode == 0, text


def test_a_storage_that_travels_carries_no_secret(s3: S3Server, tmp_path: Path) -> None:
    storage = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    storage.publish("x", b"1")
    data = pickle.dumps(storage)
    assert SECRET.encode() not in data
    assert SECRET not in repr(storage)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read, (data,)) == b"1"


def _read(data: bytes) -> bytes:
    storage: Storage = pickle.loads(data)
    return storage.read("x")
