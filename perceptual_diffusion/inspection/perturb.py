"""Changes of a clean sample that matter, to be compared with white noise of the same norm."""

from typing import Any, cast

import torch
from torch import Tensor

from perceptual_diffusion._shapes import compute_dtype, map_scaled, over
from perceptual_diffusion.types import Sample


def perturbations(
    clean: Sample, error: Sample, spatial: tuple[int, ...] | None, generator: torch.Generator
) -> dict[str, Sample]:
    """Give changes of the clean sample, by their kind.

    "error" is what the model gets wrong; where the sample has space, "blur" smooths it, "shift" moves it by one place, and
    "occlusion" replaces a block of half its extent by the mean.

    Args:
        clean: x_0, shape (B, *), or nested.
        error: x̂_0 − x_0, likewise.
        spatial: the dimensions that are space; None: as `space` finds them.
        generator: draws the place of the block.

    Returns:
        what to add to the clean sample, (B, *) or nested.

    Raises:
        ValueError: `spatial` holds no dimension of the sample.
    """
    changes: dict[str, Sample] = {"error": error}
    if not isinstance(clean, Tensor):
        return changes
    dims = space(clean) if spatial is None else spatial
    for d in dims:
        if not 0 < d < clean.ndim:
            raise ValueError(f"`spatial` is {spatial!r}, expected dimensions from 1 to {clean.ndim - 1} of `clean`.")
    if dims:
        blurred = moved = clean
        for d in dims:
            for _ in range(2):
                blurred = (_step(blurred, d, -1) + 2 * blurred + _step(blurred, d, 1)) / 4
            moved = _step(moved, d, 1)
        changes |= {"blur": blurred - clean, "shift": moved - clean, "occlusion": _occlusion(clean, dims, generator)}
    return changes


def space(clean: Tensor) -> tuple[int, ...]:
    """The dimensions of a sample that are space: the last two, the longer of two, or none."""
    if clean.ndim >= 4:
        return clean.ndim - 2, clean.ndim - 1
    if clean.ndim == 3:
        return (1,) if clean.shape[1] > clean.shape[2] else (2,)
    return ()


def _step(x: Tensor, dim: int, by: int) -> Tensor:
    """The neighbour along a dimension; at the end, the place itself."""
    index = (torch.arange(x.shape[dim], device=x.device) + by).clamp(0, x.shape[dim] - 1)
    return x.index_select(dim, index)


def _occlusion(clean: Tensor, dims: tuple[int, ...], generator: torch.Generator) -> Tensor:
    mask = torch.ones_like(clean, dtype=torch.bool)
    for d in dims:
        extent = max(1, clean.shape[d] // 2)
        start = torch.randint(0, clean.shape[d] - extent + 1, (len(clean),), generator=generator, device=clean.device)
        place = torch.arange(clean.shape[d], device=clean.device)[None] - start[:, None]
        shape = [len(clean), *(clean.shape[d] if k == d else 1 for k in range(1, clean.ndim))]
        mask &= ((place >= 0) & (place < extent)).reshape(shape)
    return (clean.mean(dims, keepdim=True) - clean) * mask


def dot(one: Sample, other: Sample) -> Tensor:
    """Inner products of two samples, (B,) in float32 or better; of nested ones over all their parts."""
    if isinstance(one, Tensor):
        dtype = compute_dtype(one)
        product = one.to(dtype) * cast(Tensor, other).to(dtype)
        return product.reshape(len(product), -1).sum(1)
    if isinstance(one, list):
        return torch.cat(
            [dot(a[None], b[None]) for a, b in zip(cast("list[Tensor]", one), cast("list[Tensor]", other), strict=True)]
        )
    keys: Any = one.keys() if isinstance(one, dict) else range(len(one))
    return torch.stack([dot(cast(Any, one)[key], cast(Any, other)[key]) for key in keys]).sum(0)


def of_norm(sample: Sample, other: Sample) -> Sample:
    """Scale each sample to the norm of another one, (B, *) or nested."""
    scale = (dot(other, other) / dot(sample, sample)).sqrt()
    return map_scaled(lambda k, x: over(k[0], x) * x, (scale,), sample)
