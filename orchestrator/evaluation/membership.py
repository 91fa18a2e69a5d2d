"""Which score files make one ensemble: they speak of the same images of the same data, and were tested alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.data.shards import ClassInfo
from orchestrator.evaluation.scores import Scores
from orchestrator.plain import differences, digest


def check(files: Sequence[Scores]) -> None:
    """The files speak of the same images of the same data, in the same order, and were tested alike.

    Raises ValueError naming two files and the first difference.
    """
    first = files[0]
    for other in files[1:]:
        both = f"{first.url} and {other.url}"
        if what := _images_differ(first, other):
            raise ValueError(f"{both} do not speak of the same images: {what}")
        _check_alike(first, other)


def _check_alike(first: Scores, other: Scores) -> None:
    """What must be the same over the splits too: classes, protocol, data."""
    both = f"{first.url} and {other.url}"
    a, b = first.info, other.info
    if a.classes != b.classes:
        if len(a.classes) != len(b.classes):
            what = f"{len(a.classes)} and {len(b.classes)}"
        else:
            x, y = next((x, y) for x, y in zip(a.classes, b.classes, strict=True) if x != y)
            what = f"class {x.label} is {_class(x)} and {_class(y)}"
        raise ValueError(f"{both} do not have the same classes: {what}")
    if changed := differences(dict(a.protocol), dict(b.protocol)):
        raise ValueError(f"{both} were not tested alike: {'; '.join(changed)}: score all members with one protocol")
    if a.data["sha256"] != b.data["sha256"]:
        what = f"{a.data['url']} ({a.data['sha256'][:12]}…) and {b.data['url']} ({b.data['sha256'][:12]}…)"
        raise ValueError(f"{both} are scores of two data sets: {what}: score all members on one")


def _class(info: ClassInfo) -> str:
    return f"{info.wnid} (ILSVRC id {info.ilsvrc_id}, {info.words!r})"


def _images_differ(first: Scores, other: Scores) -> str:
    """What differs first, "" for nothing."""
    if not first.names.equals(other.names):
        ours, theirs = first.names.to_pylist(), other.names.to_pylist()
        n = min(len(ours), len(theirs))
        row = next((i for i in range(n) if ours[i] != theirs[i]), n)
        name = [names[row] if row < len(names) else "no image" for names in (ours, theirs)]
        how = "the same images in another order: " if sorted(ours) == sorted(theirs) else ""
        numbers = f"{len(ours)} and {len(theirs)} images; " if len(ours) != len(theirs) else ""
        return f"{how}{numbers}the first difference is in row {row}: {name[0]} and {name[1]}"
    for what, a, b in (
        ("label", first.labels, other.labels),
        ("width", first.width, other.width),
        ("height", first.height, other.height),
    ):
        if not np.array_equal(a, b):
            row = int(np.argmax(a != b))
            return f"the {what} of {first.names[row].as_py()} (row {row}) is {a[row]} and {b[row]}"
    return ""


@dataclass(frozen=True)
class Members:
    """The members of an ensemble, and their score files by split, in the same order in each."""

    names: tuple[str, ...]
    splits: Mapping[str, tuple[Scores, ...]]


def identity_of(model: Mapping[str, Any]) -> str:
    """What tells a model from others, of a score file's ``info.model``: a network's weights, wherever its files lie and
    whatever code made them; an ensemble's members and their shares.
    """
    if "ensemble" in model:
        return digest({"ensemble": [[identity_of(each["model"]), each["weight"]] for each in model["ensemble"]]})
    return str(model.get("weights_sha256") or digest(dict(model)))


def _inside(model: Mapping[str, Any]) -> set[str]:
    """Identities of all models that an ensemble was made of, at any depth."""
    of = [each["model"] for each in model.get("ensemble", ())]
    return {identity_of(each) for each in of}.union(*map(_inside, of))


def members_of(files: Sequence[Scores]) -> Members:
    """``files`` by member, in the order of their first files, and by split. Members are told apart by ``identity_of``.

    Raises ValueError where they are no members of one ensemble.
    """
    if not files:
        raise ValueError("an ensemble needs at least one score file: none was given")
    for number, file in enumerate(files):
        for earlier in files[:number]:
            if file.sha256 == earlier.sha256:
                raise ValueError(f"{earlier.url} and {file.url} are the same scores: give each once")
    by_split: dict[str, dict[str, Scores]] = {}
    for file in files:
        of = by_split.setdefault(file.info.split, {})
        model = identity_of(file.info.model)
        if model in of:
            _check_alike(of[model], file)
            raise ValueError(
                f"{of[model].url} and {file.url} are scores of the same weights on {file.info.split}: give one of them"
            )
        of[model] = file
    models = dict[str, Mapping[str, Any]]()
    for file in files:
        models.setdefault(identity_of(file.info.model), file.info.model)
    for file in files:
        if within := models.keys() & _inside(file.info.model):
            other = next(each for each in files if identity_of(each.info.model) in within)
            raise ValueError(
                f"{file.url} is an ensemble that contains the model of {other.url}, which would count twice: leave one "
                "of them out; an ensemble is best kept in a folder that no pattern of --scores meets"
            )
    order, names = list(models), [str(model.get("name") or "ensemble") for model in models.values()]
    for split, of in by_split.items():
        if missing := [name for name, model in zip(names, order, strict=True) if model not in of]:
            raise ValueError(f"no score file of {', '.join(missing)} for the split {split}, which others have")
        check([of[model] for model in order])
    for of in by_split.values():
        _check_alike(files[0], next(iter(of.values())))
    distinct = tuple(
        name if names.count(name) == 1 else f"{name} {model[:6]}" for name, model in zip(names, order, strict=True)
    )
    return Members(distinct, {split: tuple(of[model] for model in order) for split, of in by_split.items()})
