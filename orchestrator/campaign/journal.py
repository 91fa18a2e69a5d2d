"""The folder of a campaign in storage: what makes it this campaign, and what its drivers have done.

::

    campaign.json          identity: members, how they are tested, what is submitted, data digest
    attempts/              whose the campaign is, as a run's (``ownership``)
    journal/000001.json    one event each, created exclusively by the one driver that owns the campaign
    members/NAME/          a run each
    logs/NAME.log          what a member's processes have printed
    ensemble/  submission/ what came of it
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from orchestrator.campaign.decisions import Entry, Kind
from orchestrator.campaign.plan import Campaign, Plan
from orchestrator.config import GuardConfig, TrackingConfig, TrainConfig
from orchestrator.plain import differences, digest
from orchestrator.remote import StoreRefusedError
from orchestrator.storage import Storage
from orchestrator.training.ownership import SupersededError

_IDENTITY = "campaign.json"

# -- identity -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """What a reader of the folder is told of a campaign: each member's config, by name in the recipe's order, and its
    steps; members without which there is no submission; digest of the data.
    """

    members: dict[str, TrainConfig]
    steps: dict[str, int]
    recipe: str
    data_sha256: str


def fix_identity(folder: Storage, plan: Plan, data_sha256: str) -> None:
    """Write what a new campaign is. Raises ValueError where the name is taken by another, with the differences."""
    campaign = plan.campaign
    identity = campaign.identity() | {"data_sha256": data_sha256}
    about = {
        "members": [[name, _kept(config).to_json()] for name, config in campaign.run_configs().items()],
        "steps": dict(plan.steps),
        "recipe": campaign.config.recipe,
    }
    plain = {"identity": identity, "about": about}
    content = json.dumps({"sha256": digest(plain), "campaign": plain}, indent=1, sort_keys=True).encode()
    if not folder.create(_IDENTITY, content) and _stored(folder) is None:
        folder.publish(_IDENTITY, content)  # torn by a kill when the campaign was new
    check_identity(folder, campaign, data_sha256)


def _kept(config: TrainConfig) -> TrainConfig:
    """Without what may change at every start: an address of MLflow may hold a password, which has no place here."""
    return replace(config, tracking=TrackingConfig(), guard=GuardConfig())


def check_identity(folder: Storage, campaign: Campaign, data_sha256: str | None) -> None:
    """Refuse another campaign, or other data (None: not looked at), under the name of an old one. Raises ValueError."""
    try:
        stored = _stored(folder)
    except FileNotFoundError:
        return
    if stored is None:
        return
    old = stored["identity"]
    new = campaign.identity() | {"data_sha256": data_sha256 or old["data_sha256"]}
    if changed := differences(old, json.loads(json.dumps(new))):
        more = f"; and {len(changed) - 12} more" if len(changed) > 12 else ""
        raise ValueError(
            f"campaign {campaign.config.name!r} exists as another (old → new): {'; '.join(changed[:12])}{more}. "
            "Use the old values to go on with it, or choose another --name"
        )


def read_about(folder: Storage) -> About:
    """What the campaign in ``folder`` is. Raises ValueError where there is none."""
    try:
        stored = _stored(folder)
    except FileNotFoundError:
        stored = None
    if stored is None:
        raise ValueError(f"there is no campaign in {folder.url}: give --storage and --name as when it was started")
    about = stored["about"]
    members = {name: TrainConfig.from_json(config) for name, config in about["members"]}
    return About(members, about["steps"], about["recipe"], stored["identity"]["data_sha256"])


def _stored(folder: Storage) -> dict[str, Any] | None:
    """What campaign.json holds; None where it is torn and nothing depends on it. Raises ValueError where that does,
    FileNotFoundError for a new campaign.
    """
    try:
        content = json.loads(folder.read(_IDENTITY))
        plain = dict(content["campaign"])
        if content["sha256"] == digest(plain):
            return plain
    except StoreRefusedError:
        raise
    except (ValueError, KeyError, TypeError):
        pass
    if folder.files("journal"):
        raise ValueError(
            f"{folder.url}/{_IDENTITY} is damaged: restore it; or, if you are sure that this command is the "
            "campaign's, delete it, and the same command writes it again"
        )
    return None


# -- journal --------------------------------------------------------------------------------------------------------


class Journal:
    """The events of a campaign, oldest first. Written by the driver of start number ``driver``; 0: read only."""

    def __init__(self, folder: Storage, driver: int = 0) -> None:
        self._folder, self._driver = folder, driver
        self._newest = 0  # number of the newest file that was seen
        self.entries: list[Entry] = []
        self.refresh()

    def refresh(self) -> None:
        """Read what is new."""
        for name in self._folder.files("journal"):
            number = PurePosixPath(name).stem
            if name.endswith(".json") and number.isdecimal() and int(number) > self._newest:
                self._newest = int(number)
                if (entry := _read(self._folder, name)) is not None:
                    self.entries.append(entry)

    def add(self, kind: Kind, member: str = "", **detail: Any) -> Entry:
        """Write the next event. Raises SupersededError where a newer driver has written to the journal."""
        assert self._driver, "read only"
        while True:
            entry = Entry(self._newest + 1, kind, self._driver, member, detail, int(time.time()))
            plain = {"kind": kind.value, "driver": entry.driver, "member": member, "detail": detail}
            plain |= {"number": entry.number, "time_s": entry.time_s, "nonce": secrets.token_hex(8)}
            data = json.dumps({"sha256": digest(plain), "entry": plain}, indent=1, sort_keys=True).encode()
            if self._folder.create(f"journal/{entry.number:06d}.json", data):
                self._newest = entry.number
                self.entries.append(entry)
                return entry
            self.refresh()  # another driver's: an older one's came late and does not count
            if any(other.driver > self._driver for other in self.entries):
                raise SupersededError(
                    f"campaign {self._folder.url} was claimed by another driver: this one stops here, and the newer "
                    "one goes on"
                )


def _read(folder: Storage, name: str) -> Entry | None:
    """None for what a kill has torn: whoever wrote it has not acted on it."""
    try:
        content = json.loads(folder.read(name))
        plain: Mapping[str, Any] = content["entry"]
        if content["sha256"] != digest(dict(plain)):
            return None
        detail = plain["detail"]
        return Entry(plain["number"], Kind(plain["kind"]), plain["driver"], plain["member"], detail, plain["time_s"])
    except StoreRefusedError:
        raise
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
