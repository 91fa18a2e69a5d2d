"""Every message of trouble in the code is on its page, and every message on the page is in the code.

Messages are read out of the source: what is raised, warned, noted or found wrong. What varies in one is an ellipsis, on
the page as here. The page quotes a message from its beginning and may leave out its end (mostly: what to do).
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "when_something_goes_wrong.md"
PACKAGES = ("orchestrator", "cluster", "jobs", "data_prep")
LEAST_LETTERS = 8  # of the longest constant part of a quote, so that a search finds it and little else
GAP = "…"

ERRORS = {
    *(
        "ValueError",
        "StoreRefusedError",
        "StoreUnreachableError",
        "RunFailedError",
        "AllocationError",
        "SettingError",
        "UnknownJobError",
        "ClusterError",
        "SupersededError",
        "DigestError",
    ),
    *(
        "AtWorkError",
        "StorageFailedError",
        "NotFiniteError",
        "PreemptedError",
        "OSError",
        "PermissionError",
        "FileNotFoundError",
        "RuntimeError",
    ),
}
# Functions and methods whose first text is a message; lists that gather messages; tables of (pattern, message).
TELLERS = {"notice", "_notice", "tell", "problem", "warning", "add", "first", "_missing"}
TELLERS |= {"Refusal", "_refuse", "_give_up"}
GATHERED = {"wrong", "warnings", "notes"}
TABLES = {"_SETTINGS", "_TRANSIENT"}
PRINTED = ("error: ", "warning: ", "note: ", "interrupted: ", "damaged: ")

# Raised, but nobody meets them: by file and beginning, with the reason.
NOT_MET = {
    "orchestrator/plain.py: …: an object is expected, not …": "from_json reads what the driver has written",
    "orchestrator/plain.py: …: unknown fields …": "from_json, as above",
    "orchestrator/plain.py: …: … is no …": "from_json, as above",
    "orchestrator/control/curves.py: journal line …": "no command reads a journal from a file yet",
    "orchestrator/control/curves.py: nothing to draw": "the tracker draws only what is there",
    "orchestrator/control/entries.py: step …, time_ms …": "told as 'malformed events left out (…)'",
    "orchestrator/control/mlflow_store.py: no tracking URI": "there is a default",
    "orchestrator/data/pipeline.py: mean image of …": "assembly resizes the mean image to the crop",
    "orchestrator/data/shards.py: FileNotFoundError …": "caught: the read goes to the store",
    "orchestrator/models/batch_norm.py: … images are no whole number": "a worker has whole groups",
    "orchestrator/models/batch_norm.py: Groups shared by …": "a call of the library that contradicts itself",
    "orchestrator/models/batch_norm.py: No image for this process": "share_of refuses such a number of workers before",
    "orchestrator/models/batch_norm.py: A global batch has": "the config refuses it before",
    "orchestrator/models/vgg.py: This VGG classifies": "built for the crop that it is fed",
    # Raised again: the text was made where it was first raised, and is found there.
    "data_prep/fan_out.py: ValueError …": "the message of a task",
    "orchestrator/config.py: ValueError …": "what _check has gathered",
    "cluster/allocation.py: SettingError …": "as the next",
    "cluster/allocation.py: AllocationError …": "the texts that _wait and lost are given, which stand on the page",
    "cluster/allocation.py: the first node is gone": "told to the first node, which is gone",
    "cluster/allocation.py: Ray has ended": "told as 'node … (…): Ray has ended'",
    "cluster/raylets.py: the local Ray cluster does not": "a cluster of tests and rehearsals: told with the rehearsal",
    "orchestrator/campaign/opening.py: member …: …": "the message of a check, with the member's name",
    "orchestrator/campaign/plan.py: ValueError …": "what __post_init__ has gathered",
    "orchestrator/campaign/products.py: …; --submit False": "the message of a class map, with what to do",
    "orchestrator/control/facts.py: ValueError …": "why the cluster cannot be reached",
    "cluster/ray_jobs.py: OSError …": "the message of _client",
    "orchestrator/remote.py: StoreRefusedError …": "an advice of the tables",
}


@dataclass(frozen=True)
class Message:
    """``text`` with an ellipsis for what varies; where it stands."""

    text: str
    path: str
    line: int

    @property
    def allowed(self) -> str:
        """Its entry of NOT_MET, or ""."""
        known = f"{self.path}: {self.text}"
        return next((k for k in NOT_MET if known.startswith(k)), "")


# -- out of the source --------------------------------------------------------------------------------------------


def messages_of(source: str, path: str) -> list[Message]:
    """Every message of trouble that a module can tell."""
    return list(_Reader(ast.parse(source), path).messages())


class _Reader:
    def __init__(self, tree: ast.Module, path: str) -> None:
        self._tree, self._path = tree, path
        targets = [(node.targets[0], node.value) for node in tree.body if isinstance(node, ast.Assign)]
        self._constants = {target.id: value for target, value in targets if isinstance(target, ast.Name)}
        self._assigned: list[tuple[str, ast.expr]] = []  # in the function that is read

    def messages(self) -> Iterator[Message]:
        for name in TABLES & self._constants.keys():
            table = self._constants[name]
            assert isinstance(table, ast.Tuple)
            for row in table.elts:
                assert isinstance(row, ast.Tuple)
                yield from self._told(row.elts[1])
        for scope in self._scopes():
            nodes = list(_within(scope))
            self._assigned = list(_assigned(nodes))
            for node in nodes:
                yield from self._of(node, scope)

    def _scopes(self) -> Iterator[ast.AST]:
        yield self._tree
        for node in ast.walk(self._tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node

    def _of(self, node: ast.AST, scope: ast.AST) -> Iterator[Message]:
        match node:
            case ast.Raise(exc=exception) if exception is not None:
                for call in [exception] if isinstance(exception, ast.Call) else _branches(exception):
                    if isinstance(call, ast.Call) and _name(call.func) in ERRORS and call.args:
                        # OSError(errno, text)
                        yield from self._told(call.args[-1], raised=_name(call.func))
            case ast.Call(func=function, args=arguments) if _name(function) in TELLERS and arguments:
                texts = [a for a in arguments if _is_text(a)]
                texts = texts or (arguments[-1:] if _name(function) == "Refusal" else arguments[:1])
                yield from self._told(texts[0])
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[text]) if name in GATHERED:
                yield from self._told(text)
            case ast.AugAssign(target=target, value=value) if _name(target) in GATHERED:
                for text in value.elts if isinstance(value, ast.List) else [value]:
                    yield from self._told(text.elt if isinstance(text, ast.ListComp) else text)
            case ast.Tuple(elts=[ast.Attribute(value=ast.Name(id="Verdict"), attr="WARNING" | "SKIPPED"), text]):
                yield from self._told(text)
            case ast.Return(value=value) if isinstance(scope, ast.FunctionDef) and scope.name.endswith("_warning"):
                if value is not None:
                    yield from self._told(value)
            case ast.JoinedStr() | ast.Constant(value=str()):
                printed = self._text(node)
                if printed.startswith(PRINTED) and _letters(printed) >= LEAST_LETTERS:
                    yield Message(printed, self._path, node.lineno)

    def _told(self, node: ast.expr, raised: str = "") -> Iterator[Message]:
        if isinstance(node, ast.Name):  # said elsewhere in the function
            made = [value for name, value in self._assigned if name == node.id and _is_text(value)]
            if made:
                for value in made:
                    yield from self._told(value, raised)
                return
        for branch in _branches(node):
            text = self._text(branch)
            if _letters(text) >= LEAST_LETTERS:
                yield Message(text, self._path, node.lineno)
            elif raised:
                yield Message(text if re.search(r"\w", text) else f"{raised} {GAP}", self._path, node.lineno)

    def _text(self, node: ast.AST) -> str:
        text = self._raw(node, self._constants | {name: value for name, value in self._assigned if _is_text(value)})
        return _tidy(re.sub(rf"{GAP}(?:/?{GAP})+", GAP, text))

    def _raw(self, node: ast.AST, known: Mapping[str, ast.expr]) -> str:
        match node:
            case ast.Constant(value=str(text)):
                return re.sub(r"%(?:\.\d+)?[sdfg]", GAP, text)
            case ast.JoinedStr(values=values):
                return "".join(self._raw(value, known) for value in values)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._raw(left, known) + self._raw(right, known)
            case ast.FormattedValue(value=ast.Name(id=name), conversion=-1) | ast.Name(id=name) if name in known:
                return self._raw(known[name], {})
        return GAP


def _within(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module or function, without those of the functions in it."""
    for child in ast.iter_child_nodes(scope):
        if isinstance(scope, ast.JoinedStr) and isinstance(child, ast.Constant):
            continue
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _within(child)


