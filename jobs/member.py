"""One member of a campaign, started by jobs/campaign.py: joins the cluster, trains, finishes and scores one run.

What to do comes as one line of JSON on stdin, which stays open as long as the campaign's driver lives. When it ends,
however the driver died, this process ends as on Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

from jobs import command_line
from orchestrator.config import TrainConfig
from orchestrator.ray_session import ClusterError
from orchestrator.training.ownership import AtWorkError

_PAUSE_S = 3.0
_ENDING_S = 60.0  # for what Ctrl-C makes of a run; a cluster that has gone with the driver may hold it up


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a campaign that a script starts with & ignores it
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return command_line.EXIT_INTERRUPTED  # the driver has died before it could say what to do
    threading.Thread(target=_end_with_driver, daemon=True).start()
    order = json.loads(line)
    sys.argv = order["argv"]  # the command that goes on: MLflow shows it
    config, recipe = TrainConfig.from_json(order["config"]), TrainConfig.from_json(order["recipe"])
    return command_line.exit_code(lambda: run(command_line.Command(config, recipe, dry_run=False)))


def run(command: command_line.Command) -> int:
    """Train, finish and score a member, once nobody else is at work on it. Returns the exit code."""
    said = ""
    while True:
        try:
            return command_line.run(command)
        except ClusterError as error:
            # No mistake of this member's: the cluster is away, or has become smaller since the driver looked at it.
            print(f"error: {error}", flush=True)
            return command_line.EXIT_FAILED
        except AtWorkError as error:  # what a driver before has started on another machine, or somebody by hand
            if said != (said := f"waiting: {error}"):
                print(said, flush=True)
            time.sleep(_PAUSE_S)


def _end_with_driver() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    print("the campaign's driver has ended: this member ends, and goes on with the next one", flush=True)
    os.kill(os.getpid(), signal.SIGINT)  # not SIGTERM: a cluster that has gone with the driver makes no checkpoint
    time.sleep(_ENDING_S)
    os._exit(command_line.EXIT_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
