"""The one place that knows about shapes: (B,) over (B, *), nested samples, and the dtype to compute in."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from perceptual_diffusion.types import Sample

OWN_SEED = 0x5E1F_9E2C
"""Seed of what the package draws by itself: no one else's, since data drawn with the same seed would be the noise."""


def leaves(sample: Sample) -> Iterator[Tensor]:
    """The tensors of a nested sample, depth first."""
    if isinstance(sample, Tensor):
        yield sample
    elif isinstance(sample, dict):
        for value in sample.values():
            yield from leaves(value)
    else:
        for value in sample:
            yield from leaves(value)


def map_leaves(function: Callable[..., Tensor], sample: Sample, *others: Sample) -> Sample:
    """Apply `function` to the tensors of samples of one structure; the result has that structure."""
    if isinstance(sample, Tensor):
        return function(sample, *others)
    if isinstance(sample, dict):
        rest = cast("tuple[dict[str, Sample], ...]", others)
        return {key: map_leaves(function, value, *(other[key] for other in rest)) for key, value in sample.items()}
    columns = zip(sample, *cast("tuple[list[Sample], ...]", others), strict=True)
    mapped = [map_leaves(function, *column) for column in columns]
    return cast(Sample, _like(sample, mapped))


def map_scaled(function: Callable[..., Tensor], scales: tuple[Tensor, ...], sample: Sample, *others: Sample) -> Sample:
    """Apply `function(scales, *tensors)`, scales of shape (B,) and tensors of shape (B, *), to samples of one structure.

    A list is a ragged batch: the tensor of each sample meets the scales of that sample.
    """
    if isinstance(sample, list):
        columns = zip(sample, *cast("tuple[list[Tensor], ...]", others), strict=True)
        rows = [[scale[i : i + 1] for scale in scales] for i in range(len(sample))]
        return [
            function(tuple(row), *(tensor[None] for tensor in column))[0]
            for row, column in zip(rows, columns, strict=True)
        ]
    if isinstance(sample, dict):
        rest = cast("tuple[dict[str, Sample], ...]", others)
        return {k: map_scaled(function, scales, v, *(other[k] for other in rest)) for k, v in sample.items()}
    if isinstance(sample, tuple):
        items = zip(sample, *cast("tuple[tuple[Sample, ...], ...]", others), strict=True)
        return cast(Sample, _like(sample, [map_scaled(function, scales, *item) for item in items]))
    return function(scales, sample, *others)


def _like(sequence: Any, items: list[Any]) -> Any:
    """Give the items the type of a list, tuple or named tuple."""
    return type(sequence)(*items) if hasattr(sequence, "_fields") else type(sequence)(items)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `function` to every tensor inside tuples, lists and dicts; leave everything else as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return _like(value, [map_tensors(function, item) for item in value])
    return value


def take(sample: Sample, part: slice) -> Sample:
    """Some of the samples of a batch, (B, *) or nested."""
    if isinstance(sample, Tensor | list):
        return sample[part]
    if isinstance(sample, dict):
        return {key: take(value, part) for key, value in sample.items()}
    return cast(Sample, _like(sample, [take(value, part) for value in sample]))


def join(parts: list[Sample]) -> Sample:
    """Put the parts of a batch together again."""
    one = parts[0]
    if len(parts) == 1:
        return one
    if isinstance(one, Tensor):
        return torch.cat(cast("list[Tensor]", parts))
    if isinstance(one, list):
        return [item for part in cast("list[list[Sample]]", parts) for item in part]
    if isinstance(one, dict):
        return {key: join([cast("dict[str, Sample]", part)[key] for part in parts]) for key in one}
    return cast(Sample, _like(one, [join(list(column)) for column in zip(*parts, strict=True)]))


WAYS = ("first", "multiple", "anywhere")
"""Where the samples may lie in a condition: in the first dimension; in blocks of it; in another one."""


