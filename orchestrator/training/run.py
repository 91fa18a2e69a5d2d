"""The folder of a run in storage: what makes it this run, and how it ended.

::

    config.json            identity: everything that makes two runs the same run, data digest included; beside it, as
                           labels, the recipe, where the data set was, and MLflow's experiment
    attempts/              see ownership.py
    checkpoints/           see checkpoint.py
    logs/                  what its workers have printed (control/worker_log.py)
    finished.json          the outcome, published last
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from orchestrator.config import TrackingConfig, TrainConfig
from orchestrator.data.shards import DataSet
from orchestrator.plain import differences, digest
from orchestrator.remote import StoreRefusedError
from orchestrator.storage import Storage

Found = TypeVar("Found")


def run_storage(config: TrainConfig) -> Storage:
    """The folder of the run."""
    return Storage(config.storage).sub(config.name)


# -- identity -------------------------------------------------------------------------------------------------------


def fix_identity(run: Storage, config: TrainConfig, data: DataSet) -> None:
    """Write the identity of a new run. Raises ValueError where the name is taken by another."""
    identity = _identity(config, data.digest)
    labels = {"recipe": config.recipe, "data": data.storage.url, "experiment": config.tracking.experiment}
    plain = {"sha256": digest(identity), "identity": identity, **labels}
    content = json.dumps(plain, indent=1, sort_keys=True).encode()
    if not run.create("config.json", content) and _stored_identity(run) is None:
        run.publish("config.json", content)  # torn by a kill when the run was new
    check_identity(run, config, data)


def check_identity(run: Storage, config: TrainConfig, data: DataSet | None) -> None:
    """Refuse a changed config, or other data (None: not looked at), under the name of an old run. Raises ValueError."""
    try:
        old = _stored_identity(run)
    except FileNotFoundError:
        return
    if old is None:
        return
    new = _identity(config, data.digest if data is not None else old.get("data_sha256"))
    changed = differences(old, new)
    if changed:
        raise ValueError(
            f"run {config.name!r} exists with another config (old → new): {'; '.join(changed)}. "
            "Use the old values to go on with it, or choose another --name"
        )


def _stored_identity(run: Storage) -> dict[str, Any] | None:
    """What config.json says; None where it is torn and no checkpoint depends on it.

    Raises ValueError where one does, FileNotFoundError for a new run.
    """
    try:
        content = json.loads(run.read("config.json"))
        identity = dict(content["identity"])
        if content["sha256"] == digest(identity):
            return identity
    except StoreRefusedError:
        raise
    except (ValueError, KeyError, TypeError):
        pass
    if run.files("checkpoints"):
        raise ValueError(
            f"{run.url}/config.json is damaged: restore it; or, if you are sure that this command is the run's, delete "
            "it, and the same command writes it again"
        )
    return None


def config_of(run: Storage, base: TrainConfig) -> TrainConfig:
    """The config of the run in ``run``: its identity, recipe and, where ``base`` names none, data set and MLflow's
    experiment; the rest of base.

    Raises ValueError where there is no run, or its config cannot be read.
    """
    try:
        identity = _stored_identity(run)
        content = json.loads(run.read("config.json"))
    except FileNotFoundError:
        identity = None
    if identity is None:
        raise ValueError(f"there is no run {run.url} (no config.json): give --storage and --name of one")
    plain = base.to_json() | {"recipe": content.get("recipe", ""), "data": base.data or content.get("data", "")}
    if base.tracking.experiment == TrackingConfig.experiment:
        plain["tracking"]["experiment"] = content.get("experiment", TrackingConfig.experiment)
    del identity["data_sha256"]
    for key, value in identity.items():
        plain[key] = plain[key] | value if isinstance(value, dict) else value
    return TrainConfig.from_json(plain)


def data_digest(run: Storage) -> str:
    """The digest of the data set that the run was started on. Raises FileNotFoundError for a new run."""
    return str(json.loads(run.read("config.json"))["identity"]["data_sha256"])


def _identity(config: TrainConfig, data_sha256: str | None) -> dict[str, Any]:
    return config.identity() | {"data_sha256": data_sha256}


# -- outcome --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a run ended: errors in percent, of the last validation; SHA-256 over all weights and buffers."""

    steps: int
    validation_top1_error: float
    validation_top5_error: float
    best_validation_top1_error: float
    checkpoint: str
    best_checkpoint: str
    weights_sha256: str


def finish(run: Storage, outcome: Outcome) -> None:
    """Record that the run is done."""
    run.publish("finished.json", json.dumps(asdict(outcome), indent=1, sort_keys=True).encode())


def finished(run: Storage) -> Outcome | None:
    """The outcome of a run that is done, else None: where it is torn, the last checkpoint leads to it again.

    Raises ValueError where it is torn and there is no checkpoint.
    """
    try:
        return Outcome(**json.loads(run.read("finished.json")))
    except StoreRefusedError:
        raise
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        if run.files("checkpoints"):
            return None
        raise ValueError(
            f"{run.url}/finished.json is damaged, and there are no checkpoints: delete it to train the run again"
        ) from None


# -- what another worker has written --------------------------------------------------------------------------------


_LISTING_S = 60.0  # after which every machine sees what another has written, whatever its file system caches


def eventually(look: Callable[[], Found | None], what: str) -> Found:
    """What ``look`` finds at last. Raises OSError."""
    until_s = time.monotonic() + _LISTING_S
    while (found := look()) is None:
        if time.monotonic() > until_s:
            raise OSError(f"{what} was written by another worker and is not seen from here: is it one storage for all?")
        time.sleep(0.5)
    return found
