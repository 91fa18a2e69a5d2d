"""Every command of the README and the pages is one that its program takes: recipes and options exist, values fit.

What the commands then do is tested where their programs are; the pages' examples are run whole in test_examples.py.
"""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md")))
OWN = re.compile(r"(jobs/\w+\.py|-m (?:jobs|data_prep|cluster|benchmarks)[\w.]*)")
# At least so many commands are found on a page: a way of writing them that is not read would pass unseen.
LEAST = {"README.md": 20, "running_on_your_cluster.md": 5, "reproducing_the_paper.md": 10}
# Read their words without tyro.
OTHERS = {"benchmarks.scale", "benchmarks.tracking"}


def commands(page: Path) -> list[str]:
    """What stands behind ``python`` in lines that are code, and within `backticks`; ``…`` stands for what was said."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    code = [line.partition("  #")[0] for line in text.splitlines() if re.match(r"(    |\$ )?(\w+=\S+ )*python ", line)]
    code += [found.replace("\n", " ") for found in re.findall(r"`(?:\w+=\S+ )*(python [^`]*)`", text)]
    found = [command.partition("python ")[2].strip() for command in code]
    return [command.partition(" > ")[0].partition(" | ")[0].rstrip("&; ") for command in found if OWN.match(command)]


class Parsed(BaseException):
    """The command line was understood: nothing is run."""


def understood(command: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "" where the program takes the command, else what it did."""
    words = [word for word in shlex.split(command) if not set(word) <= {"…"}]
    module, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0][:-3].replace("/", "."), words[1:])
    real: Callable[..., Any] = tyro.cli

    def parse_only(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        if options.get("return_unknown_args"):
            return found  # of the launch; the job's own words come next
        raise Parsed

    with monkeypatch.context() as patched:
        patched.setattr(tyro, "cli", parse_only)
        patched.setattr(sys, "argv", [f"{module.replace('.', '/')}.py", *rest])
        try:
            program = importlib.import_module(module)
            if hasattr(program, "__path__"):
                program = importlib.import_module(f"{module}.__main__")
            if not hasattr(program, "main"):
                return "has no main"
            if not rest:
                return ""  # a program is named, without what it is to do
            takes_words = program.main.__code__.co_argcount == 1
            code = program.main(rest) if takes_words else program.main()
        except Parsed:
            return ""
        except SystemExit as ending:
            return "" if ending.code == 0 and "--help" in rest else f"exits with {ending.code}"
        return f"is not read: {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("RANK", raising=False)
    wrong, found = {}, commands(page)
    assert len(found) >= LEAST.get(page.name, 0)
    for command in found:
        if not any(name in command for name in OTHERS) and (said := understood(command, monkeypatch)):
            wrong[command] = f"{said}: {capfd.readouterr().err[-300:]}"
    assert not wrong


def test_pages_with_commands_are_there() -> None:
    assert LEAST.keys() <= {page.name for page in PAGES}


def test_the_front_door_has_the_commands_that_matter() -> None:
    found = " ".join(commands(ROOT / "README.md"))
    for program in ("data_prep.ilsvrc", "data_prep.cifar10", "jobs/imagenet.py", "jobs/cifar10.py", "jobs/campaign.py"):
        assert program in found


def test_a_wrong_command_is_seen(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    for command in (
        "jobs/imagenet.py resnet51 --data /d",
        "jobs/imagenet.py resnet50 --no-such-option 1",
        "jobs/campaign.py ilsvrc2015 --on slurm --slurm.nodes two",
        "-m data_prep.verify --num-tasks 0",
        "-m cluster state six",
    ):
        assert understood(command, monkeypatch), command
    for command in ("jobs/imagenet.py resnet50 … --on slurm --slurm.nodes 2", "-m cluster status six"):
        assert not understood(command, monkeypatch), command
