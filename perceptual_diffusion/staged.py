"""The teacher's gradient, taken inside the forward of the loss, a few samples at a time.

The loss of a sample is a function of its own x̂_t' alone. So its gradient G = dL/dx̂_t' can be taken at once and the teacher's
activations be freed, before the student's backward begins; that is handed G, times whatever the loss was weighted by. What the teacher keeps for its backward then never lies beside that of other samples. Numbers and
arithmetic are those of plain autograd.

The gradient of the distance is taken in float32, and scaled by a power of two for the backward through the teacher, so that
it neither under- nor overflows in float16.
"""

import logging
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import CheckpointError

from perceptual_diffusion import taps
from perceptual_diffusion._memory import SavedBytes
from perceptual_diffusion._restore import Before
from perceptual_diffusion._shapes import (
    WAYS,
    batch_size,
    compute_dtype,
    first,
    join,
    leaves,
    map_leaves,
    map_scaled,
    over,
    take,
    take_cond,
    tensors_in,
)
from perceptual_diffusion.comparison import check_features, compare
from perceptual_diffusion.distances import NAMED
from perceptual_diffusion.types import Cond, Distance, Feature, Sample, Teacher

logger = logging.getLogger("perceptual_diffusion")

MicroBatch = int | Literal["auto"] | None

SHARE = 32
"""With "auto", the teacher's activations may take one part in so many of the device's memory."""
APART = {torch.float16: 0.005, torch.bfloat16: 0.03}
"""How far, relatively, a split batch may change a feature by rounding; in other dtypes 1e-3."""
FAILURES = (ValueError, TypeError, RuntimeError, IndexError, KeyError)
"""What a pass raises whose conditions were split wrongly."""


class _Plain(Exception):
    """Says why the gradient has to be left to plain autograd."""


