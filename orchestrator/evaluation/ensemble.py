"""An ensemble: the average of score files, what it is worth, and what each member adds. No model is run.

From Python, the same call as often as one likes::

    files = [scores.load(url) for url in urls]         # one file a member and split; any order of splits
    made = ensemble.build(files, Storage(folder), code_version=code_version())
    made.weights                                       # by name of member
    made.errors["val"].top1_error                      # percent; of labelled splits alone
    Storage(folder).url + "/" + made.scores["test"]    # the score file that a submission is written from

Members are told apart by their weights, and come in the order in which ``files`` first names them. Every split must
have all of them, tested alike on the same images of the same data. What ``build`` leaves::

    scores/<split>-<protocol>-<key>.arrow, .json       the averaged scores: a score file as any other
    figures/<split>.png                                what each member adds (labelled splits)
    report.json, report.md                             all that was measured: ``analysis``
    ensemble.json                                      the manifest, published last: ``Ensemble``

The same input gives the same bytes: there are no times in them. What is there whole is not made again; of other input
it is replaced, and the manifest goes first, so that it never names what is not there.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

import numpy as np

from orchestrator.data.shards import UNLABELLED
from orchestrator.evaluation import figure, report, scores
from orchestrator.evaluation.analysis import SplitAnalysis, analyse, decoded_by_any
from orchestrator.evaluation.contest import Contest, average
from orchestrator.evaluation.membership import identity_of, members_of
from orchestrator.evaluation.ranking import Errors
from orchestrator.evaluation.scores import ScoreRecord, Scores, chunks
from orchestrator.evaluation.selection import GreedyChoice, choose
from orchestrator.plain import digest
from orchestrator.storage import Storage, sha256_hex

FORMAT = "resnet-orchestrator-ensemble/1"
MANIFEST = "ensemble.json"
_FIGURES = "figures"
_CHUNK_BYTES = 8 << 20


class Choice(Enum):
    """Where the weights come from."""

    PLAIN = "plain"  # all members alike, as in the paper
    GREEDY = "greedy"  # chosen on the labelled images: ``selection``
    GIVEN = "given"


@dataclass(frozen=True)
class MemberEntry:
    """One member. model: its finished model's record. scores: by split, {"url", "sha256"} of its score file."""

    name: str
    weight: float
    model: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Ensemble:
    """The manifest. Nothing is copied: members are named by URL and digest.

    left_out: names of members that the greedy choice did not take. scores: name of the averaged scores in the folder,
    by split. errors: by labelled split; where the greedy choice was made on the same images they flatter it, and
    held_out has its errors on the folds that had no part in it. files: SHA-256 of everything in the folder, by name.
    inputs: digest of all that decides over the rest.
    """

    members: tuple[MemberEntry, ...]
    left_out: tuple[str, ...]
    choice: Choice
    protocol: Mapping[str, Any]
    data: Mapping[str, Any]
    scores: Mapping[str, str]
    errors: Mapping[str, Errors]
    held_out: Mapping[str, Errors]
    files: Mapping[str, str]
    code_version: str
    inputs: str
    format: str = FORMAT

    @property
    def weights(self) -> dict[str, float]:
        """By name of member."""
        return {member.name: member.weight for member in self.members}

    @property
    def figures(self) -> list[str]:
        """Names of the PNG files in the folder."""
        return sorted(name for name in self.files if name.endswith(".png"))

    def to_json(self) -> dict[str, Any]:
        """Plain data; errors in percent beside the counts."""
        errors, held_out = _plain(self.errors), _plain(self.held_out)
        return {**asdict(self), "choice": self.choice.value, "errors": errors, "held_out": held_out}

    @staticmethod
    def from_json(plain: Mapping[str, Any]) -> Ensemble:
        """Inverse of ``to_json``. Raises ValueError, KeyError or TypeError for what is none."""
        if plain["format"] != FORMAT:
            raise ValueError(f"it has the format {plain['format']!r}, this program reads {FORMAT!r}")
        members = tuple(MemberEntry(**each) for each in plain["members"])
        fixed = {"members": members, "left_out": tuple(plain["left_out"]), "choice": Choice(plain["choice"])}
        measured = {field: _errors(plain[field]) for field in ("errors", "held_out")}
        return Ensemble(**{**plain, **fixed, **measured})


def _plain(errors: Mapping[str, Errors]) -> dict[str, dict[str, float]]:
    return {
        split: {**each._asdict(), "top1_error": each.top1_error, "top5_error": each.top5_error}
        for split, each in errors.items()
    }