def _assigned(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value
        elif isinstance(node, ast.NamedExpr):
            yield node.target.id, node.value


def _branches(node: ast.expr) -> Sequence[ast.expr]:
    return [*_branches(node.body), *_branches(node.orelse)] if isinstance(node, ast.IfExp) else [node]


def _is_text(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=value):
            return isinstance(value, str)
        case ast.BinOp(op=ast.Add()):
            return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _letters(text: str) -> int:
    """Length of the longest constant part."""
    return max(len(piece.strip(" :;,.()")) for piece in text.split(GAP))


def _tidy(text: str) -> str:
    return " ".join(text.replace("`", "").split())


# -- out of the page ----------------------------------------------------------------------------------------------


def quotes_of(page: str) -> list[str]:
    """What stands as code in the first column of the tables of messages."""
    quotes, is_messages = list[str](), False
    for line in page.splitlines():
        if not line.startswith("|"):
            is_messages = False
            continue
        first = re.split(r"(?<!\\)\|", line)[1]
        if first.strip() == "message":
            is_messages = True
        elif is_messages:
            quotes += [_tidy(quote.replace(r"\|", "|")) for quote in re.findall(r"``.+?``|`[^`]+`", first)]
    return quotes


def told_by(message: Message, quotes: Iterable[str]) -> str:
    """The quote that is the beginning of ``message``, of several the one that says most; "" where none is."""

    return max((quote for quote in quotes if _pattern(quote).match(message.text)), key=len, default="")


@functools.cache
def _pattern(quote: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, quote.split(GAP))))