def take_cond(cond: Any, batch: int, part: slice, way: str = "first") -> Any:
    """Some of the samples of conditions: of tensors in which they lie, and of lists of B things that are no such tensors."""
    if isinstance(cond, Tensor):
        if not cond.ndim or len(cond) == batch:
            return cond[part] if cond.ndim else cond
        if way == "multiple" and len(cond) and len(cond) % batch == 0:
            each = len(cond) // batch
            return cond[part.start * each : part.stop * each]
        if way == "anywhere" and batch in cond.shape:
            return cond.narrow(cond.shape.index(batch), part.start, part.stop - part.start)
        return cond
    if isinstance(cond, Mapping):
        return {key: take_cond(value, batch, part, way) for key, value in cond.items()}
    if isinstance(cond, list | tuple):
        batched = all(isinstance(item, Tensor) and item.ndim and len(item) == batch for item in cond)
        if isinstance(cond, list) and len(cond) == batch and not batched:
            return cond[part]
        return _like(cond, [take_cond(item, batch, part, way) for item in cond])
    return cond


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors inside mappings, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def describe(sample: Any, depth: int = 6) -> str:
    """The structure of a sample in words for an error: `(2, 4, 8, 8)`, or `{'video': (2, 4), 'audio': (2, 3)}`."""
    if isinstance(sample, Tensor):
        return str(tuple(sample.shape))
    if isinstance(sample, dict | list | tuple) and not depth:  # it may hold itself
        return "…"
    if isinstance(sample, dict):
        return "{" + ", ".join(f"{key!r}: {describe(value, depth - 1)}" for key, value in sample.items()) + "}"
    if isinstance(sample, list | tuple):
        inside = ", ".join(describe(value, depth - 1) for value in sample)
        return f"[{inside}]" if isinstance(sample, list) else f"tuple({inside})"
    return type(sample).__name__


def check_sample(name: str, sample: Any, like: Sample | None = None) -> None:
    """Raise unless `sample` is floating, batched, and of the structure, shape and device of `like`."""
    if isinstance(sample, dict | list | tuple):
        if not sample:
            raise ValueError(
                f"`{name}` is empty, expected a tensor of shape (B, *), a tuple or dict of such tensors, or a list of B tensors."
            )
        if isinstance(sample, list) and any(isinstance(item, dict | list | tuple) for item in sample):
            raise TypeError(
                f"`{name}` has shape {describe(sample)}, expected a list of B tensors, one per sample. Use a tuple or a dict "
                "for several tensors that are denoised together."
            )
        if like is not None and not _same_structure(sample, like):
            raise ValueError(f"`{name}` has shape {describe(sample)}, expected {describe(like)}, that of `clean`.")
        keys: list[Any] = list(sample) if isinstance(sample, dict) else list(range(len(sample)))
        for key in keys:
            if isinstance(sample, list) and isinstance(sample[key], Tensor) and sample[key].ndim == 0:
                raise ValueError(
                    f"`{name}[{key}]` has shape (), expected a sample of at least one dimension, without the batch."
                )
            check_sample(f"{name}[{key!r}]", sample[key], None if like is None else cast(Any, like)[key])
        devices = {leaf.device for leaf in leaves(cast(Sample, sample))}
        if len(devices) > 1:
            raise ValueError(
                f"`{name}` lies on several devices, {' and '.join(sorted(map(str, devices)))}, expected one. Move it there."
            )
        if isinstance(sample, list):
            return
        if len({batch_size(value) for value in (sample.values() if isinstance(sample, dict) else sample)}) > 1:
            raise ValueError(
                f"`{name}` has shape {describe(sample)}: its parts differ in the number of samples. Give one batch size B."
            )
        return
    if not isinstance(sample, Tensor):
        raise TypeError(
            f"`{name}` is {_a(type(sample).__name__)}, expected a tensor of shape (B, *). Pass a torch.Tensor."
        )
    if not sample.is_floating_point() or sample.dtype.itemsize < 2:  # float8 stores numbers, and has no arithmetic
        raise TypeError(f"`{name}` has dtype {sample.dtype}, expected a floating dtype. Pass `{name}.float()`.")
    if sample.layout != torch.strided or sample.is_nested:
        raise TypeError(
            f"`{name}` has the layout {sample.layout}, expected a dense tensor. Pass `{name}.to_dense()`, or a list of B tensors."
        )
    if sample.ndim == 0:
        raise ValueError(f"`{name}` has shape (), expected (B, *). Add the batch dimension: `{name}[None]`.")
    if like is None:
        if sample.device.type == "meta":
            raise ValueError(f"`{name}` is on the meta device, where it has no values. Pass it with values.")
        return
    if not isinstance(like, Tensor) or sample.shape != like.shape:
        raise ValueError(
            f"`{name}` has shape {describe(sample)}, expected {describe(like)}, that of `clean`.{_doubled(sample, like) if name == 'model_pred' else ''}"
        )
    if sample.device != like.device:
        raise ValueError(
            f"`{name}` is on {sample.device}, expected {like.device}, the device of `clean`. Move it there."
        )


