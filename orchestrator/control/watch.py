"""The driver's eye on a run: passes events on, ends workers that hang, calls workers off machines that go away."""

from __future__ import annotations

import _thread
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from orchestrator.config import GuardConfig
from orchestrator.control.guard import Beat, Ending, Failure, FailureClass, Hang, Refusal, Watchdog
from orchestrator.control.mailbox import Post
from orchestrator.control.placement import Placement
from orchestrator.control.stuck import end_on
from orchestrator.training.notices import Event, notice
from orchestrator.training.ownership import Claim
from orchestrator.training.pulse import Wish

_log = logging.getLogger(__name__)

_POLL_S = 0.25
_NODES_POLL_S = 2.0
_SAVE_EVERY_S, _MAX_SAVES = 10.0, 20
_ENDING_S = 30.0
_MAILBOX_S = 60.0  # without an answer of the mailbox, after which it is taken for lost
_KILL_TIMEOUT_S = 30.0
_ABORT_S = 15.0
_LEFT_BEHIND_S = 20.0  # Ray itself ends workers in a few seconds; a sign of life may come every 16 (mailbox.py)


class Watch:
    """A thread of the driver beside ``TorchTrainer.fit``; every error of its own is logged, and ends nothing."""

    def __init__(
        self,
        run: str,
        mailbox: Any,
        limits: GuardConfig,
        placement: Placement,
        owner: Claim,
        listen: Callable[[Event], None],
        leaves: threading.Event,
    ) -> None:
        """``leaves`` is set when the driver's place is about to go away."""
        self._leaves = leaves
        self._mailbox, self._limits, self._placement, self._owner = mailbox, limits, placement, owner
        self._run_name, self._listen = run, listen
        self._watchdog = Watchdog(limits.hang_timeout_s)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._lock = threading.Lock()
        self._is_fitting = False
        self._started_s: float | None = None  # on the mailbox's clock
        self._nodes_looked_at_s = self._saved_s = 0.0
        self._draining: set[str] = set()
        self._has_left = False
        self._num_received = self._num_saves = 0
        self._group = ""
        self._broken_group, self._broken_s, self._ended = "", 0.0, set[int]()  # one that has lost a machine
        self._interrupted_s = 0.0
        self._signals = socket.socketpair()  # Python writes there which signals came: one end each to hear and to tell
        self.gave_up = False  # fit was interrupted from here
        self.refusal: Refusal | None = None

    def start(self) -> None:
        """From the main thread, just before ``fit``."""
        self._is_fitting = True
        self._signals[1].setblocking(False)
        self._told_before = signal.set_wakeup_fd(self._signals[1].fileno(), warn_on_full_buffer=False)
        self._thread.start()
        threading.Thread(target=self._insist, name="insist", daemon=True).start()

    def fit_has_ended(self) -> None:
        """From the main thread: nothing is left to interrupt."""
        with self._lock:
            self._is_fitting = False
        signal.set_wakeup_fd(self._told_before)
        self._signals[1].close()  # ends the thread that hears

    def stop(self) -> None:
        """Pass on what is left, and end."""
        self._end.set()
        self._thread.join(timeout=15)

    def _insist(self) -> None:
        """Once Ctrl-C is pressed, press it again until ``fit`` ends.

        Ray's handler asks its controller to end, which does not hear while it waits for machines; the third time it
        ends without it.
        """
        with self._signals[0] as hears:
            while (numbers := hears.recv(64)) and signal.SIGINT not in numbers:
                pass
            while numbers and not self._end.wait(_ABORT_S):
                with self._lock:
                    if not self._is_fitting:
                        return
                    _thread.interrupt_main(signal.SIGINT)

    def _run(self) -> None:
        heard_s, told = time.monotonic(), False
        while True:
            last_round = self._end.is_set()
            try:
                self._round(last_round)
                heard_s = time.monotonic()
            except Exception as error:
                if time.monotonic() - heard_s > _MAILBOX_S:
                    text = (
                        f"run {self._run_name!r}: the driver's mailbox is gone ({type(error).__name__}): the same "
                        "command goes on from the newest checkpoint"
                    )
                    self._stop_run(Refusal(Ending.FAILED, text))
                elif not told:
                    told = True
                    # Ray's own say what there is to say; others are mistakes of ours.
                    trace = None if type(error).__module__.startswith("ray.") else error
                    said = str(error).partition("\n")[0]
                    what = f"{type(error).__name__}: {said}"
                    _log.warning("the watch over the workers goes on after an error (%s)", what, exc_info=trace)
            if last_round:
                return
            self._end.wait(_POLL_S)

    def _round(self, is_last: bool) -> None:
        import ray

        post = ray.get(self._mailbox.take.remote(self._num_received), timeout=30)
        self._num_received += len(post.events)
        for event in post.events:
            with suppress(Exception):  # whatever goes wrong in showing the run must not end it
                self._listen(event)
        if not is_last:
            self._look(post)

    def _look(self, post: Post) -> None:
        if self._owner.lost and post.refusal is None:
            text = f"run {self._run_name!r} was claimed by another driver: it stops here, and the newer one goes on"
            self._stop_run(Refusal(Ending.SUPERSEDED, text))
        elif post.refusal is not None:
            self._stop_run(post.refusal)
        else:
            self._look_for_leave()
            self._look_for_workers(post)
            hang = self._watchdog.look(post.now_s, post.group, post.beats)
            # Ray ends a group soon after a worker has failed: one that goes on long after has not been ended.
            last_s = max((beat.heard_s for beat in post.beats), default=0.0)
            is_ending = post.failed_s is not None and last_s < post.failed_s + _ENDING_S
            if hang is not None and not is_ending:
                threading.Thread(target=self._end_hang, args=(hang, post), name="end-hang", daemon=True).start()
            if post.beats and time.monotonic() - self._nodes_looked_at_s > _NODES_POLL_S:
                self._nodes_looked_at_s = time.monotonic()
                self._look_for_drains(post)
                self._look_for_left_behind(post)
                self._look_for_room(post)

    def _look_for_workers(self, post: Post) -> None:
        """Whether any worker is left: Ray itself waits for machines for ever."""
        self._started_s = self._started_s or post.now_s
        sign_s = max([self._started_s, *(beat.heard_s for beat in post.beats), post.begun_s if post.group else 0.0])
        silent_s = post.now_s - sign_s
        if silent_s > self._limits.wait_for_workers_s:
            self._give_up(
                f"no worker could be started for {silent_s:.0f} s (guard.wait_for_workers_s): the cluster has lost too "
                "many machines, or others use them"
            )

    def _give_up(self, why: str) -> None:
        self._mailbox.give_up.remote(why)

    def _end_hang(self, hang: Hang, post: Post) -> None:
        """Say who holds the others up and what it does, and kill it: Ray then starts the group again."""
        late = hang.late[:8]
        for beat in late:
            place = post.places[beat.rank]
            words = end_on(place, _KILL_TIMEOUT_S)
            text = f"no progress for {hang.seconds:.0f} s: {_standing(beat, hang, post)}; {words}"
            failure = Failure(FailureClass.INFRASTRUCTURE, str(place), text)
            self._mailbox.failed.remote(post.group, beat.rank, failure)
            self._mailbox.put.remote([notice(f"{failure}; all workers start again")])

    def _look_for_leave(self) -> None:
        if self._leaves.is_set() and not self._has_left:
            self._has_left = True
            self._mailbox.leave.remote()
            self._listen(notice("asked to leave (SIGTERM): a checkpoint now, then the end; again: at once"))

    def _look_for_drains(self, post: Post) -> None:
        """Machines that are about to be taken away (Ray's drain state): a checkpoint, then elsewhere."""
        import ray

        # Ray's own get_preemption_info() is a barrier of all workers; this asks its control store.
        draining = set(ray._private.state.state.get_draining_nodes() or {})
        ours = {place.node: place.host for place in post.places.values() if place.node in draining}
        if ours:
            self._mailbox.wish.remote(post.group, Wish.LEAVE)
        for node in ours.keys() - self._draining:
            self._listen(notice(f"node {node[:8]} ({ours[node]}) is going away: a checkpoint now, then on elsewhere"))
        self._draining |= ours.keys()

    def _look_for_left_behind(self, post: Post) -> None:
        """Ray drops a group one of whose machines it takes for dead, but where the network is cut it may leave the
        processes of the others at work: stuck in a reduction, on a CPU or GPU that the next group needs.
        """
        import ray

        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        lost = {place.node: place.host for place in post.places.values() if place.node not in alive}
        if not lost:
            return
        if post.group != self._broken_group:
            self._broken_group, self._broken_s, self._ended = post.group, post.now_s, set()
            machines = ", ".join(f"{node[:8]} ({host})" for node, host in list(lost.items())[:8])
            self._listen(notice(f"node {machines} is lost to Ray: the workers start again once there are enough nodes"))
        for beat in post.beats:
            place = post.places[beat.rank]
            if beat.heard_s > self._broken_s + _LEFT_BEHIND_S and place.node in alive and place.pid not in self._ended:
                self._ended.add(place.pid)
                threading.Thread(target=end_on, args=(place, _KILL_TIMEOUT_S), name="end-left", daemon=True).start()

    def _look_for_room(self, post: Post) -> None:
        """Ray enlarges an elastic group at its own time and without a word: a checkpoint is not to be old then."""
        p = self._placement
        if not p.is_elastic or len(post.places) >= p.most_workers:
            return
        import ray

        if post.group != self._group:
            self._group, self._num_saves = post.group, 0
        nodes = ray._private.state.available_resources_per_node().values()  # as Ray counts, node by node
        has_room = any(free.get("CPU", 0) >= p.cpus_per_worker and free.get("GPU", 0) >= p.use_gpu for free in nodes)
        # Ray looks once a minute; where it does not take the room, it has its reasons.
        if has_room and self._num_saves < _MAX_SAVES and time.monotonic() - self._saved_s > _SAVE_EVERY_S:
            self._saved_s, self._num_saves = time.monotonic(), self._num_saves + 1
            self._mailbox.wish.remote(post.group, Wish.SAVE)

    def _stop_run(self, refusal: Refusal) -> None:
        """Make ``fit`` return: Ray would start the workers again, only for them to hear that it is no use."""
        with self._lock:
            if not self._is_fitting or (self.gave_up and time.monotonic() - self._interrupted_s < _ABORT_S):
                return
            # Ray's controller does not hear of it while it waits for machines: it takes a third time for an order.
            self.gave_up, self.refusal, self._interrupted_s = True, self.refusal or refusal, time.monotonic()
            _thread.interrupt_main(signal.SIGINT)


def _standing(beat: Beat, hang: Hang, post: Post) -> str:
    silence_s = post.now_s - beat.heard_s
    where = f"in step {beat.step}, {beat.phase.name.lower()}"
    return f"it gives no sign since {silence_s:.0f} s ({where})" if hang.silent else f"it is still {where}"
