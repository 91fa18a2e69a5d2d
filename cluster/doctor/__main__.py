"""``python -m cluster.doctor``: whether a cluster is fit for a campaign, and what to mend. Exit code 0: it is."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import tyro

from cluster.doctor.examination import CheckName, Request, examine
from cluster.doctor.judgement import Finding, Outcome
from orchestrator.ray_session import ClusterError, ray_session


@dataclass(frozen=True)
class Options:
    """Look at every node of a Ray cluster as a campaign would use it. Exit code 0: one can start; 1: it cannot."""

    ray_address: str = field(default_factory=lambda: os.environ.get("RAY_ADDRESS", ""))
    """HOST:6379; default: RAY_ADDRESS; without it this machine is looked at, with a cluster of its own"""
    storage: str = field(default_factory=lambda: os.environ.get("IMAGENET_STORAGE", ""))
    """where runs would be kept; default: IMAGENET_STORAGE"""
    data: str = field(default_factory=lambda: os.environ.get("IMAGENET_DATA", ""))
    """a prepared data set; default: IMAGENET_DATA"""
    tracking_uri: str = field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    """of MLflow; default: MLFLOW_TRACKING_URI"""
    checks: tuple[CheckName, ...] = tuple(CheckName)
    """only these; the nodes themselves are always looked at"""
    timeout_s: float = 120.0
    """how long nodes may take over each question"""
    json: bool = False
    """one JSON object instead of lines"""


def main(argv: Sequence[str]) -> int:
    """Exit code. Raises ValueError for options that cannot be."""
    config = (tyro.conf.EnumChoicesFromValues, tyro.conf.FlagCreatePairsOff)
    options = tyro.cli(Options, args=list(argv), prog="python -m cluster.doctor", config=config)
    if options.timeout_s <= 0:
        raise ValueError(f"--timeout-s is {options.timeout_s:g}: give each question some seconds")
    findings = []
    for finding in _findings(options):
        findings.append(finding)
        if not options.json:
            print(line(finding), flush=True)
    counts = Counter(finding.outcome for finding in findings)
    can_start = not counts[Outcome.FAILS]
    if options.json:
        plain = [dataclasses.asdict(finding) | {"outcome": finding.outcome.value} for finding in findings]
        print(json.dumps({"can_start": can_start, "findings": plain}, indent=1))
    else:
        told = ", ".join(f"{counts[outcome]} {outcome.value}" for outcome in Outcome if counts[outcome])
        print(f"{'a campaign can start' if can_start else 'a campaign cannot start'}: {told}")
    return int(not can_start)


def line(finding: Finding) -> str:
    advice = f"\n{'':11}{'':12}→ {finding.advice}" if finding.advice else ""
    where = f"{finding.where}: " if finding.where else ""
    return f"{finding.outcome.value:11}{finding.check:12}{where}{finding.measured}{advice}"


def _findings(options: Options) -> Iterator[Finding]:
    request = Request(options.storage, options.data, options.tracking_uri, options.timeout_s, options.checks)
    where = options.ray_address or "a local cluster"
    try:
        with ray_session(options.ray_address or None) as cluster:
            have = f"{where}: {len(cluster.nodes)} nodes, {cluster.cpus} CPUs, {cluster.gpus} GPUs"
            yield Finding("ray", "", Outcome.OK, have)
            yield from examine(request)
    except (ClusterError, OSError) as error:
        advice = "then ask again; nothing else can be looked at before"
        yield Finding("ray", "", Outcome.FAILS, " ".join(str(error).split()), advice)


def _main() -> int:
    try:
        return main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(_main())
