"""The test protocols once more, in the paper's words and as slowly as possible: PIL, one image, one crop at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import nn

from orchestrator.config import Average, Protocol, TrainConfig

PAPER = (224, 256, 384, 480, 640)


def resize(image: Image.Image, shorter: int) -> Image.Image:
    """Shorter side ``shorter``, aspect kept; PIL's bilinear filter is antialiased."""
    scale = shorter / min(image.size)
    width, height = (int(side * scale + 0.5) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def cut(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    return np.asarray(image.crop(box), np.float32)


def crops(image: Image.Image, crop: int, shorter: int, ten: bool) -> Iterator[np.ndarray]:
    """[crop, crop, 3] each: the centre, or all ten."""
    whole = resize(image, shorter)
    right, bottom = whole.width - crop, whole.height - crop
    centre = (right // 2, bottom // 2)
    for x, y in ((0, 0), (right, 0), (0, bottom), (right, bottom), centre) if ten else (centre,):
        pixels = cut(whole, (x, y, x + crop, y + crop))
        yield pixels
        if ten:
            yield pixels[:, ::-1]


def scores(
    image: Image.Image, model: nn.Module, mean: np.ndarray, config: TrainConfig, protocol: Protocol
) -> np.ndarray:
    """[C] probabilities that ``protocol`` gives ``image``. mean: [3, S, S] or [3]."""
    crop, average = config.input.crop_px, config.evaluation.average
    channel = mean if mean.ndim == 1 else mean.mean((1, 2))
    pixel = mean if mean.ndim == 3 else np.broadcast_to(channel[:, None, None], (3, crop, crop))

    def as_input(pixels: np.ndarray) -> torch.Tensor:
        x = pixels.transpose(2, 0, 1)
        x = x - (pixel if x.shape == pixel.shape else channel[:, None, None])
        return torch.from_numpy(np.ascontiguousarray(x, np.float32))[None]

    def said(logits: torch.Tensor) -> np.ndarray:
        return (logits.softmax(1) if average is Average.SOFTMAX else logits)[0].numpy().astype(np.float64)

    model.eval()
    views = []
    with torch.no_grad():
        if protocol is not Protocol.MULTI_SCALE:
            ten = protocol is Protocol.TEN_CROP
            for pixels in crops(image.convert("RGB"), crop, config.input.test_shorter_side_px, ten):
                views.append(said(model(as_input(pixels))))
        else:
            window = model.forward_features(torch.zeros(1, 3, crop, crop)).shape[2]  # type: ignore[operator]
            for shorter in config.evaluation.scales_px or [round(px * crop / 224) for px in PAPER]:
                pixels = np.asarray(resize(middle(image.convert("RGB")), shorter), np.float32)
                for side in (pixels, pixels[:, ::-1]):
                    features = model.forward_features(as_input(side))  # type: ignore[operator]
                    places = [
                        said(model.classify(features[:, :, y : y + window, x : x + window]))  # type: ignore[operator]
                        for y in range(features.shape[2] - window + 1)
                        for x in range(features.shape[3] - window + 1)
                    ]
                    views.append(np.mean(places, 0))
    found = np.mean(views, 0)
    if average is Average.LOGITS:
        found = np.exp(found - found.max()) / np.exp(found - found.max()).sum()
    return found


def middle(image: Image.Image) -> Image.Image:
    """The longer side cut to four times the shorter one."""
    width, height = min(image.width, 4 * image.height), min(image.height, 4 * image.width)
    x, y = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((x, y, x + width, y + height))
