"""What a teacher's features of the predicted pair are held against: those of the true pair, layer by layer."""

from typing import Any, cast

import torch
from torch import Tensor

from perceptual_diffusion._shapes import compute_dtype, describe
from perceptual_diffusion.types import Distance, Feature


def check_features(given: Any, true: Any, batch: int) -> None:
    """Raise unless both are lists of features of a batch, alike in number and shape.

    Args:
        given: the teacher's features of one pair.
        true: of the true pair.
        batch: the number of samples B.

    Raises:
        TypeError: one is no list of features.
        ValueError: a feature's first dimension is not the batch, or the shapes differ.
    """
    for features in (given, true):
        _check(features, batch)
    if [describe(f) for f in given] != [describe(f) for f in true]:
        raise ValueError(
            f"`teacher` gives features of shapes {describe(given)} and {describe(true)}, expected the same in every pass."
        )


def compare(features: list[Feature], true: list[Feature], batch: int, distance: Distance) -> Tensor:
    """Give the mean over the features of their distance, shape (B,).

    Raises:
        ValueError: the distance does not give one value per sample.
    """
    values = []
    for f, g in zip(features, true, strict=True):
        if isinstance(f, list):  # samples of different sizes
            values.append(torch.cat([_distance(x, y, distance) for x, y in zip(f, g, strict=True)]))
            continue
        value = _distance(f, cast(Tensor, g), distance)
        values.append(value if len(value) == batch else value.reshape(batch, -1).mean(1))  # of batch · frames
    return torch.stack(values).mean(0)


def _distance(f: Tensor, g: Tensor, distance: Distance) -> Tensor:
    dtype = compute_dtype(f, g)
    value = distance(f.to(dtype), g.to(dtype))
    if not isinstance(value, Tensor) or value.shape != f.shape[:1]:
        raise ValueError(
            f"`distance` gives {describe(value)}, expected one value per sample, shape {tuple(f.shape[:1])}."
        )
    return value


def _check(features: Any, batch: int) -> None:
    if not isinstance(features, list | tuple) or not features or not all(map(_is_feature, features)):
        raise TypeError(
            f"`teacher` gives {describe(features)}, expected a list of features, one tensor of shape (B, *) per layer."
        )
    for feature in features:
        if isinstance(feature, list):
            if len(feature) != batch or any(len(part) != 1 for part in feature):
                raise ValueError(
                    f"a feature has shapes {describe(feature)}, expected {batch} tensors of shape (1, *), one per sample."
                )
        elif feature.ndim == 0 or len(feature) < batch or (len(feature) % batch if batch else len(feature)):
            raise ValueError(
                f"a feature has shape {tuple(feature.shape)}, expected its first dimension to be the batch of {batch}, or the "
                "batch times frames. Take the sample's stream out of the layer with an adapter's `select`."
            )


def _is_feature(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(part, Tensor) and part.ndim > 0 for part in value)
    return isinstance(value, Tensor)
