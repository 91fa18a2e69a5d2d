"""A driver's numbers for Prometheus: scraped from a run at work, and every number of the dashboard is one of them."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.allocation import free_port
from jobs.campaign_recipes import ilsvrc2015
from orchestrator.config import ModelConfig
from orchestrator.control.faults import NETWORK, ORDERS_VARIABLE, Orders
from orchestrator.control.metrics import Exporter
from tests.training.group import options, small_config

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "cluster" / "monitoring"


def scraped(port: int) -> dict[str, float]:
    """Samples by name; those of the run alone."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {
        s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples if s.labels.get("run") == "r"
    }


@pytest.mark.timeout(300)
def test_a_run_at_work_is_scraped_and_the_dashboard_knows_nothing_else(prepared: Path, tmp_path: Path) -> None:
    config = replace(small_config(prepared, tmp_path / "runs", "r"), model=ModelConfig(factory=NETWORK))
    config = replace(config, schedule=replace(config.schedule, max_steps=1000))
    config = replace(config, rhythm=replace(config.rhythm, validate_every_epochs=1.0, checkpoint_every_steps=5))
    orders, port = Orders(str(tmp_path / "orders")), free_port()
    orders.pace(0.1)
    words = [sys.executable, "jobs/imagenet.py", "resnet18", *options(config), "--tracking.metrics-port", str(port)]
    words += ["--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]
    plain_group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = os.environ | plain_group | {ORDERS_VARIABLE: orders.url, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = {}
    try:
        while not (found.get("resnet_checkpoints_total") and "resnet_images_per_second" in found):
            assert process.poll() is None
            time.sleep(0.2)
            try:
                found = scraped(port)
            except OSError:
                continue
        listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port}
        assert listening == {"127.0.0.1"}
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert found["resnet_steps"] == 1000
    assert 0 < found["resnet_step"] < 1000
    assert found["resnet_workers"] == found["resnet_start_number"] == found["resnet_worker_group_starts_total"] == 1
    assert 0 <= found["resnet_validation_top1_error_ratio"] <= 1
    assert found["resnet_last_checkpoint_timestamp_seconds"] == pytest.approx(time.time(), abs=120)
    assert found["resnet_learning_rate"] == pytest.approx(config.schedule.lr)
    with pytest.raises(OSError, match="refused"):
        scraped(port)

    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    known = found.keys() | {f"ray_{name}" for name in METRICS_GAUGES}
    dashboard = json.loads((MONITORING / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expression in asked for name in re.findall(r"\b(?:resnet|ray)_\w+", expression)}
    assert len(names) > 15
    assert names <= known, names - known
    assert {n for n in found if n.startswith("resnet_") and not n.endswith("_created")} <= names


ALARM = "time() - resnet_last_checkpoint_timestamp_seconds > 7200 and resnet_step < resnet_steps"


def test_the_alarm_of_the_docs_watches_a_run_from_its_first_step_to_its_last(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"`{ALARM}`" in (ROOT / "docs" / "watching.md").read_text()
    port, now_s = free_port(), 10_000.0
    exporter = Exporter("r", "127.0.0.1", port)
    monkeypatch.setattr("prometheus_client.metrics.time", SimpleNamespace(time=lambda: now_s))

    def after(seconds: float, *events: dict[str, Any]) -> tuple[bool, float]:
        """Whether the alarm is on, and at which step the run is."""
        nonlocal now_s
        now_s += seconds
        for event in events:
            exporter.put(event)
        found = scraped(port)
        s = {name: found.get(f"resnet_{name}", math.nan) for name in ("step", "steps")}
        late = now_s - found.get("resnet_last_checkpoint_timestamp_seconds", math.nan) > 7200
        return late and s["step"] < s["steps"], s["step"]

    start, checkpoint = {"kind": "start", "steps": 100, "workers": 1}, {"kind": "checkpoint"}
    try:
        assert not after(0, {"kind": "placed", "attempt": 1})[0]
        assert after(10, start | {"step": 0}) == (False, 0)
        assert after(7200, {"kind": "progress", "step": 30}) == (True, 30)  # there was no checkpoint yet
        assert after(10, start | {"step": 0}) == (True, 0)  # workers that start over are no checkpoint
        assert after(10, {"kind": "progress", "step": 40}, checkpoint | {"step": 30}) == (False, 40)
        assert after(7201) == (True, 40)
        assert after(0, {"kind": "saving", "step": 60, "stall_s": 0.1}, checkpoint | {"step": 60}) == (False, 60)
        assert after(0, {"kind": "finished", "steps": 60}, checkpoint | {"step": 60}) == (False, 60)  # a policy's end
        assert after(9999, {"kind": "test", "step": 30}) == (False, 60)  # of the best checkpoint
    finally:
        exporter.close()


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"metrics cannot be served at 127.0.0.1:{port}"):
            Exporter("r", "127.0.0.1", port)


def test_members_of_a_campaign_have_ports_of_their_own() -> None:
    campaign = ilsvrc2015()
    tracked = replace(campaign.config, tracking=replace(campaign.config.tracking, metrics_port=9400))
    ports = [c.tracking.metrics_port for c in replace(campaign, config=tracked).run_configs().values()]
    assert ports == list(range(9400, 9406))
    assert {c.tracking.metrics_port for c in campaign.run_configs().values()} == {0}
