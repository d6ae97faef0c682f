"""Small questions about tensors and nested samples."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from perceptual_diffusion._shapes import leaves, map_leaves, mean_square
from perceptual_diffusion.schedules import precise
from perceptual_diffusion.types import Sample

TINY = 1e-30


def finite(sample: Any) -> bool:
    """Tell whether every number is finite."""
    return all(bool(leaf.isfinite().all()) for leaf in leaves(sample))


def equal(one: Any, other: Any) -> bool:
    """Tell whether two samples of one structure are the same to the bit."""
    return all(torch.equal(x, y) for x, y in zip(leaves(one), leaves(other), strict=True))


def mean(sample: Sample) -> float:
    """Give the mean square of a batch."""
    return float(mean_square(map_leaves(precise, sample)).mean())


def rows(sample: Sample) -> list[Tensor]:
    """Give each sample's numbers in one row, in float64 where the device has it."""
    if isinstance(sample, Tensor):
        return list(precise(sample).reshape(len(sample), -1))
    if isinstance(sample, list):
        return [precise(cast(Tensor, x)).flatten() for x in sample]
    columns = map(rows, sample.values() if isinstance(sample, dict) else sample)
    return [torch.cat(row) for row in zip(*columns, strict=True)]


def inner(one: Sample, other: Sample) -> Tensor:
    """Give the inner product of each sample, (B,)."""
    return torch.stack([x @ y for x, y in zip(rows(one), rows(other), strict=True)])


def difference(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float:
    """Give the norm of the difference over the norm, of all tensors together; None is zero."""
    apart = size = 0.0
    for x, y in zip(one, other, strict=True):
        x, y = (torch.zeros(()) if v is None else v.detach().float() for v in (x, y))
        apart += float((x - y).square().sum())
        size += float(x.square().sum())
    return math.sqrt(apart / max(size, TINY))


def rounded_to_bf16(t: Tensor) -> bool:
    """Tell whether many times are all bfloat16 numbers, on a grid that is coarser for the larger of them."""
    values = t.detach().cpu().double().unique()
    if len(values) < 16 or bool((values.bfloat16().double() != values).any()):
        return False
    coarsest = 2.0 ** (math.floor(math.log2(float(values.abs().max()))) - 7)
    return bool((values % coarsest != 0).any())
