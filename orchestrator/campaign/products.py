"""What comes of a campaign's scores, in its folder: an ensemble for each protocol, and the submission.

::

    ensemble/PROTOCOL/     the plain average of all members, on every split (``evaluation.ensemble``)
    submission/            the file of the protocol that is submitted, and its lineage
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress

from orchestrator.campaign.member import score_urls
from orchestrator.campaign.plan import Campaign
from orchestrator.code_version import code_version
from orchestrator.config import Protocol, TrainConfig
from orchestrator.data.shards import DataSet
from orchestrator.evaluation import ensemble, scores, submission, submission_check
from orchestrator.evaluation.ensemble import Ensemble
from orchestrator.evaluation.submission import Format, Written
from orchestrator.evaluation.submission_check import Expected
from orchestrator.storage import DigestError, Storage


def ensemble_folder(folder: Storage, protocol: Protocol) -> Storage:
    """Where the ensemble of ``protocol`` is."""
    return folder.sub(f"ensemble/{protocol.value}")


def read_ensemble(folder: Storage, protocol: Protocol) -> Ensemble | None:
    """The ensemble of ``protocol``; None where there is none, or it is not whole."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return Ensemble.from_json(json.loads(ensemble_folder(folder, protocol).read(ensemble.MANIFEST)))
    return None


def ensemble_members(
    folder: Storage, protocols: Sequence[Protocol], configs: Mapping[str, TrainConfig], data_sha256: str
) -> frozenset[str]:
    """Members of the ensembles in ``folder``; empty where not all are there, made of the scores that are there now.

    configs: of the members that are done.
    """
    found = set[frozenset[str]]()
    digests = {sha256: name for name, config in configs.items() for sha256 in _digests(config, data_sha256)}
    for protocol in protocols:
        made = read_ensemble(folder, protocol)
        if made is None:
            return frozenset()
        used = [digests.get(file["sha256"]) for entry in made.members for file in entry.scores.values()]
        found.add(frozenset(name for name in used if name is not None) if None not in used else frozenset())
    return found.pop() if len(found) == 1 else frozenset()


def _digests(config: TrainConfig, data_sha256: str) -> list[str]:
    """SHA-256 of a member's score files."""
    found = []
    for url in score_urls(config, data_sha256).values():
        run, _, name = url.rpartition("/")
        if (record := scores.read_record(Storage(run), name)) is not None:
            found.append(record.sha256)
    return found


def build_ensembles(
    folder: Storage,
    campaign: Campaign,
    members: Sequence[str],
    data_sha256: str,
) -> None:
    """Average the scores of ``members``, protocol by protocol. What is there already is not made again.

    Raises ValueError where scores are damaged or do not fit together, OSError where storage fails.
    """
    configs = campaign.run_configs()
    for protocol in campaign.config.evaluation.protocols:
        urls = [
            url
            for name in members
            for test, url in score_urls(configs[name], data_sha256).items()
            if test.protocol is protocol
        ]
        out = ensemble_folder(folder, protocol)
        ensemble.build([scores.load(url) for url in urls], out, code_version=code_version())


# -- submission -----------------------------------------------------------------------------------------------------


_FILE = "submission.txt"


def check_classes(data: DataSet) -> None:
    """Refuse, before anything is trained, classes that cannot be submitted. Raises ValueError."""
    try:
        submission.tokens_of(data.manifest.classes, Format.ILSVRC)
    except ValueError as error:
        raise ValueError(f"{error}; --submit False makes no submission") from None


def submission_url(folder: Storage) -> str | None:
    """Of the submission that is there; None where there is none."""
    return f"{folder.url}/submission/{_FILE}" if folder.exists(f"submission/{_FILE}") else None


def has_submission(folder: Storage, protocol: Protocol) -> bool:
    """Whether the submission of the ensemble of ``protocol`` is there, as its lineage says."""
    made, out = read_ensemble(folder, protocol), folder.sub("submission")
    if made is None:
        return False
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError, DigestError):
        lineage = json.loads(out.read(_FILE + submission.LINEAGE))
        out.read(_FILE, lineage["file"]["sha256"])
        return bool(lineage["scores"]["sha256"] == made.files[made.scores["test"]])
    return False


def write_submission(folder: Storage, protocol: Protocol, data: DataSet) -> Written:
    """Write and validate the submission of the ensemble of ``protocol``.

    Raises ValueError where images or classes do not fit, OSError where storage fails.
    """
    made, out = read_ensemble(folder, protocol), folder.sub("submission")
    assert made is not None
    averaged = scores.load(f"{ensemble_folder(folder, protocol).url}/{made.scores['test']}")
    written = submission.write(averaged, out, _FILE, data=data, code_version=code_version())
    tokens = submission.tokens_of(averaged.info.classes, Format.ILSVRC)
    expected = Expected(tokens, len(averaged), sorted(averaged.names.to_pylist()))
    if problems := submission_check.read(out.read(_FILE, written.sha256), expected).problems:
        raise ValueError(f"the submission {out.url}/{_FILE} has {len(problems)} problems, the first: {problems[0]}")
    return written


def summary(folder: Storage, campaign: Campaign) -> list[str]:
    """What came of the campaign, in lines."""
    lines = []
    for protocol in campaign.config.evaluation.protocols:
        made = read_ensemble(folder, protocol)
        if made is None:
            continue
        for split, errors in made.errors.items():
            lines.append(
                f"ensemble     {len(made.members)} members, {protocol.value.replace('_', '-')}, {split}: "
                f"{errors.top1_error:.2f} % top-1, {errors.top5_error:.2f} % top-5 error"
            )
        lines.append(f"report       {ensemble_folder(folder, protocol).url}/report.md")
    if url := submission_url(folder):
        lines.append(f"submission   {url} (lineage beside it)")
    return lines
