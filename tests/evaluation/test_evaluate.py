"""Each protocol against a naive one; the same bytes from any number of workers, and after any interruption."""

from __future__ import annotations

import io
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.config import Average, GuardConfig, Protocol
from orchestrator.control.guard import Failure, FailureClass
from orchestrator.control.mailbox import Mailbox
from orchestrator.control.stuck import Place
from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.pipeline import EvalInput, Mean
from orchestrator.data.shards import DataSet
from orchestrator.data.views import TestView
from orchestrator.evaluation import ranking, scores
from orchestrator.evaluation.evaluate import evaluate, score_name
from orchestrator.evaluation.protocols import check_protocols
from orchestrator.storage import Storage
from orchestrator.training.notices import Event
from orchestrator.training.ownership import SupersededError
from orchestrator.training.validation import validate
from orchestrator.world import World
from tests.data.build import build, jpeg, noise_image
from tests.evaluation import naive
from tests.evaluation.scoring import Workers, config_of, do, mean_image, network, record_of, score

# Of a probability. DALI and PIL decode and filter with other roundings, which an average evens out; sizes that are one
# pixel smaller make a difference of 0.03 and more, the mean of all pixels in place of each one's mostly of 0.02.
TOLERANCE = {Protocol.ONE_CROP: 0.01, Protocol.TEN_CROP: 0.002, Protocol.MULTI_SCALE: 0.002}
SIZES = [(160, 120), (120, 160), (160, 120), (100, 100), (300, 90), (33, 40), (64, 48), (160, 120), (41, 40)]


def images(sizes: list[tuple[int, int]], num_classes: int = 5) -> list[tuple[str, bytes, int]]:
    rng = np.random.default_rng(0)
    return [(f"i{k}.jpg", jpeg(noise_image(rng, *s), subsampling=0), k % num_classes) for k, s in enumerate(sizes)]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return build(tmp_path_factory.mktemp("generated"), images(SIZES))