def undocumented(messages: Iterable[Message], quotes: Sequence[str]) -> list[Message]:
    return [m for m in messages if not m.allowed and not told_by(m, quotes)]


# -- the checks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def messages() -> list[Message]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [m for path in paths for m in messages_of(path.read_text(), path.relative_to(ROOT).as_posix())]


@pytest.fixture(scope="module")
def quotes() -> list[str]:
    return quotes_of(PAGE.read_text())


def test_every_message_is_on_the_page(messages: list[Message], quotes: list[str]) -> None:
    assert len(messages) > 200
    missing = [f"{m.path}:{m.line}: {m.text}" for m in undocumented(messages, quotes)]
    assert not missing, f"add to {PAGE.name}:\n" + "\n".join(missing)


def test_every_quote_is_of_one_message(messages: list[Message], quotes: list[str]) -> None:
    """Of none: the code has changed. Of several: a new message would hide behind the beginning of another."""
    texts = {quote: set[str]() for quote in quotes}
    for message in messages:
        if not message.allowed and (quote := told_by(message, quotes)):
            texts[quote].add(message.text)
    wrong = {quote: found for quote, found in texts.items() if len(found) != 1}
    assert not wrong, "\n".join(f"{quote!r} quotes {sorted(found)}" for quote, found in wrong.items())


def test_quotes_can_be_searched_for(quotes: list[str]) -> None:
    assert not [quote for quote in quotes if _letters(quote) < LEAST_LETTERS]
    assert len(quotes) == len(set(quotes))


def test_what_nobody_meets_is_in_the_code(messages: list[Message]) -> None:
    assert {m.allowed for m in messages} - {""} == NOT_MET.keys()


def test_a_new_message_is_noticed(quotes: list[str]) -> None:
    source = """
def check(number):
    if number:
        reason = f"the number {number} is too odd: give an even one"
        raise ValueError(reason)
    _log.warning("%d numbers were found to be odd", number)
    raise StoreRefusedError(f"{number} numbers" + " are more than this store takes")
"""
    found = messages_of(source, "jobs/new.py")
    texts = ["the number … is too odd: give an even one", "… numbers were found to be odd"]
    assert [m.text for m in found] == [*texts, "… numbers are more than this store takes"]
    assert undocumented(found, quotes) == found
    assert undocumented(found, [*texts, "… numbers are more than"]) == []
