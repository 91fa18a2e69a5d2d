"""A run in a paragraph, for whoever meets it among many: what it trains, on what, where it is and how it goes on."""

from __future__ import annotations

from orchestrator.config import BatchConfig, Family, ModelConfig, ScheduleConfig
from orchestrator.control.comparison import DataNote
from orchestrator.data.shards import DataSet
from orchestrator.masking import masked
from orchestrator.storage import Storage
from orchestrator.training.optimization import total_steps

_MAX_COMMAND_LENGTH = 2000  # MLflow takes 8000 characters of description
_NETWORKS = {
    Family.RESNET: "ResNet-{}",
    Family.PLAIN: "plain-{}",
    Family.VGG: "VGG-{}",
    Family.CIFAR_RESNET: "CIFAR ResNet-{}",
    Family.CIFAR_PLAIN: "CIFAR plain-{}",
}


def data_note(url: str, sha256: str) -> DataNote:
    """The data set at ``url``. Where it is gone, or is another by now, its folder's name must do."""
    try:
        data = DataSet(Storage(url))
    except (OSError, ValueError):
        data = None
    if data is None or data.digest != sha256:
        return DataNote(masked(url).rstrip("/").rpartition("/")[2] or "unknown", sha256, url)
    splits = data.manifest.splits
    counts = {f"{name} images": splits[name].count for name in ("train", "val") if name in splits}
    return DataNote(data.manifest.name, sha256, url, counts | {"classes": data.num_classes})


def network(model: ModelConfig) -> str:
    """``ResNet-50``, or what else is trained."""
    if model.factory:
        return model.factory
    shortcut = f" {model.shortcut.value}" if model.shortcut is not None else ""
    return _NETWORKS[model.family].format(model.depth) + shortcut


def run_description(
    *,
    model: ModelConfig,
    batch: BatchConfig,
    schedule: ScheduleConfig,
    data: DataNote,
    crop_px: int,
    seed: int,
    run_url: str,
    command: str,
) -> str:
    """What a run is, where it is and how it goes on, in Markdown."""
    counts = ", ".join(f"{count} {what}" for what, count in data.counts.items())
    steps, num_images = f"at most {schedule.max_steps} steps", data.counts.get("train images")
    if num_images:
        total = total_steps(schedule, num_images, batch.global_batch_size)
        steps = f"{total} steps ({total * batch.global_batch_size / num_images:.4g} epochs)"
    elif schedule.max_epochs:
        steps = f"at most {schedule.max_epochs:g} epochs"
    if len(command) > _MAX_COMMAND_LENGTH:
        command = f"{command[:_MAX_COMMAND_LENGTH]} …"
    return (
        f"**{network(model)}** on {data.name}{f' ({counts})' if counts else ''} at {crop_px} pixels."
        f" Batch {batch.global_batch_size} in groups of {batch.bn_group_size}, {steps},"
        f" learning rate {schedule.lr:g} ({schedule.policy.value}), seed {seed}.\n\n"
        f"- Checkpoints and the journal, of which this is a copy: `{run_url}`\n"
        f"- After an interruption the same command goes on: `{command}`\n"
        "- The error curves as a figure: Artifacts, `errors.png`"
    )