class MicroBatches:
    """How many samples go through the teacher at a time.

    Args:
        size: that number; "auto" for as many as keep the teacher's activations small beside the device's memory.

    Raises:
        ValueError: it is neither a positive number nor "auto".
    """

    def __init__(self, size: int | Literal["auto"]) -> None:
        if size != "auto" and not (isinstance(size, int) and not isinstance(size, bool) and size > 0):
            raise ValueError(
                f"`micro_batch` is {size!r}, expected a number of samples, 'auto', or None for plain autograd."
            )
        self.size = size
        self.plain = False
        """Whether something was found that only plain autograd does right."""
        self.suits = False
        """Whether the distance has been found to compare each sample by itself."""
        self._saved: float | None = None
        self._ways: dict[str, str | None] = {}

    def give_up(self, why: str) -> None:
        """Leave the gradient to plain autograd from now on.

        Raises:
            ValueError: a number of samples was asked for.
        """
        if self.size != "auto":
            raise ValueError(f"`micro_batch` is {self.size}, but {why}. Pass `micro_batch=None`.")
        logger.info("the teacher's gradient is left to plain autograd: %s", why)
        self.plain = True

    def parts(self, teacher: Teacher, x: Sample, t: Tensor, cond: Cond) -> list[tuple[slice, Cond]]:
        """Say how a batch is split, (B, *) or nested, with times (B,).

        Returns:
            the parts, each with its conditions.

        Raises:
            ValueError: a number of samples was asked for, and the conditions cannot be split.
        """
        batch = batch_size(x)
        size = self._fitting(teacher, x, t, cond) if self.size == "auto" else self.size
        parts = self.known(batch, size, cond)
        if parts is None:
            self._ways[repr(_pattern(cond, batch))] = self._way(teacher, x, t, cond, _slices(batch, size))
            parts = self.known(batch, size, cond)
        return parts or []

    def known(self, batch: int, size: int, cond: Cond) -> list[tuple[slice, Cond]] | None:
        """Give the parts of at most `size` samples, each with its conditions; None before `parts` has found how to split those."""
        key = repr(_pattern(cond, batch)) if size < batch else ""
        if key and key not in self._ways:
            return None
        way = self._ways.get(key)
        if way is None:
            return [(slice(0, batch), cond)]
        return [(part, take_cond(cond, batch, part, way)) for part in _slices(batch, size)]

    def _fitting(self, teacher: Teacher, x: Sample, t: Tensor, cond: Cond) -> int:
        """How many samples' activations take up their share of the device's memory."""
        memory, batch = _memory(first(x).device), batch_size(x)
        if batch < 2 or not memory or not _numbers(x) or not _may_split(teacher):
            return batch
        if self._saved is None:
            self._saved = self._saved_by_one(teacher, x, t, cond) / _numbers(take(x, slice(0, 1)))
        return max(1, int(memory // SHARE / (self._saved * _numbers(x) / batch))) if self._saved else batch

    def _saved_by_one(self, teacher: Teacher, x: Sample, t: Tensor, cond: Cond) -> int:
        """Bytes that the teacher keeps for the backward of the first sample; 0 where that cannot be run."""
        batch, one, why, module = batch_size(x), slice(0, 1), "", getattr(teacher, "module", None)
        for way in WAYS:
            try:
                saved = SavedBytes([module] if isinstance(module, nn.Module) else [])
                with saved.hooks, torch.random.fork_rng(devices=_cuda(x)), torch.enable_grad():
                    features = teacher(_held(take(x, one)), t[one], take_cond(cond, batch, one, way))
                    return saved.now if features else 0
            except torch.OutOfMemoryError:
                raise
            except FAILURES as error:
                why = why or str(error)
        logger.info("the teacher's batch is not split: a pass on one sample fails (%s)", why)
        return 0

    def _way(self, teacher: Teacher, x: Sample, t: Tensor, cond: Cond, slices: list[slice]) -> str | None:
        """How the conditions have to be split so that the features of the parts are those of the batch."""
        why = ""
        with torch.no_grad(), _Uncached(), torch.random.fork_rng(devices=_cuda(x)):
            whole = teacher(x, t, cond)
            for way in WAYS:
                differs = _apart(whole, teacher, x, t, cond, slices, way)
                if _gathers(teacher) and taps.largest([bool(differs)], first(x).device)[0]:
                    differs = differs or "its features change on another process"
                if not differs:
                    return way
                why = why or differs
        if self.size != "auto" and not any(self._ways.values()):
            raise ValueError(
                f"`micro_batch` is {self.size}, but the teacher's batch cannot be split: {why}. The samples lie in no "
                "dimension of their own in a condition, or depend on each other. Pass `micro_batch=None`."
            )
        log = logger.info if self.size == "auto" else logger.warning
        log("the teacher's batch is not split where conditions have these shapes: %s", why)
        return None


def _apart(
    whole: list[Feature], teacher: Teacher, x: Sample, t: Tensor, cond: Cond, slices: list[slice], way: str
) -> str:
    """Say what differs between the features of the parts and those of the batch; nothing if they are the same."""
    batch = batch_size(x)
    try:
        split = [teacher(take(x, part), t[part], take_cond(cond, batch, part, way)) for part in slices]
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return f"a pass on a part of it fails ({error})"
    for index, of_layer in enumerate(zip(*split, strict=True)):
        one, other = _rows(whole[index]), [row for part in of_layer for row in _rows(part)]
        if len(one) != len(other) or any(a.shape != b.shape for a, b in zip(one, other, strict=True)):
            return "its features have other shapes on a part of it"
        apart = sum(_square(a - b) for a, b in zip(one, other, strict=True))
        size = sum(map(_square, one))
        if not apart <= _tolerance(whole[index], x) ** 2 * size:
            return f"its features change by {(apart / max(size, 1e-30)) ** 0.5:.1%} on a part of it"
    return ""


def _pattern(cond: Any, batch: int) -> Any:
    """Where the samples may lie in conditions: what decides how they are split, without any other size."""
    if isinstance(cond, Tensor):
        return "".join("B" if n == batch else "k" if n and n % batch == 0 else "." for n in cond.shape)
    if isinstance(cond, Mapping):
        return {key: _pattern(value, batch) for key, value in cond.items()}
    if isinstance(cond, list):
        return len(cond) == batch, sorted({repr(_pattern(item, batch)) for item in cond})
    if isinstance(cond, tuple):
        return [_pattern(item, batch) for item in cond]
    return type(cond).__name__


def _slices(batch: int, size: int) -> list[slice]:
    """Parts of a batch of at most so many samples, as even as can be."""
    size = -(-batch // -(-batch // size))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _may_split(teacher: Any) -> bool:
    """Whether passes are the teacher's own affair, and not gathered over processes or loaded from elsewhere."""
    module = getattr(teacher, "module", None)
    return not isinstance(module, nn.Module) or taps.may_stop(module, getattr(teacher, "layers", ()))


def _gathers(teacher: Any) -> bool:
    """Whether the teacher's weights are gathered from several processes, which then have to make the same passes."""
    module = getattr(teacher, "module", None)
    return taps.several_processes() and isinstance(module, nn.Module) and taps.gathered(module)


def _all_know(teacher: Any, x: Sample, cond: Cond, micro_batches: MicroBatches | None) -> bool:
    """Whether processes that gather weights know how to split and to read what they are given: the one wait of such a step.

    Raises:
        ValueError: on all of them, where a number of samples would make them split in different ways.
    """
    if not _gathers(teacher):
        return False
    batch, size = batch_size(x), None
    parts: list[tuple[slice, Cond]] | None = [(slice(0, batch), cond)]
    if micro_batches is not None and micro_batches.size != "auto":
        size = micro_batches.size
        parts = micro_batches.known(batch, size, cond)
    knows = getattr(teacher, "knows", None)  # none of a teacher of one's own
    lacks = parts is None or (knows is not None and not all(knows(take(x, part), told) for part, told in parts))
    where = zlib.crc32(repr(_pattern(cond, batch)).encode()) if size and size < batch else 0
    any_lacks, most, least, one, other = taps.largest([lacks, batch, -batch, where, -where], first(x).device)
    if size and most != -least:
        raise ValueError(
            f"`micro_batch` is {size}, but the processes have from {-least} to {most} samples, and the teacher's weights are "
            "gathered from all of them in every pass. Pass `micro_batch='auto'`, or give all the same number (`drop_last=True`)."
        )
    if size and one != -other:
        raise ValueError(
            f"`micro_batch` is {size}, but the processes have conditions of other shapes, in which the {batch} samples may lie "
            "elsewhere, and the teacher's weights are gathered from all of them in every pass. Pass `micro_batch='auto'`, or pad the "
            "conditions to one length."
        )
    return knows is not None and not any_lacks


def perceptual(
    teacher: Teacher,
    samples: list[Sample],
    x_tt: Sample,
    t: Tensor,
    cond: Cond,
    *,
    distance: Distance,
    micro_batches: MicroBatches | None,
) -> Tensor:
    """Give the distance between the teacher's features of the predicted and of the true pair.

    Args:
        teacher: the teacher.
        samples: the predicted pair at t', (B, *) or nested, in float32 or better, with its graph; two of the split formulation.
        x_tt: the true pair at t', in the dtype that the teacher is given.
        t: t', shape (B,).
        cond: the conditions.
        distance: compares two features.
        micro_batches: how the batch is split; None for plain autograd through the teacher.

    Returns:
        one value per sample, shape (B,).

    Raises:
        TypeError: the teacher gives no features.
        ValueError: they are wrong, or the gradient is lost.
    """
    before, all_know = Before(first(x_tt).device), False
    batch = batch_size(x_tt)
    grad = torch.is_grad_enabled() and any(leaf.requires_grad for sample in samples for leaf in leaves(sample))
    micro_batches = micro_batches if grad else None
    try:
        if all_know := _all_know(teacher, x_tt, cond, micro_batches):
            cast(Any, teacher).all_know = True
        if micro_batches is not None and batch and not micro_batches.plain:
            try:
                return _staged(teacher, samples, x_tt, t, cond, distance, micro_batches)
            except _Plain as error:
                micro_batches.give_up(str(error))
        features, of_true = _passes(teacher, samples, x_tt, t, cond, grad=grad)
        return torch.stack([compare(f, of_true, batch, distance) for f in features]).sum(0)
    except BaseException:
        before.restore()
        raise
    finally:
        if all_know:
            cast(Any, teacher).all_know = False


def _staged(
    teacher: Teacher,
    samples: list[Sample],
    x_tt: Sample,
    t: Tensor,
    cond: Cond,
    distance: Distance,
    micro_batches: MicroBatches,
) -> Tensor:
    if not hasattr(teacher, "parameters_held") and any(x.requires_grad for x in tensors_in(cond)):
        raise _Plain("`cond` has a gradient, and a teacher of your own")  # those of the package detach it
    values, gradients = [], []
    for part, told in micro_batches.parts(teacher, x_tt, t, cond):
        held = [_held(take(sample, part)) for sample in samples]
        value, gradient = _value_and_gradient(
            teacher, held, take(x_tt, part), t[part], told, distance=distance, micro_batches=micro_batches
        )
        values.append(value)
        gradients.append(gradient)
    joined = [join(list(column)) for column in zip(*gradients, strict=True)]
    return cast(Tensor, _Known.apply(torch.cat(values), joined, *_all_leaves(samples)))


def _passes(
    teacher: Teacher, samples: list[Sample], x_tt: Sample, t: Tensor, cond: Cond, *, grad: bool
) -> tuple[list[list[Feature]], list[Feature]]:
    """The features of the predicted samples, with their graph, and those of the true ones."""
    # first, so that its temporaries do not lie beside what the other pass keeps
    with torch.no_grad(), _Uncached():
        true = teacher(x_tt, t, cond)
    # a copy, since hooks on a module's inputs (FlopCounterMode's) do not take leaves
    given = [map_leaves(lambda s, x: s.to(x.dtype, copy=True), sample, x_tt) for sample in samples]
    features = [teacher(sample, t, cond) for sample in given]
    for found in features:
        check_features(found, true, batch_size(x_tt))
        if grad and not all(leaf.requires_grad for leaf in _all_leaves(found)):
            raise ValueError(
                "`teacher` gives no gradient to the sample, so the loss would train nothing. Run it without no_grad and "
                "without detaching; only the pass on the true pair is run under no_grad, by the objective."
            )
    return features, true


def _value_and_gradient(
    teacher: Teacher,
    samples: list[Sample],
    x_tt: Sample,
    t: Tensor,
    cond: Cond,
    *,
    distance: Distance,
    micro_batches: MicroBatches,
) -> tuple[Tensor, list[Sample]]:
    """The distance of each sample, and its gradient with respect to the predicted samples.

    Raises:
        _Plain: the distance has weights or mixes samples (looked at until it `suits`), or the teacher cannot be differentiated so.
    """
    features, true = _passes(teacher, samples, x_tt, t, cond, grad=True)
    value, scaled, scale = _of_features(features, true, batch_size(x_tt), distance, micro_batches)
    outputs: list[Any] = [leaf for given in features for leaf in _all_leaves(given)]
    if "ownership_token" in GradientEdge._fields:  # without it an edge does not keep a node of Python's (torch 2.6)
        outputs = [get_gradient_edge(leaf) for leaf in outputs]
    del features, true  # nothing but what the backward needs lies beside it
    with _no_autocast(x_tt):
        try:
            found = torch.autograd.grad(outputs, _all_leaves(samples), scaled, materialize_grads=True)
        except CheckpointError as error:
            raise ValueError(
                "the teacher's backward recomputes something else than its forward ran, as where adapters are switched off "
                "for its forward alone. Use `teacher='lora'` or 'copy', or no checkpointing."
            ) from error
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise _Plain("the teacher checkpoints with `use_reentrant=True`") from error
    gradients = iter(found)
    return value, [map_leaves(lambda _: next(gradients) / scale, sample) for sample in samples]


def _of_features(
    features: list[list[Feature]], true: list[Feature], batch: int, distance: Distance, micro_batches: MicroBatches
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The distance of each sample, its gradient with respect to the predicted features, and by what that is scaled."""
    cut = [[map_leaves(_widened, cast(Sample, feature)) for feature in given] for given in features]
    values = [compare(cast("list[Feature]", given), true, batch, distance) for given in cut]
    value = torch.stack(values).sum(0)
    if not value.requires_grad:
        raise ValueError(
            "`distance` gives no gradient to the predicted features, so the loss would train nothing. Compute it from its first "
            "argument without no_grad and without detaching."
        )
    inputs = [leaf for given in cut for leaf in _all_leaves(given)]
    if not micro_batches.suits:
        micro_batches.suits = _suits(distance, value, inputs, true)
    with _no_autocast(value):
        gradients = torch.autograd.grad(value.sum(), inputs, materialize_grads=True)
    scale = _scale(gradients)
    outputs = [leaf for given in features for leaf in _all_leaves(given)]
    return value.detach(), [(g * scale).to(f.dtype) for g, f in zip(gradients, outputs, strict=True)], scale


def _no_autocast(x: Sample) -> torch.autocast:
    """A backward does not belong under autocast."""
    return torch.autocast(first(x).device.type, enabled=False)


def _suits(distance: Distance, value: Tensor, inputs: list[Tensor], true: list[Feature]) -> bool:
    """Refuse a distance of whose gradient part would be lost, or whose values are not each one sample's.

    Returns:
        whether that is known: not so where no sample is finite.
    """
    if distance in NAMED.values():
        return True
    own, todo, seen = {id(x) for x in inputs}, [value.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in own:
            raise _Plain("`distance` has weights that take a gradient")
        todo.extend(following for following, _ in node.next_functions)
    pairs = zip(inputs, _all_leaves(true), strict=False)  # of the split formulation, the first half
    rows = ((f.detach()[i : i + 1], g[i : i + 1].to(f.dtype)) for f, g in pairs for i in range(len(f)))
    finite = ((f, g) for f, g in rows if bool(f.isfinite().all() & g.isfinite().all()))
    one, other = next(finite, (None, None))
    if one is None or other is None:
        return False
    with torch.no_grad():
        alone = distance(one, other)
        beside = distance(torch.cat([one, 1.5 * one + 0.1]), torch.cat([other, other]))[:1]
        if not torch.allclose(beside, alone, rtol=1e-3, atol=1e-12, equal_nan=True):
            raise _Plain("`distance` compares samples with each other")
        return bool(alone.isfinite().all())


def _held(sample: Sample) -> Sample:
    """A sample cut off from its graph, that takes a gradient of its own."""
    return map_leaves(lambda x: x.detach().requires_grad_(), sample)


def _all_leaves(parts: Iterable[Any]) -> list[Tensor]:
    return [leaf for part in parts for leaf in leaves(part)]


def _widened(feature: Tensor) -> Tensor:
    return feature.detach().to(compute_dtype(feature)).requires_grad_()


def _scale(gradients: tuple[Tensor, ...]) -> Tensor:
    """The power of two that brings the largest of the gradients to about 1."""
    sizes = [g.abs().amax() for g in gradients if g.numel()]
    if not sizes:
        return torch.ones((), dtype=gradients[0].dtype, device=gradients[0].device)
    largest = torch.stack(sizes).amax()
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    scale = torch.ldexp(torch.ones_like(largest), -exponent)
    return torch.where(largest.isfinite() & (largest > 0), scale, torch.ones_like(scale))


class _Known(torch.autograd.Function):
    """Values whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, gradients: list[Sample], *samples: Tensor) -> Tensor:
        ctx.save_for_backward(*_all_leaves(gradients))
        ctx.like = [map_leaves(lambda g: g.new_empty(0), gradient) for gradient in gradients]
        return values.clone()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise ValueError(
                "the loss was differentiated twice, but its gradient through the teacher was taken once and for all. "
                "Wrap with `micro_batch=None`."
            )
        saved = iter(ctx.saved_tensors)
        gradients = [map_leaves(lambda _: next(saved), like) for like in ctx.like]
        weighted = [map_scaled(lambda k, g: over(k[0], g) * g, (given,), gradient) for gradient in gradients]
        return None, None, *_all_leaves(weighted)


class _Uncached(AbstractContextManager["_Uncached"]):
    """Keeps autocast from caching casts without a graph, which before torch 2.11 a pass with gradient then takes."""

    def __enter__(self) -> "_Uncached":
        self.before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        return self

    def __exit__(self, *args: Any) -> None:
        torch.set_autocast_cache_enabled(self.before)


def _rows(feature: Feature) -> list[Tensor]:
    return list(feature) if isinstance(feature, Tensor) else [part[0] for part in feature]


def _square(value: Tensor) -> float:
    """The sum of squares, without what is not finite."""
    return float(value.float().nan_to_num(0, 0, 0).square().sum())


def _tolerance(feature: Feature, x: Sample) -> float:
    device = first(x).device.type
    dtypes = {leaf.dtype for leaf in (*leaves(cast(Sample, feature)), *leaves(x))}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(APART.get(dtype, 1e-3) for dtype in dtypes)


def _numbers(x: Sample) -> int:
    return sum(leaf.numel() for leaf in leaves(x))


def _cuda(x: Sample) -> list[torch.device]:
    device = first(x).device
    return [device] if device.type == "cuda" else []


def _memory(device: torch.device) -> int:
    """The memory of a device in bytes; 0 where that is not known."""
    if device.type == "cpu":
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # not on Windows
            return 0
    try:
        return int(torch.get_device_module(device).get_device_properties(device).total_memory)
    except (AttributeError, RuntimeError, AssertionError):
        return 0