@pytest.fixture(scope="module")
def photographs(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    files = sorted((real_data / "photos_folder" / "val").glob("*/*.jpg"))[::9]
    return build(tmp_path_factory.mktemp("photographs"), [(f.name, f.read_bytes(), k % 5) for k, f in enumerate(files)])


def check_naive(data: DataSet, found: scores.Scores, config: object, protocol: Protocol) -> None:
    split, crop_px = data.split("val"), config.input.crop_px  # type: ignore[attr-defined]
    model, mean = network(data.num_classes, crop_px), mean_image(crop_px).numpy()
    assert found.names.to_pylist() == split.names.to_pylist()
    expected = np.array(
        [
            naive.scores(Image.open(io.BytesIO(encoded.tobytes())), model, mean, config, protocol)  # type: ignore[arg-type]
            for encoded in split.read(np.arange(len(split)))
        ]
    )
    np.testing.assert_allclose(found.scores, expected, rtol=0, atol=TOLERANCE[protocol])
    np.testing.assert_allclose(found.scores.sum(1), 1, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 0.05  # images are told apart


@pytest.mark.parametrize("protocol", Protocol)
@pytest.mark.parametrize("average", Average)
def test_scores_are_the_naive_ones(generated: DataSet, tmp_path: Path, protocol: Protocol, average: Average) -> None:
    config = config_of(generated, tmp_path, average=average)
    check_naive(generated, score(config, protocol, tmp_path), config, protocol)


@pytest.mark.parametrize("protocol", Protocol)
def test_scores_of_photographs_are_the_naive_ones(photographs: DataSet, tmp_path: Path, protocol: Protocol) -> None:
    config = config_of(photographs, tmp_path, crop_px=64, batch_megapixels=0.5)
    check_naive(photographs, score(config, protocol, tmp_path), config, protocol)


def test_one_crop_is_the_validation_of_training(generated: DataSet, tmp_path: Path) -> None:
    config = config_of(generated, tmp_path)
    found = score(config, Protocol.ONE_CROP, tmp_path)
    mean = Mean(mean_image(32).numpy())
    source = EvalInput(generated.split("val"), TestView(32, 37), mean, DecodeSettings(), 4, 0)
    totals = validate(network(5, 32), source, World(), None)
    source.close()
    errors = ranking.errors(found)
    assert (errors.top1_error, errors.top5_error) == (totals.top1_error, totals.top5_error)


def test_a_file_says_what_it_is(generated: DataSet, tmp_path: Path) -> None:
    config = config_of(generated, tmp_path, scales_px=(40, 32))
    events = list[dict[str, object]]()
    found = score(config, Protocol.MULTI_SCALE, tmp_path, emit=events.append)
    assert found.info.protocol == {
        "kind": "multi_scale",
        "crop_px": 32,
        "shorter_sides_px": [32, 40],
        "average": "softmax",
        "mirrored": True,
        "longest_side": 4,
    }
    assert found.info.data["sha256"] == generated.digest
    assert found.info.model == record_of(generated).to_json()
    assert found.labels.tolist() == [k % 5 for k in range(len(SIZES))]
    assert list(zip(found.width.tolist(), found.height.tolist(), strict=True)) == SIZES
    name = score_name("1" * 64, config, generated.digest, "val", Protocol.MULTI_SCALE)
    assert found.url == f"{tmp_path}/{name}"
    assert [e["done"] for e in events if e["kind"] == "scoring"] == [8, 9]
    assert events[-1]["top1_error"] == ranking.errors(found).top1_error
    # Again: what is there is not scored once more.
    bytes_before = (tmp_path / name).stat()
    again = list[dict[str, object]]()
    score(config, Protocol.MULTI_SCALE, tmp_path, emit=again.append)
    assert again == events[-1:]
    assert (tmp_path / name).stat() == bytes_before


# -- any workers, any interruption --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """40 images in five parts; two of them broken."""
    broken = {3: b"this is no image at all", 17: jpeg(noise_image(np.random.default_rng(1), 64, 48))[:-2]}
    return build(tmp_path_factory.mktemp("many"), images([(64, 48), (48, 64), (50, 50), (90, 60)] * 10), broken=broken)


@pytest.fixture(scope="module")
def alone(many: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed evaluation by one worker."""
    folder = tmp_path_factory.mktemp("alone")
    for protocol in (Protocol.TEN_CROP, Protocol.MULTI_SCALE):
        score(config_of(many, folder), protocol, folder)
    return folder


def contents(folder: Path, protocol: Protocol) -> dict[str, bytes]:
    """What is left in the folder for scores, parts and fragments too, of one protocol."""
    paths = (path for path in (folder / "scores").rglob("*") if path.is_file() and f"-{protocol.value}-" in str(path))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(("size", "protocol"), [(2, Protocol.MULTI_SCALE), (3, Protocol.TEN_CROP)])
def test_workers_make_the_same_bytes(many: DataSet, alone: Path, tmp_path: Path, size: int, protocol: Protocol) -> None:
    workers = Workers(config_of(many, tmp_path), protocol, tmp_path, size)
    assert workers.end() == [0] * size
    expected = contents(alone, protocol)
    assert len(expected) == 2
    assert contents(tmp_path, protocol) == expected
    told = [e["text"] for e in workers.events() if e["kind"] == "notice"]
    assert sorted(told) == [f"scoring: val image i{k}.jpg cannot be decoded: it counts as wrong" for k in (17, 3)]


@pytest.mark.parametrize(
    ("size", "rank", "share", "then"), [(1, 0, 0.5, 2), (2, 1, 0.9, 3), (3, 1, 0.9, 1), (1, 0, 1.0, 1)]
)
def test_a_killed_evaluation_goes_on(
    many: DataSet, alone: Path, tmp_path: Path, size: int, rank: int, share: float, then: int
) -> None:
    """When ``rank`` has done this share of its work, in a part, or (1.0) in the assembly; then with other workers."""
    config, calls = config_of(many, tmp_path), list[int]()
    name = score_name("1" * 64, config, many.digest, "val", Protocol.MULTI_SCALE)
    do(config, Protocol.MULTI_SCALE, tmp_path / "counted", World(rank, size), alive=lambda: calls.append(0))
    call = min(len(calls) - 1, int(len(calls) * share))
    Workers(config, Protocol.MULTI_SCALE, tmp_path / "run", size, (rank, call)).end_killed()
    left = contents(tmp_path / "run", Protocol.MULTI_SCALE)
    parts = [path for path in left if path.rpartition("/")[2].isdigit()]
    assert name not in left
    assert 0 < len(parts) < 5 or (len(parts) == 5 and share == 1.0)
    workers = Workers(config, Protocol.MULTI_SCALE, tmp_path / "run", then)
    assert workers.end() == [0] * then
    assert contents(tmp_path / "run", Protocol.MULTI_SCALE) == contents(alone, Protocol.MULTI_SCALE)


def test_a_torn_part_is_scored_again(many: DataSet, alone: Path, tmp_path: Path) -> None:
    config, protocol = config_of(many, tmp_path), Protocol.TEN_CROP
    Workers(config, protocol, tmp_path, 1, (0, 40)).end_killed()
    first, second, *_ = sorted(tmp_path.glob("scores/*.parts-*/0*"))
    first.write_bytes(first.read_bytes()[:-4])
    data = bytearray(second.read_bytes())
    data[-5] ^= 1
    second.write_bytes(data)
    told = list[dict[str, object]]()
    score(config, protocol, tmp_path, emit=told.append)
    torn = [e["text"] for e in told if "torn" in str(e.get("text"))]
    assert torn == [
        f"part {k} of the ten_crop scores of the val set was torn in storage: it is scored again" for k in (0, 1)
    ]
    assert contents(tmp_path, protocol) == contents(alone, protocol)


def test_parts_of_other_code_are_not_mixed_in(many: DataSet, alone: Path, tmp_path: Path) -> None:
    config, protocol = config_of(many, tmp_path, batch_megapixels=0.02), Protocol.TEN_CROP
    Workers(config, protocol, tmp_path, 1, (0, 40)).end_killed()
    config = config_of(many, tmp_path)
    for part in tmp_path.glob("scores/*.parts-*/0*"):
        part.write_bytes(b"not to be read")
    told = list[dict[str, object]]()
    score(config, protocol, tmp_path, emit=told.append)
    assert not [e for e in told if "torn" in str(e.get("text"))]
    assert contents(tmp_path, protocol) == contents(alone, protocol)


def test_a_worker_of_an_earlier_start_may_end_it(many: DataSet, alone: Path, tmp_path: Path) -> None:
    """It was frozen, makes the file and takes the parts away, while another waits for the last ones or reads them."""
    config, protocol = config_of(many, tmp_path), Protocol.TEN_CROP
    waits, told = list[int](), list[dict[str, object]]()

    def thawed(folder: Path, when: int = 1) -> None:
        waits.append(0)
        if len(waits) == when:
            do(config, protocol, folder, World())
        assert len(waits) < when + 50, "it waits for parts that are gone"

    def thaws(folder: Path, when: int = 1) -> dict[str, object]:
        waits.clear()
        return {"emit": told.append, "waiting" if when == 1 else "alive": lambda: thawed(folder, when)}

    do(config, protocol, tmp_path / "waits", World(0, 2), **thaws(tmp_path / "waits"))
    assert waits == [0]
    do(config, protocol, tmp_path / "counted", World(), **thaws(tmp_path / "counted", 10_000))
    calls = len(waits)
    do(config, protocol, tmp_path / "reads", World(), **thaws(tmp_path / "reads", calls - 3))
    for folder in ("waits", "reads"):
        assert contents(tmp_path / folder, protocol) == contents(alone, protocol), folder
    assert not [e for e in told if "torn" in str(e.get("text"))]


def test_who_has_lost_the_run_takes_nothing_away(many: DataSet, tmp_path: Path) -> None:
    config, protocol = config_of(many, tmp_path), Protocol.TEN_CROP

    def lost() -> None:
        raise SupersededError

    with pytest.raises(SupersededError):
        score(config, protocol, tmp_path, owned=lost)
    assert len(list(tmp_path.glob("scores/*.parts-*/0*"))) == 5
    assert not list(tmp_path.glob("scores/*.json"))


def test_parts_of_another_number_of_threads_are_not_mixed_in(many: DataSet, tmp_path: Path) -> None:
    """Two threads sum in another order than one."""
    config, protocol = config_of(many, tmp_path), Protocol.ONE_CROP
    for size, cpus in ((2, 1), (1, 2)):
        with suppress(_EndError):
            do(config, protocol, tmp_path, World(0, size), cpus=cpus, waiting=_end, owned=_end)
    assert sorted(len(list(f.iterdir())) for f in tmp_path.glob("scores/*.parts-*")) == [3, 5]


class _EndError(Exception):
    pass


def _end() -> None:
    raise _EndError


def test_the_limit_is_on_all_images(many: DataSet, tmp_path: Path) -> None:
    """Whoever decoded them, at this start or an earlier one; and it may be raised."""
    config, protocol = config_of(many, tmp_path), Protocol.ONE_CROP
    with suppress(_EndError):
        do(config, protocol, tmp_path, World(), owned=_end)
    assert len(list(tmp_path.glob("scores/*.parts-*/0*"))) == 5
    low = replace(config, input=replace(config.input, max_undecodable=1))
    with pytest.raises(ValueError, match=r"2 images of the val set cannot be decoded, more than .*able 1"):
        score(low, protocol, tmp_path)
    enough = replace(config, input=replace(config.input, max_undecodable=2))
    assert (~score(enough, protocol, tmp_path).decoded).sum() == 2


def test_scoring_is_progress_for_the_guard(generated: DataSet, tmp_path: Path) -> None:
    """What is told is understood: a run that scores a part after each restart is not given up."""
    told = list[Event]()
    score(config_of(generated, tmp_path), Protocol.TEN_CROP, tmp_path, emit=told.append)
    progress = [event for event in told if event["kind"] == "scoring"]
    assert len(progress) == 2
    for events, may_start in (([[], progress[:1], progress[1:], []], True), ([[], [], [], []], False)):
        mailbox = Mailbox("run", asdict(GuardConfig(max_stalled_restarts=1, max_failures=100)))
        for number, of_group in enumerate(events):
            starts, _, _ = mailbox.begin(str(number), 1, Place(0, 100, "1", "host", "node"))
            mailbox.put(of_group)
            mailbox.failed(str(number), 0, Failure(FailureClass.INFRASTRUCTURE, "worker 0", "?"))
        assert starts == may_start


# -- odd images and wrong input -----------------------------------------------------------------------------------


def test_an_undecodable_image_has_the_prior_and_is_wrong(many: DataSet, alone: Path) -> None:
    for record in scores.find(Storage(str(alone))):
        found = scores.load(f"{alone}/{record.name}")
        assert np.flatnonzero(~found.decoded).tolist() == [3, 17]
        labels = many.split("train").label
        prior = np.bincount(labels, minlength=5) / len(labels)
        np.testing.assert_allclose(found.scores[[3, 17]], [prior, prior], rtol=1e-6)
        assert np.abs(found.scores[[2, 4, 16, 18]] - prior).max() > 0.01


def test_what_preparation_found_broken_is_not_touched(generated: DataSet, tmp_path: Path) -> None:
    data = DataSet(generated.storage)
    split = data.split("val")
    decodable = split.decodable.copy()
    decodable[2] = 0
    data.split = lambda name, staged=None: replace(split, decodable=decodable)  # type: ignore[method-assign,assignment]
    name = evaluate(
        record_of(data),
        network(5, 32),
        mean_image(32),
        config_of(data, tmp_path),
        data,
        "val",
        Protocol.MULTI_SCALE,
        World(),
        cpus=1,
        run=Storage(str(tmp_path)),
        code_version="test",
    )
    assert np.flatnonzero(~scores.load(f"{tmp_path}/{name}").decoded).tolist() == [2]


@pytest.mark.parametrize("protocol", Protocol)
def test_extreme_shapes_have_scores(tmp_path: Path, protocol: Protocol) -> None:
    """A sliver is seen around its middle, and takes no more memory than four squares."""
    data = build(tmp_path / "data", images([(1, 1), (3, 500), (500, 3), (2, 2), (1200, 900), (64, 256), (64, 257)]))
    told = list[dict[str, object]]()
    config = config_of(data, tmp_path)
    found = score(config, protocol, tmp_path, emit=told.append)
    assert found.decoded.all()
    check_naive_loosely(data, found, config, protocol)
    slivers = [e["text"] for e in told if e["kind"] == "notice"]
    if protocol is Protocol.MULTI_SCALE:
        text = "scoring: 3 val images are more than 4 times as long as wide: multi_scale sees their middle (i1.jpg, …)"
        assert slivers == [text]
    else:
        assert not slivers


def check_naive_loosely(data: DataSet, found: scores.Scores, config: object, protocol: Protocol) -> None:
    """Enlarging three pixels to thirty shows every rounding."""
    split, model, mean = data.split("val"), network(data.num_classes, 32), mean_image(32).numpy()
    for i, encoded in enumerate(split.read(np.arange(len(split)))):
        image = Image.open(io.BytesIO(encoded.tobytes()))
        expected = naive.scores(image, model, mean, config, protocol)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.scores[i], expected, rtol=0, atol=0.05, err_msg=split.names[i].as_py())


def test_odd_photographs_are_scored_or_marked(real_data: Path, tmp_path: Path) -> None:
    """As they are in the wild: CMYK, grey, turned, progressive, cut off, and files that are no images."""
    files = sorted((real_data / "odd_images").glob("*.jp*g"))
    data = build(tmp_path / "data", [(f.name, f.read_bytes(), k % 5) for k, f in enumerate(files)])
    found = score(config_of(data, tmp_path), Protocol.MULTI_SCALE, tmp_path)
    broken = {name for name, decoded in zip(found.names.to_pylist(), found.decoded, strict=True) if not decoded}
    assert {"text.jpg", "empty.jpg"} <= broken
    assert not {"hopper_gray.jpg", "hopper_orientation_6.jpg", "progressive.jpg", "one_pixel.jpg"} & broken
    assert np.isfinite(found.scores).all()


def test_a_network_that_cannot_slide_is_refused(generated: DataSet, tmp_path: Path) -> None:
    own = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 5))
    every = config_of(generated, tmp_path, protocols=tuple(Protocol))
    with pytest.raises(ValueError, match=r"multi_scale slides a network over whole images, and Sequential has no"):
        check_protocols(every, generated, own)
    crops = config_of(generated, tmp_path, protocols=(Protocol.ONE_CROP, Protocol.TEN_CROP))
    check_protocols(crops, generated, own)
    check_protocols(every, generated, network(5, 32))
    with pytest.raises(ValueError, match="has no split 'test'"):
        check_protocols(
            config_of(generated, tmp_path, protocols=tuple(Protocol), splits=("test",)), generated, network(5, 32)
        )


def test_a_model_of_other_classes_is_refused(generated: DataSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"knows 7 classes, the data set .* has 5"):
        evaluate(
            record_of(generated, num_classes=7),
            network(7, 32),
            mean_image(32),
            config_of(generated, tmp_path),
            generated,
            "val",
            Protocol.ONE_CROP,
            World(),
            cpus=1,
            run=Storage(str(tmp_path)),
            code_version="test",
        )
    record = record_of(generated)
    renamed = ("n99999999", *(each.wnid for each in generated.manifest.classes[1:]))
    with pytest.raises(ValueError, match=r"knows label 0 as n99999999, in the data set .* it is "):
        evaluate(
            replace(record, wnids=renamed),
            network(5, 32),
            mean_image(32),
            config_of(generated, tmp_path),
            generated,
            "val",
            Protocol.ONE_CROP,
            World(),
            cpus=1,
            run=Storage(str(tmp_path)),
            code_version="test",
        )
    assert not list(tmp_path.iterdir())
