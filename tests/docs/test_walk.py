"""Every command of the README and the pages, typed on a machine of its own: ``make test-docs``."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs import machine
from tests.docs.machine import Machine
from tests.docs.test_examples import example
from tests.docs.walk import WALKS, WHOLE_BLOCKS, Step

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

ALL = bool(os.environ.get("TEST_DOCS"))
# Where all is asked for, a machine that cannot be had is an error.
needs_machine = pytest.mark.skipif(bool(not ALL and machine.missing()), reason=machine.missing())


_PROGRAMS = "python|torchrun|ray|make|mlflow|prometheus|export|pytest"
# Programs that are spoken of, not typed: words may follow that name a part of them.
_SPOKEN_OF = r"python -m [\w.]+|python \w+/\w+\.py|ray (start|status|job (list|stop|submit))( --\S+)?|mlflow server"


def commands(page: Path) -> dict[str, bool]:
    """What a page has one type, and whether in a block of its own (or within a line)."""
    text, fence, found = re.sub(r" ?\\\n\s*", " ", page.read_text()), "", {}
    for line in text.splitlines():
        if line.startswith("```"):
            assert fence or line[3:] in ("bash", "python"), line
            fence = "" if fence else line[3:]
        code = line if fence == "bash" else line.removeprefix("    ") if not fence and line.startswith("    ") else ""
        if re.match(rf"(\w+=\S+ )*({_PROGRAMS})\b|\(umask", code):
            found[re.split(r"\s{2,}#", code)[0].strip()] = True
    for code in re.findall(rf"`((?:\w+=\S+ )*(?:{_PROGRAMS}) [^`]*)`", text):
        found.setdefault(code.replace("\n", " "), False)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_typed(page: Path) -> None:
    """By a step of a walk, or with its whole block by a test of its own."""
    if page.name in WHOLE_BLOCKS:
        file, _, name = WHOLE_BLOCKS[page.name].partition("::")
        assert f"\ndef {name}(" in (ROOT / file).read_text()
    steps = [step for walk in WALKS.values() for step in walk]
    by_steps = {step.command for step in steps if step.page == page.name}
    block = set(example(page.name, "bash").splitlines()) if page.name in WHOLE_BLOCKS else set()
    missed, found = [], commands(page)
    for command, is_block in found.items():
        program = re.split(r" (?=make|pytest)", command)[-1]
        if command in by_steps or command in block:
            continue
        if program.startswith("make "):
            (target,) = program.split()[1:]
            assert f"\n{target}: " in (ROOT / "Makefile").read_text(), command
        elif program.startswith("pytest "):
            assert (ROOT / program.split()[1]).exists(), command
        elif is_block or not re.fullmatch(_SPOKEN_OF, command):
            missed.append(command)
        elif command.startswith("python "):
            words = command.removeprefix("python ").removeprefix("-m ").removesuffix(".py")
            assert importlib.util.find_spec(words.replace("/", ".")), command
    assert not missed
    assert by_steps <= found.keys(), "no longer on the page"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine(tmp_path_factory.mktemp("machine") / "m") as found:
        yield found


def take(step: Step, here: Machine) -> None:
    script = step.typed
    if step.stays:
        until = f"for i in $(seq 90); do {step.stays} && exit 0; sleep 1; done"
        script = f"({script}) > /stays.log 2>&1 &\n{until}; cat /stays.log; exit 1"
    if step.leaves:
        script = f"touch /before; {script}\nfor each in {step.leaves}; do test $each -nt /before && exit 0; done\n"
        script += f"echo wrote no {step.leaves}; exit 1"
    for each in [step.preview] * step.previews + [script]:
        code, text = here.run(each, step.timeout_s)
        assert code == 0, f"{each}\n{text[-6000:]}"
    assert step.says in " ".join(text.split()), f"{step.typed}\n{text[-6000:]}"


@needs_machine
@pytest.mark.skipif(not ALL, reason="half an hour: make test-docs")
@pytest.mark.ray_cluster
@pytest.mark.parametrize(
    ("walk", "number"), [(w, i) for w, steps in WALKS.items() for i in range(len(steps))], ids=lambda x: str(x)
)
@pytest.mark.timeout(900)
def test_every_command(walk: str, number: int, here: Machine) -> None:
    step = WALKS[walk][number]
    if number == 0:
        here.forget_exports()
    take(step, here)


@needs_machine
@pytest.mark.ray_cluster
@pytest.mark.timeout(600)
@pytest.mark.skipif(ALL, reason="they are among all")
def test_some_commands(here: Machine) -> None:
    for steps in WALKS.values():
        for step in steps:
            if step.in_small:
                take(step, here)
