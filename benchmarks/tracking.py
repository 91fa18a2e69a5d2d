"""Steps a second beside an MLflow that works, hangs, refuses or is gone: ``python -m benchmarks.tracking [--quick]``.

A step is 5 ms of arithmetic in the main thread; after each, an event of nine metrics is put: far more than a job has.
``none``: without a tracker. The states take turns in one process, with a real server in another. The work of the server
and of its client costs processor time of its own, which counts where no processor is idle; ``put`` is the thread's
processor time. The last line is machine-readable.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from orchestrator.control.tracking import RunStatus, Tracker
from tests.mlflow_server import Fate, MlflowServer, Proxy

STEP_S = 0.005
KEYS = ("train_loss", "train_top1_error", "train_top5_error", "learning_rate", "images_per_s", "data_wait_share")
KEYS += ("replaced_images", "reduce_s")  # and the epoch


def work(matrix: np.ndarray, num_products: int) -> None:
    for _ in range(num_products):
        matrix @ matrix


def products_per_step(matrix: np.ndarray) -> int:
    work(matrix, 100)
    start_s = time.thread_time()
    work(matrix, 500)
    return max(1, round(500 * STEP_S / (time.thread_time() - start_s)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only to see that it works")
    quick = parser.parse_args().quick
    repeats, num_steps = (1, 100) if quick else (7, 600)
    logging.getLogger("orchestrator").setLevel(logging.ERROR)
    matrix = np.random.default_rng(0).random((96, 96))
    num_products = products_per_step(matrix)
    with tempfile.TemporaryDirectory(prefix="tracking-") as name:
        folder = Path(name)
        server = MlflowServer(folder)
        server.start()
        proxy = Proxy(server.port)
        try:
            server.wait_ready()
            trackers = {
                state: Tracker(
                    uri=uri,
                    experiment="speed",
                    name=state,
                    run_key=state,
                    params={},
                    tags={},
                    figure_dir=folder / state,
                )
                for state, uri in (
                    ("works", proxy.uri),
                    ("hangs", proxy.uri),
                    ("refuses", proxy.uri),
                    ("gone", "http://127.0.0.1:9"),
                )
            }
            begin: dict[str, Callable[[], None]] = {
                "none": lambda: None,
                "works": lambda: None,
                "hangs": lambda: server.signal(signal.SIGSTOP),
                "refuses": lambda: setattr(proxy, "fate", lambda call: 503),
                "gone": lambda: None,
            }
            seconds: dict[str, list[float]] = {state: [] for state in begin}
            puts_s: dict[str, list[float]] = {state: [] for state in begin}
            step = 0
            for repeat in range(repeats):
                for state in list(begin)[:: -1 if repeat % 2 else 1]:
                    begin[state]()
                    start_s = time.perf_counter()
                    for _ in range(num_steps):
                        step += 1
                        work(matrix, num_products)
                        if state in trackers:
                            metrics = dict.fromkeys(KEYS, float(step))
                            event = {"kind": "train", "step": step, "epoch": step / 100, "time_ms": step}
                            put_s = time.thread_time()
                            trackers[state].put(event | {"metrics": metrics})
                            puts_s[state].append(time.thread_time() - put_s)
                    seconds[state].append(time.perf_counter() - start_s)
                    server.signal(signal.SIGCONT)
                    proxy.fate = lambda call: Fate.PASS
            for state, values in seconds.items():
                ratio = statistics.median(none / some for none, some in zip(seconds["none"], values, strict=True))
                line = f"{state:8} {num_steps / statistics.median(values):7.1f} steps/s, {ratio:.3f} of none"
                if puts_s[state]:
                    median_s, worst_s = np.percentile(puts_s[state], [50, 99.9])
                    line += f"; put {1e6 * median_s:.0f} µs (99.9 %: {1e6 * worst_s:.0f} µs)"
                print(line)
            ended = {
                state: tracker.close(120, RunStatus.FINISHED) for state, tracker in trackers.items() if state != "gone"
            }
            trackers["gone"].close(0, RunStatus.KILLED)
            pending = sum(delivery.pending for delivery in ended.values())
            ratios = " ".join(
                f"{state}={statistics.median(n / s for n, s in zip(seconds['none'], values, strict=True)):.3f}"
                for state, values in seconds.items()
                if state != "none"
            )
            print(f"{ratios} pending_at_the_end={pending} load={os.getloadavg()[0]:.1f}")
        finally:
            proxy.close()
            server.stop()


if __name__ == "__main__":
    main()