def _errors(plain: Mapping[str, Mapping[str, int]]) -> dict[str, Errors]:
    return {split: Errors(*(each[name] for name in Errors._fields)) for split, each in plain.items()}


# -- building ---------------------------------------------------------------------------------------------------


def build(
    files: Sequence[Scores],
    out: Storage,
    *,
    choice: Choice = Choice.PLAIN,
    weights: Sequence[float] = (),
    num_folds: int = 5,
    seed: int = 0,
    code_version: str,
) -> Ensemble:
    """Average ``files`` into ``out`` and measure what came of it; see the head of this module.

    Averages among ``files`` that lie in ``out`` itself are left out: a pattern may meet what an earlier call has made.
    weights: of the members, positive, with ``Choice.GIVEN`` alone. The greedy choice is made on the split ``val``, or
    on the first labelled one, with ``num_folds`` folds; ``seed`` deals images out to folds and draws intervals. Raises
    ValueError where the files are no members of one ensemble, naming the difference, OSError where storage fails.
    """
    files = [file for file in files if not is_own(file, out)]
    members = members_of(files)
    m = len(members.names)
    if (choice is Choice.GIVEN) != bool(weights) or (weights and len(weights) != m):
        raise ValueError(f"{len(weights)} weights for {m} members: give one for each, in the order of their files")
    if not all(np.isfinite(w) and w > 0 for w in weights):
        given = ", ".join(f"{w:g}" for w in weights)
        raise ValueError(f"weights must be positive, not {given}: leave a member's files out instead")
    decides = {
        "files": [[f.url, f.sha256] for f in files],
        "choice": choice.value,
        "weights": list(map(float, weights)),
    }
    inputs = digest({**decides, "folds": num_folds, "seed": seed, "code_version": code_version, "format": FORMAT})
    if (made := _made(out, inputs)) is not None:
        return made

    labelled = {s: Contest(of) for s, of in members.splits.items() if (of[0].labels != UNLABELLED).any()}
    greedy = {
        split: choose(contest, num_folds=min(num_folds, len(contest)), seed=seed)
        for split, contest in labelled.items()
        if m > 1 and len(contest) > 1
    }
    used = _weights(choice, weights, m, greedy)
    out.delete(MANIFEST)  # what follows replaces what it names
    for folder in ("", scores.FOLDER, _FIGURES):
        out.delete_fragments(folder)
    analyses, names = dict[str, SplitAnalysis](), dict[str, str]()
    records = dict[str, str]()
    for split, of in members.splits.items():
        record, tops = _average(of, used, out, code_version)
        names[split] = record.name
        records[record.name] = record.sha256
        analyses[split] = analyse(
            of, members.names, used, tops, contest=labelled.get(split), greedy=greedy.get(split), seed=seed
        )
    chosen_on = _chosen_on(greedy) if choice is Choice.GREEDY and greedy else ""
    for name, data in report.files(analyses, choice.value, chosen_on).items():
        records[name] = _publish(out, name, data)
    for split, analysis in analyses.items():
        if analysis.labelled is not None:
            name = _figure(split)
            records[name] = _publish(out, name, figure.png(analysis.labelled, split))
    first = files[0].info
    made = Ensemble(
        members=tuple(
            MemberEntry(
                name,
                used[i],
                files_of[0].info.model,
                {f.info.split: {"url": f.url, "sha256": f.sha256} for f in files_of},
            )
            for i, name in enumerate(members.names)
            if used[i] and (files_of := [of[i] for of in members.splits.values()])
        ),
        left_out=tuple(name for name, weight in zip(members.names, used, strict=True) if not weight),
        choice=choice,
        protocol=first.protocol,
        data=first.data,
        scores=names,
        errors={s: a.labelled.errors for s, a in analyses.items() if a.labelled is not None},
        held_out={chosen_on: _held_out(labelled[chosen_on], greedy[chosen_on])} if chosen_on else {},
        files=records,
        code_version=code_version,
        inputs=inputs,
    )
    out.publish(MANIFEST, (json.dumps(made.to_json(), indent=1, sort_keys=True) + "\n").encode())
    _delete_old(out, made)
    return made


def is_own(file: Scores, out: Storage) -> bool:
    """Whether ``file`` is an average that was made in ``out``."""
    return "ensemble" in file.info.model and file.url.startswith(f"{out.url}/{scores.FOLDER}/")


