"""Launching on this machine: one job a name, its status, log and end; what is typed wrong; SLURM's batch script."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import command_line, launch
from cluster.command_line import known
from cluster.launch import Job, State, Where, environment_to_pass
from cluster.local import Local
from cluster.ray_jobs import RayJobs
from cluster.settings import RaySettings, SlurmSettings
from cluster.slurm import Slurm
from tests.cluster.slurm_cluster import wait_for

_JOB = """
import pathlib, signal, sys, time
def leave(number, frame):
    print("a checkpoint", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
print("begun", *sys.argv[1:], flush=True)
until = pathlib.Path(sys.argv[1])
while not until.exists():
    time.sleep(0.05)
sys.exit(int(until.read_text()))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job that runs until the file of its first argument holds an exit code, or it is asked to end."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.py"
    path.write_text(_JOB)
    return path


def submit(launches: Path, *argv: str) -> tuple[Job, bool]:
    return launch.submit(known, launches, "six", Where.LOCAL, argv)


def wait_for_state(launches: Path, state: State) -> launch.Status:
    def now() -> launch.Status:
        job = launch.find(launches, "six")
        assert job is not None
        return launch.status(known, job, launches)

    wait_for(lambda: now().state is state, lambda: f"{now()}, not {state}")
    return now()


def test_a_job_runs_once_is_stopped_and_goes_on(script: Path, tmp_path: Path) -> None:
    launches = tmp_path / "launches"
    job, is_new = submit(launches, str(script), "end")
    assert (is_new, job.number) == (True, 1)
    assert re.fullmatch("six-000001-[0-9a-f]{6}", job.id)
    folder = launch.folder_of(launches, job)
    assert submit(launches, str(script), "end") == (job, False)
    with pytest.raises(ValueError, match="job 'six' is at work on local with another command"):
        submit(launches, str(script), "another end")
    wait_for(lambda: "begun end" in Local().log(job, folder), "it does not begin")
    assert f"process {job.handle['pid']} of" in wait_for_state(launches, State.RUNNING).said

    Local().stop(job, folder)
    assert wait_for_state(launches, State.STOPPED).said == "exit code 143: the same command goes on"
    assert Local().log(job, folder) == "begun end\na checkpoint\n"
    Local().stop(job, folder)  # nothing

    (tmp_path / "end").write_text("0")
    again, is_new = submit(launches, str(script), "end")
    assert (is_new, again.number) == (True, 2)
    wait_for_state(launches, State.FINISHED)
    (tmp_path / "end").write_text("2")
    submit(launches, str(script), "end")
    assert wait_for_state(launches, State.FAILED).said == "exit code 2"
    assert launch.names(launches) == ["six"]


def test_a_job_that_is_killed_with_its_keeper_is_lost(script: Path, tmp_path: Path) -> None:
    job, _ = submit(tmp_path / "launches", str(script), "end")
    wait_for(lambda: "begun" in Local().log(job, launch.folder_of(tmp_path / "launches", job)), "it does not begin")
    os.killpg(int(job.handle["pid"]), signal.SIGKILL)
    assert "the same command goes on" in wait_for_state(tmp_path / "launches", State.LOST).said


def test_an_interrupted_submission_is_finished_by_the_same_command(script: Path, tmp_path: Path) -> None:
    launches = tmp_path / "launches"
    job, _ = submit(launches, str(script), "end")
    record = launch.folder_of(launches, job) / "job.json"
    plain = json.loads(record.read_text())
    record.write_text(json.dumps(plain | {"handle": {}}))  # as where the handle was not written any more
    torn = launch.find(launches, "six")
    assert torn is not None
    assert "its submission was interrupted" in launch.status(known, torn, launches).said
    assert submit(launches, str(script), "end") == (job, False)
    Local().stop(job, launch.folder_of(launches, job))
    wait_for_state(launches, State.STOPPED)
    record.write_text("{")
    with pytest.raises(ValueError, match="is no record of a job"):
        launch.find(launches, "six")


def test_a_job_whose_keeper_is_killed_is_seen_and_stopped(script: Path, tmp_path: Path) -> None:
    launches = tmp_path / "launches"
    job, _ = submit(launches, str(script), "end")
    folder = launch.folder_of(launches, job)
    wait_for(lambda: "begun" in Local().log(job, folder), "it does not begin")
    os.kill(int(job.handle["pid"]), signal.SIGKILL)
    wait_for(lambda: "whose keeper was killed" in wait_for_state(launches, State.RUNNING).said, "it is not seen")
    assert submit(launches, str(script), "end") == (job, False)
    Local().stop(job, folder)
    wait_for_state(launches, State.LOST)
    assert "a checkpoint" in Local().log(job, folder)


def test_after_a_reboot_a_job_is_lost(script: Path, tmp_path: Path) -> None:
    (tmp_path / "end").write_text("0")
    job, _ = submit(tmp_path / "launches", str(script), "end")
    wait_for_state(tmp_path / "launches", State.FINISHED)
    folder = launch.folder_of(tmp_path / "launches", job)
    (folder / "ended.json").unlink()
    before = replace(job, handle=job.handle | {"boot": "another"})
    assert Local().status(before, folder).state is State.LOST


def test_what_is_refused_is_not_in_the_way(script: Path, tmp_path: Path) -> None:
    launches = tmp_path / "launches"

    class Refusing(Local):
        def submit(self, job: Job, folder: Path) -> dict[str, str]:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        launch.submit(lambda where: Refusing(), launches, "six", Where.SLURM, ["job.py"])
    assert launch.find(launches, "six") is None
    job, is_new = submit(launches, str(script), "end")
    assert (is_new, job.number) == (True, 1)
    Local().stop(job, launch.folder_of(launches, job))
    wait_for_state(launches, State.STOPPED)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b"])
def test_names_are_those_of_folders(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--launch-name"):
        launch.submit(known, tmp_path, name, Where.LOCAL, ["job.py"])
    assert not list(tmp_path.iterdir())


def test_secrets_stay_here() -> None:
    secret = {"AWS_SECRET_ACCESS_KEY": "x", "MLFLOW_TRACKING_URI": "https://user:password@host"}
    assert environment_to_pass(secret | {"IMAGENET_DATA": "/data", "HOME": "/"}) == {"IMAGENET_DATA": "/data"}
    assert environment_to_pass({"MLFLOW_TRACKING_URI": "http://host?token=x"}) == {}
    azure = {"IMAGENET_STORAGE": "abfs://runs@account.dfs.core.windows.net/a"}
    assert environment_to_pass(azure) == azure
    with pytest.raises(ValueError, match="IMAGENET_DATA holds credentials"):
        environment_to_pass({"IMAGENET_DATA": "http://user:password@host/data"})
    shown = Job("six", 1, Where.RAY, ("job.py", "--tracking.uri", "http://user:password@host"), ".", "", {})
    assert "password" not in RayJobs(RaySettings()).preview(shown, Path("f"))
    assert "password" not in Local().preview(shown, Path("f"))


def test_a_ray_cluster_that_does_not_answer_has_lost_no_job(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        handle = {"address": f"http://127.0.0.1:{listener.getsockname()[1]}", "submission_id": "six-000001"}
    job = Job("six", 1, Where.RAY, ("job.py",), str(tmp_path), "", handle)
    for ask in (RayJobs(RaySettings()).status, RayJobs(RaySettings()).log, RayJobs(RaySettings()).stop):
        with pytest.raises(OSError, match="no Ray cluster takes jobs at"):
            ask(job, tmp_path)


def test_a_dry_run_is_one_however_it_is_typed(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--on", "local", "--launch-name", "six", "--dry_run", "end"]
    assert command_line.run(words, str(script), lambda rest: command_line.Described("six")) == 0
    assert capsys.readouterr().out.startswith("cd ")
    assert not Path("launches").exists()


def test_a_record_that_is_damaged_hides_no_other_job(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "end").write_text("0")
    submit(tmp_path / "launches", str(script), "end")
    (tmp_path / "launches" / "torn" / "000001").mkdir(parents=True)
    wait_for_state(tmp_path / "launches", State.FINISHED)
    assert command_line.afterwards(["list"]) == 0
    shown = capsys.readouterr().out
    assert "finished" in shown
    assert "unknown" in shown


def test_the_batch_script_asks_for_what_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")  # no SLURM here
    settings = SlurmSettings(
        nodes=8, cpus_per_node=64, gpus_per_node=8, time_min=60, partition="h", extra=("reservation=r",)
    )
    job = Job("six", 1, Where.SLURM, ("jobs/imagenet.py", "resnet50"), str(tmp_path), "", {})
    text = Slurm(settings).preview(job, tmp_path / "f")
    for line in ("--nodes=8", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=60", "--partition=h", "--requeue"):
        assert f"#SBATCH {line}\n" in text, text
    assert "#SBATCH --signal=USR2@300\n" in text
    assert "#SBATCH --reservation=r\n" in text
    assert "--cpus-per-task=64 --export=ALL" in text
    assert sys.executable in text
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (SlurmSettings(nodes=0), "--slurm.nodes must be at least 1"),
        (SlurmSettings(time_min=5), "--slurm.warning-s 300 leaves nothing of a start of 5 minutes"),
        (SlurmSettings(warning_s=5), "--slurm.warning-s must be more than 15"),
        (SlurmSettings(extra=("exclusive",)), "--slurm.extra 'exclusive': give it as option=value"),
    ],
)
def test_wrong_settings(settings: SlurmSettings, said: str, tmp_path: Path) -> None:
    job = Job("six", 1, Where.SLURM, (), "", "", {})
    with pytest.raises(ValueError, match=said):
        Slurm(settings).submit(job, tmp_path / "f")
    assert not (tmp_path / "f").exists()
