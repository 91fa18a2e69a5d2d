"""The curves of all members of a campaign in one figure, from the journals in their folders."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field

from orchestrator.campaign.note import CampaignNote, MemberNote
from orchestrator.control.curves import Curve, draw_curves
from orchestrator.control.mlflow_store import one_line
from orchestrator.control.run_tracking import figure_path, keep_figure
from orchestrator.masking import masked
from orchestrator.storage import Storage
from orchestrator.training.checkpoint import newest_journal
from orchestrator.training.run import run_storage

_log = logging.getLogger(__name__)

_MIN_INTERVAL_S = 60.0  # between two readings of the journals of members that are at work


@dataclass
class History:
    """What a member's journal tells, and when its first and last events were; ``is_whole``: nothing more comes."""

    curve: Curve = field(default_factory=Curve)
    first_ms: int | None = None
    last_ms: int | None = None
    is_whole: bool = False


class CampaignFigure:
    """Draws ``figures/errors.png`` of the campaign in ``folder``. Any thread may call it; nothing raises."""

    def __init__(self, name: str, folder: Storage) -> None:
        self.path = figure_path(folder)
        self.num_drawn = 0
        self._name, self._folder = name, folder
        self._lock = threading.Lock()
        self._histories: dict[str, History] = {}
        self._drawn: dict[str, tuple[int, int]] = {}
        self._next_s = 0.0

    def history(self, member: MemberNote) -> History:
        """What was read of the member's journal; it is read where it was not, or has become whole since."""
        with self._lock:
            known = self._histories.get(member.name)
            is_old = known is None or (member.end is not None and not known.is_whole)
            return self._read(member) if is_old or known is None else known

    def draw(self, note: CampaignNote, *, is_last: bool = False) -> None:
        """Draw what is new; not more often than once a minute, but for the last one."""
        with self._lock:
            if time.monotonic() < self._next_s and not is_last:
                return
            self._next_s = time.monotonic() + _MIN_INTERVAL_S
            try:
                curves = {member.name: self._read(member).curve for member in note.members}
                sizes = {name: (len(curve.training), len(curve.validation)) for name, curve in curves.items()}
                if sizes == self._drawn or all(curve.is_empty() for curve in curves.values()):
                    return
                draw_curves(curves, self.path, title=masked(self._name))
                keep_figure(self._folder)
                self._drawn = sizes
                self.num_drawn += 1
            except Exception as error:
                _log.warning("tracking of campaign %s: no figure (%s)", self._name, one_line(error))

    def _read(self, member: MemberNote) -> History:
        known = self._histories.get(member.name)
        if known is not None and known.is_whole:
            return known
        try:
            events = newest_journal(run_storage(member.config))
        except (OSError, ValueError) as error:
            _log.info("tracking of campaign %s: no journal of %s (%s)", self._name, member.name, one_line(error))
            return known or History()
        times = [event["time_ms"] for event in events if isinstance(event.get("time_ms"), int)]
        history = History(Curve.of(events), min(times, default=None), max(times, default=None), member.end is not None)
        self._histories[member.name] = history
        return history