def _figure(split: str) -> str:
    return f"{_FIGURES}/{split}.png"


def _held_out(contest: Contest, greedy: GreedyChoice) -> Errors:
    return Errors(len(contest), *contest.wrong(greedy.ranks))


def _delete_old(out: Storage, made: Ensemble) -> None:
    """Remove the averages and figures of other input: a pattern like val-*.arrow must find one file."""
    for name in out.files(scores.FOLDER):
        average = name.removesuffix(".json") + ".arrow"
        if not name.endswith(".json") or average in made.files:
            continue
        with suppress(ValueError):  # damaged: whose it is cannot be told
            record = scores.read_record(out, average)
            if record is None or "ensemble" not in record.info.model:
                continue  # of a run, which may have its scores there
            figure_name = _figure(record.info.split)
            for old in (figure_name if figure_name not in made.files else "", average, name):
                if old:
                    out.delete(old)


def _made(out: Storage, inputs: str) -> Ensemble | None:
    """What was made of the same input before, if all of it is there."""
    try:
        made = Ensemble.from_json(json.loads(out.read(MANIFEST)))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # of another version, or damaged: made again
    if made.inputs != inputs:
        return None
    with suppress(FileNotFoundError, ValueError, KeyError):
        records = [scores.read_record(out, name) for name in made.scores.values()]
        are_its = all(record is not None and record.sha256 == made.files[record.name] for record in records)
        if are_its and all(_sha256(out, name) == sha256 for name, sha256 in made.files.items()):
            return made
    return None


def _sha256(out: Storage, name: str) -> str:
    """Of a file of any size. Raises FileNotFoundError."""
    sha256 = hashlib.sha256()
    with out.reading(name) as stream:
        while piece := stream.read(_CHUNK_BYTES):
            sha256.update(piece)
    return sha256.hexdigest()


def _weights(
    choice: Choice, given: Sequence[float], num_members: int, greedy: Mapping[str, GreedyChoice]
) -> tuple[float, ...]:
    """Of all members; 0 for one that is left out. Raises ValueError for a greedy choice without labelled images."""
    if choice is Choice.GIVEN:
        return tuple(map(float, given))
    if choice is Choice.PLAIN or num_members == 1:
        return (1.0,) * num_members
    if not greedy:
        raise ValueError("a greedy choice needs images whose truth is known: give files of a labelled split too")
    return tuple(map(float, greedy[_chosen_on(greedy)].weights))


def _chosen_on(greedy: Mapping[str, GreedyChoice]) -> str:
    """The split whose choice is taken."""
    return "val" if "val" in greedy else next(iter(greedy))


def _average(
    of: Sequence[Scores], weights: Sequence[float], out: Storage, code_version: str
) -> tuple[ScoreRecord, np.ndarray]:
    """Publish the averaged scores of one split. [M + 1, N] int32: what each member, and the average, puts first."""
    first, n, c = of[0], len(of[0]), of[0].num_classes
    used = [(file, weight) for file, weight in zip(of, weights, strict=True) if weight]
    tops = np.zeros((len(of) + 1, n), np.int32)
    parts = [{"url": f.url, "sha256": f.sha256, "weight": w, "model": f.info.model} for f, w in used]
    info = replace(first.info, model={"ensemble": parts}, code_version=code_version)
    identity = identity_of(info.model)
    split, protocol = first.info.split, first.info.protocol
    key = scores.key(identity, first.info.data["sha256"], split, protocol)
    name = scores.file_name(split, str(protocol["kind"]), key)
    with tempfile.TemporaryFile(prefix="average-") as file:
        averaged = np.memmap(file, np.float32, "w+", shape=(n, c)) if n else np.zeros((0, c), np.float32)
        for rows in chunks(n, c):
            values, seen = [f.scores[rows] for f, _ in used], [f.decoded[rows] for f, _ in used]
            averaged[rows] = average(values, [w for _, w in used], seen)
            for m, member in enumerate([*(f.scores for f in of), averaged]):
                tops[m, rows] = member[rows].argmax(axis=1)  # of equal ones the lower label
        columns = {"labels": first.labels, "width": first.width, "height": first.height}
        decoded = decoded_by_any(of, weights)
        record = scores.publish(out, name, info, names=first.names, decoded=decoded, scores=averaged, **columns)
    return record, tops


def _publish(out: Storage, name: str, data: bytes) -> str:
    """Its SHA-256."""
    out.publish(name, data)
    return sha256_hex(data)
