"""The launcher of Ray jobs: the checkout goes to the head of a running cluster, which runs the job and keeps its log.

The cluster's dashboard takes jobs; where the cluster has a token, RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH name it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.launch import Job, State, Status, environment_to_pass
from cluster.settings import RaySettings
from orchestrator.control.guard import ENDING_VARIABLE
from orchestrator.masking import masked

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# What of a checkout is no code: an upload has a limit (Ray's: 500 MB), and data belongs into storage.
EXCLUDES = [".venv", ".git", "build", "launches", "mlruns", "mlartifacts", "*.db", "*.tar", "*.arrow", "*.safetensors"]
EXCLUDES += ["**/__pycache__", ".*_cache", ".hypothesis", "*.egg-info"]
_STOP_WAIT_S = 120  # Ray's own 3 s are too few for a checkpoint
_AFTER_CHECKPOINTS_S = 20  # of that, for what follows them


class UnknownJobError(ValueError):
    """The cluster does not know a job that was launched on it."""


class RayJobs:
    """The launcher."""

    def __init__(self, settings: RaySettings) -> None:
        self._settings = settings
        default = os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
        self._address = settings.dashboard or default
        self._clients: dict[str, JobSubmissionClient] = {}

    def preview(self, job: Job, folder: Path) -> str:
        words = ["ray", "job", "submit", "--address", self._address, "--submission-id", job.id]
        if self._settings.working_dir:
            words += ["--working-dir", self._settings.working_dir]
        return masked(shlex.join([*words, "--", "python", *job.argv])) + "\n"

    def submit(self, job: Job, folder: Path) -> dict[str, str]:
        client = self._client(self._address)
        handle = {"address": self._address, "submission_id": job.id}
        if secret := [word for word in job.argv if masked(word) != word]:
            raise ValueError(
                f"{masked(secret[0])} holds credentials, which Ray's dashboard would show: put them into the "
                "environment of the cluster's machines"
            )
        environment = environment_to_pass(os.environ) | {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)}
        environment |= {ENDING_VARIABLE: str(_STOP_WAIT_S - _AFTER_CHECKPOINTS_S)}
        runtime: dict[str, Any] = {"env_vars": environment}
        if self._settings.working_dir:
            where = Path(self._settings.working_dir)
            if not where.is_dir():
                raise ValueError(f"--ray.working-dir {str(where)!r} is no folder")
            runtime |= {"working_dir": str(where), "excludes": EXCLUDES}
        try:
            client.submit_job(entrypoint=shlex.join(["python", *job.argv]), submission_id=job.id, runtime_env=runtime)
        except RuntimeError as error:
            if "already exists" in str(error):  # whoever submitted it was ended before it could write that down
                return handle
            said = f"the Ray cluster at {self._address} does not take the job: {_last_line(error)}"
            if "status code 5" in str(error):  # it may have taken it all the same
                raise OSError(said) from None
            raise ValueError(said) from None
        return handle

    def status(self, job: Job, folder: Path) -> Status:
        from ray.job_submission import JobStatus

        try:
            with self._answers(job):
                details = self._client(job.handle["address"]).get_job_info(job.handle["submission_id"])
        except UnknownJobError as error:
            return Status(State.LOST, str(error))
        state = {
            JobStatus.PENDING: State.WAITING,
            JobStatus.RUNNING: State.RUNNING,
            JobStatus.SUCCEEDED: State.FINISHED,
            JobStatus.FAILED: State.FAILED,
            JobStatus.STOPPED: State.STOPPED,
        }[details.status]
        said = details.message or "" if state.is_over or state is State.WAITING else ""
        where = f"on {details.driver_node_id[:8]}" if details.driver_node_id and not state.is_over else ""
        return Status(state, " ".join(filter(None, [where, _first_line(said)])))

    def log(self, job: Job, folder: Path) -> str:
        with self._answers(job):
            return self._client(job.handle["address"]).get_job_logs(job.handle["submission_id"])

    def stop(self, job: Job, folder: Path) -> None:
        with self._answers(job):
            self._client(job.handle["address"]).stop_job(job.handle["submission_id"])

    @contextmanager
    def _answers(self, job: Job) -> Iterator[None]:
        """Ray's client raises RuntimeError for whatever the head answers, but for one that it does not let in."""
        from ray.exceptions import AuthenticationError

        address = job.handle["address"]
        try:
            yield
        except ValueError as error:  # of _client: nothing is known of the job
            raise OSError(str(error)) from None
        except (RuntimeError, AuthenticationError) as error:
            if "does not exist" in str(error):
                raise UnknownJobError(
                    f"the Ray cluster at {address} does not know job {job.id}: its head was started again; the same "
                    "command launches it"
                ) from None
            raise OSError(f"the Ray cluster at {address} does not answer: {_last_line(error)}") from None

    def _client(self, address: str) -> JobSubmissionClient:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        if address not in self._clients:
            try:
                self._clients[address] = JobSubmissionClient(address)
            except AuthenticationError as error:
                raise ValueError(
                    f"the Ray cluster at {address} asks for its token ({_first_line(str(error))}): set "
                    "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
                ) from None
            except (ConnectionError, RuntimeError) as error:
                raise ValueError(
                    f"no Ray cluster takes jobs at {address} ({_last_line(error)}): give --ray.dashboard, and where it "
                    "has a token RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
                ) from None
        return self._clients[address]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