def _doubled(sample: Tensor, like: Any) -> str:
    """What to do about a prediction that is twice as large in one dimension, as one with a learned variance is."""
    if not isinstance(like, Tensor) or sample.ndim != like.ndim:
        return ""
    larger = [d for d in range(1, like.ndim) if sample.shape[d] != like.shape[d]]
    if len(larger) != 1 or len(sample) != len(like) or sample.shape[larger[0]] != 2 * like.shape[larger[0]]:
        return ""
    return f" If half of it is a variance, pass `output=lambda output, x_t: output.narrow({larger[0]}, 0, {like.shape[larger[0]]})`."


def _same_structure(sample: Any, like: Any) -> bool:
    if isinstance(sample, dict):
        return isinstance(like, dict) and sample.keys() == like.keys()
    return (
        isinstance(like, list) == isinstance(sample, list)
        and isinstance(like, list | tuple)
        and len(sample) == len(like)
    )


def _a(word: str) -> str:
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def first(sample: Sample) -> Tensor:
    """A tensor (B, *) that stands for the batch size, the device and the shape of the first part of a sample."""
    if isinstance(sample, list):
        tensor = cast(Tensor, sample[0])
        return tensor[None].expand(len(sample), *tensor.shape)
    if isinstance(sample, Tensor):
        return sample
    return first(next(iter(sample.values() if isinstance(sample, dict) else sample)))


def batch_size(sample: Sample) -> int:
    """How many samples there are: the length of a list, else of dim 0."""
    return len(first(sample))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where a tensor has it: schedules and differences are never rounded below."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest dtype of the tensors given: what mixing them is rounded to."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def over(scale: Tensor, sample: Tensor) -> Tensor:
    """Shape a scale (B,) so that it multiplies a sample (B, *) sample by sample, in the sample's dtype."""
    return scale.to(sample.dtype).reshape(-1, *[1] * (sample.ndim - 1))


def mean_per_sample(value: Tensor) -> Tensor:
    """Mean over all but the first dimension: (B, *) to (B,); 0 where there is nothing to average."""
    if value.ndim == 1:
        return value
    return value.flatten(1).sum(1) / max(1, math.prod(value.shape[1:]))


def mean_square(sample: Sample) -> Tensor:
    """Mean square of each sample, (B,); of several parts, the mean over the parts."""
    if isinstance(sample, Tensor):
        return mean_per_sample(sample.square())
    if isinstance(sample, list):
        return torch.cat([mean_per_sample(cast(Tensor, tensor)[None].square()) for tensor in sample])
    return torch.stack([mean_square(part) for part in (sample.values() if isinstance(sample, dict) else sample)]).mean(
        0
    )
