"""How MLflow shows runs side by side: what is written beside the numbers, once for an experiment and once for a run.

MLflow's own table of runs has no metric and no setting, and its charts come in the order of the alphabet, over steps,
which mean less or more data at another batch size. The experiment is therefore given a saved view (curves over epochs,
columns with the errors and with what tells recipes apart) and a description that leads there; a run is given a
description, whose line of results is kept up to date, and its data set. All is text; ``mlflow_store`` stores it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NOTE_TAG = "mlflow.note.content"  # MLflow's description of an experiment or run, in Markdown
_VIEW = "side-by-side"
_VIEW_TAG = f"mlflow.sharedViewState.{_VIEW}"
_DIGEST_LENGTH = 16  # MLflow takes 36 characters
_RESULT = re.compile(r"^\*\*Result\b.*$", re.MULTILINE)
TABLE_BEGINS = "| Member |"
_TABLE = re.compile(rf"^{re.escape(TABLE_BEGINS)}.*$(?:\n\|.*$)*", re.MULTILINE)

# -- an experiment ----------------------------------------------------------------------------------------------


def page(experiment_id: str, rest: str = "") -> str:
    """The part of an address after the server's: charts of all runs; or ``rest``, one of the experiment's pages."""
    rest = rest or f"runs?compareRunsMode=CHART&viewStateShareKey={_VIEW}"
    # Without the last part, MLflow shows its pages for language models; no tag of the experiment changes that.
    return f"#/experiments/{experiment_id}/{rest}{'&' if '?' in rest else '?'}workflowType=machine_learning"


def experiment_tags(experiment_id: str, time_ms: int) -> dict[str, str]:
    """Description and saved view of an experiment that was made at ``time_ms``."""
    note = (
        "Errors are percent, steps are iterations."
        f" [**Side by side**]({page(experiment_id)}): curves over epochs, errors, what differs."
        "\n\n"
        "- `best_validation_top1_error` is the lowest so far; columns show the newest value of every other metric.\n"
        "- `epoch` counts passes over the training set: choose it for the x axis where batch sizes differ.\n"
        "- `images_per_s` is of all workers; `data_wait_share` is the part of the time in which training waited for"
        " data (tag `time`: where all of it went); `replaced_images` are those that could not be decoded.\n"
        "- Tag `changes`: what a run sets otherwise than its recipe. `starts`: how often it was started; it goes on in"
        " one row.\n"
        "- A campaign is a row; its members and their ensemble unfold below it where the table is not sorted by a"
        " metric.\n"
        "- Two runs in full: select them, then Compare, then *Show diff only*."
    )
    state = json.dumps(_view_state(), separators=(",", ":"))
    view = {"name": "Side by side", "createdAt": time_ms, "updatedAt": time_ms, "state": state}
    return {NOTE_TAG: note, _VIEW_TAG: json.dumps(view)}


def _view_state() -> dict[str, Any]:
    """What MLflow 3.17 keeps of its page of runs when a person saves a view; what is left out is as by default."""
    widths = {
        "metrics.`best_validation_top1_error`": 190,
        "metrics.`validation_top1_error`": 160,
        "metrics.`train_top1_error`": 130,
        "metrics.`val_ten_crop_top1_error`": 180,
        "metrics.`val_multi_scale_top1_error`": 190,
        "metrics.`epoch`": 70,
        "duration": 80,
        "tags.`network`": 110,
        "tags.`recipe`": 130,
        "tags.`changes`": 300,
        "params.`batch.global_batch_size`": 160,
        "params.`schedule.lr`": 110,
        "params.`seed`": 70,
        "attributes.`Dataset`": 280,
    }
    charts_by_section = {
        "Learning curves": ("validation_top1_error", "train_top1_error", "train_loss", "learning_rate"),
        "Speed": ("images_per_s", "data_wait_share"),
        # The rest of a run's metrics: MLflow adds their charts, here and folded.
        "Model metrics": (),
        "System metrics": (),
    }
    return {
        "orderByKey": "metrics.`best_validation_top1_error`",
        "orderByAsc": True,
        "selectedColumns": [column for column in widths if column != "duration"],  # which is always shown
        "columnOrder": list(widths),
        "columnWidths": widths,
        "compareRunCharts": [
            _chart(metric, section) for section, metrics in charts_by_section.items() for metric in metrics
        ],
        "compareRunSections": [
            {
                "uuid": section,
                "name": section,
                "display": bool(metrics),
                "columns": 2,
                "cardHeight": 300,
                "isReordered": True,
                "isGenerated": not metrics,
            }
            for section, metrics in charts_by_section.items()
        ],
        "isAccordionReordered": True,  # the sections stay in this order
    }


def _chart(metric: str, section: str) -> dict[str, Any]:
    return {
        "type": "LINE",
        "uuid": metric,
        "metricSectionId": section,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": "metric",
        "selectedXAxisMetricKey": "epoch",
        "useGlobalXaxisKey": False,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "useGlobalLineSmoothing": True,
        "runsCountToCompare": 10,
    }


# -- a run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataNote:
    """A data set as MLflow records it: its counts are by what is counted ("train images", …)."""

    name: str
    sha256: str
    url: str
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """As much of the SHA-256 as MLflow takes and a person compares."""
        return self.sha256[:_DIGEST_LENGTH]


def run_note(description: str, experiment_id: str, result: str) -> str:
    """The description of a new run."""
    link = f"[Side by side with the other runs]({page(experiment_id)})"
    return "\n\n".join(text for text in (result, description, link) if text)


def with_result(note: str, result: str) -> str:
    """``note`` with ``result`` for its line of results. A note without one is a person's own, and stays as it is."""
    return _RESULT.sub(lambda match: result, note, count=1)


def with_table(note: str, table: str) -> str:
    """``note`` with ``table`` for its table of members. A note without one is a person's own, and stays as it is."""
    return _TABLE.sub(lambda match: table, note, count=1)
