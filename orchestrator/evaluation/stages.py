"""All of a job in one worker group: train, finish the model, score it. Each stage is skipped where it is done.

As the trainer it runs in any process group from (config, world, storage): the same call goes on from wherever the run
stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestrator.code_version import code_version
from orchestrator.config import TrainConfig
from orchestrator.data.shards import DataSet
from orchestrator.evaluation import scores
from orchestrator.evaluation.evaluate import evaluate
from orchestrator.evaluation.results import RESULT, is_more_than_training, missing_tests, result_event
from orchestrator.storage import Storage
from orchestrator.training.failures import PreemptedError
from orchestrator.training.finished_model import FOLDER as MODELS
from orchestrator.training.finished_model import finish_model, load_model, read_model
from orchestrator.training.notices import Event
from orchestrator.training.ownership import check_ownership
from orchestrator.training.pulse import Phase, Pulse, Wish
from orchestrator.training.run import Outcome, finished, run_storage
from orchestrator.training.trainer import train
from orchestrator.world import World

_LOOK_EVERY_S = 1.0


def do_job(
    config: TrainConfig,
    world: World,
    *,
    attempt: int,
    cpus: int,
    emit: Callable[[Event], None] = lambda event: None,
    pulse: Pulse | None = None,
    trains: bool = True,
) -> Outcome | None:
    """Do what is left of ``config``; the outcome of its training, None where that has not ended (and may not go on).

    Arguments and errors as of ``trainer.train``. trains: False tests the run as far as it has come. Collective.
    """
    run, pulse = run_storage(config), pulse or Pulse()
    has_ended = world.from_first(int(world.is_first and finished(run) is not None))
    if trains and not has_ended:
        train(config, world, attempt=attempt, cpus=cpus, emit=emit, pulse=pulse)
    if is_more_than_training(config):
        _test(config, world, attempt=attempt, cpus=cpus, emit=emit, pulse=pulse)
    return finished(run)


def _test(
    config: TrainConfig, world: World, *, attempt: int, cpus: int, emit: Callable[[Event], None], pulse: Pulse
) -> None:
    """Finish the model and score it, by all protocols on all splits."""
    run, version = run_storage(config), code_version()
    tell = emit if world.is_first else (lambda event: None)

    def leave() -> None:
        if pulse.wish is Wish.LEAVE:
            raise PreemptedError(
                f"run {config.name!r} left its place in its tests; what is scored is kept: the same command goes on"
            )

    def alive() -> None:
        pulse.alive()
        leave()

    def waiting() -> None:
        if pulse.phase is not Phase.GATHER:
            pulse.at(Phase.GATHER, pulse.step)
        leave()

    # -- finish -----------------------------------------------------------------------------------------------------
    pulse.at(Phase.FINISH, pulse.step)

    def owned() -> None:
        check_ownership(run, attempt)

    if world.is_first:
        owned()
        for folder in (MODELS, scores.FOLDER):  # what writers before this start were killed in
            run.delete_fragments(folder)
    record = finish_model(
        config, world, cpus=cpus, code_version=version, emit=emit, alive=alive, owned=owned, storing=pulse.storing
    )
    tell({"kind": "model", "step": record.step, "file": record.file})

    # -- score ------------------------------------------------------------------------------------------------------
    pulse.at(Phase.SCORE, record.step)
    data = DataSet(Storage(config.data))
    if left := missing_tests(config, record, data.digest):
        with pulse.storing():
            tensors = read_model(run, record)
        mean = tensors.pop("input/mean")
        model = load_model(config, record.num_classes, tensors, f"{run.url}/{record.file}").to(world.device)
        for test in left:
            pulse.at(Phase.SCORE, record.step)
            if world.is_first:
                owned()
            tell({"kind": "test", "step": record.step, "split": test.split, "protocol": test.protocol.value})

            def told(event: Event) -> None:
                emit(result_event(run, event, record) if event["kind"] == RESULT else event)

            evaluate(
                record,
                model,
                mean,
                config,
                data,
                test.split,
                test.protocol,
                world,
                cpus=cpus,
                run=run,
                code_version=version,
                emit=told,
                alive=alive,
                waiting=waiting,
                owned=owned,
                storing=pulse.storing,
            )
    # In storage: what the others have left to do after a restart may take longer than any collective waits.
    while missing_tests(config, record, data.digest):
        waiting()
        time.sleep(_LOOK_EVERY_S)
    pulse.at(Phase.DONE, record.step)
    world.barrier()
