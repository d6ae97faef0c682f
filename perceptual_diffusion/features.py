"""Which part of a layer's output is the noisy sample's, found once by perturbation.

A layer gives a map, tokens, or a tuple of streams; the batch may lie in any dimension or be flattened with frames; of a
joint sequence only some tokens are the sample's, the rest are text, references, history or time. Three passes tell: the
sample as it is, all of it disturbed, and only its first item disturbed. What the second changes is the noisy sample's;
what the third changes is its first item's.

In the middle of a model attention has mixed everything with everything. So in these passes every token attends to itself
alone: self-attention gives back its values, cross-attention nothing. The residual stream then carries each token of the
sample to the layer by itself.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perceptual_diffusion._shapes import OWN_SEED, _like, batch_size, map_leaves
from perceptual_diffusion.types import FeatureSelect, Sample

Features = Literal["noisy", "all"]
FEATURES = ("noisy", "all")


class Captured(NamedTuple):
    """What a layer gave: its floating tensors, and what helps to read them."""

    streams: tuple[Tensor, ...]
    weights: tuple[str, int, int] | None = None
    """The last weights used on the way: ("conv" or "linear", dimensions of their output, channels of their output)."""
    entered: tuple[Tensor, ...] = ()
    """What entered the first block of the layer's list, before blocks could mix tokens."""


def capture(output: Any, args: Any = (), kwargs: Any = None) -> Captured:
    """Give the floating tensors at the top level of a layer's output."""
    if isinstance(output, Tensor):
        items: Any = (output,)
    else:
        items = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return Captured(tuple(item for item in items if isinstance(item, Tensor) and item.is_floating_point()))


@dataclass(frozen=True, kw_only=True)
class Part:
    """The noisy sample's part of one of the tensors of a layer.

    Attributes:
        stream: which of them.
        batch: the dimension in which the samples lie.
        alternating: whether the samples alternate there, (k B), rather than being blocks, (B k).
        channel: the dimension of the channels.
        tokens: the dimension of the tokens, where only some are the sample's.
        picked: the places of those; one for all samples, or one for each.
    """

    stream: int
    batch: int
    alternating: bool = False
    channel: int
    tokens: int | None = None
    picked: tuple[tuple[int, ...], ...] = ()
    _indices: dict[tuple[int, torch.device], Tensor] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def take(self, layer: Captured, samples: int) -> Tensor | list[Tensor]:
        """Take the part out of what a layer gave.

        Args:
            layer: what it gave.
            samples: the number of samples B.

        Returns:
            tokens (B, N, C), maps (B, C, *), or (B k, ...) with k frames; a list of B tensors (1, N, C) where samples differ
            in their number of tokens.
        """
        tensor = layer.streams[self.stream]
        if self.tokens == self.batch:  # rows of all samples, packed into one sequence
            rows = [
                self._pick(tensor, self.batch, i).movedim((self.batch, self.channel), (0, -1))
                for i in range(len(self.picked))
            ]
            if len(rows) == samples:
                rows = [row.reshape(1, -1, row.shape[-1]) for row in rows]
                return torch.cat(rows) if len({row.shape for row in rows}) == 1 else rows
            return rows[0].reshape(samples, -1, rows[0].shape[-1])
        if len(self.picked) == 1 and self.tokens is not None:
            tensor = self._pick(tensor, self.tokens, 0)
        place = 2 if tensor.ndim == 3 else min(1, tensor.ndim - 1)
        lists = [tensor]
        if len(self.picked) > 1 and self.tokens is not None:
            one = [tensor.narrow(self.batch, i, 1) for i in range(samples)]
            lists = [self._pick(row, self.tokens, i) for i, row in enumerate(one)]
        if tensor.ndim > 1:
            lists = [item.movedim((self.batch, self.channel), (0, place)) for item in lists]
        if self.alternating:
            lists = [item.unflatten(0, (-1, samples)).transpose(0, 1).flatten(0, 1) for item in lists]
        return lists if len(self.picked) > 1 else lists[0]

    def _pick(self, tensor: Tensor, dim: int, i: int) -> Tensor:
        """Select the i-th of `picked`, as a view where they are neighbours. The index is copied to a device once."""
        places = self.picked[i]
        if places[-1] - places[0] + 1 == len(places):
            return tensor.narrow(dim, places[0], len(places))
        index = self._indices.get((i, tensor.device))
        if index is None:
            with torch.inference_mode(False):
                index = torch.tensor(places, device=tensor.device)
            if type(index) is Tensor:  # a fake one is for its mode alone
                self._indices[i, tensor.device] = index
        return tensor.index_select(dim, index)


def locate(
    run: Callable[[Sample, FeatureSelect], list[Captured]],
    sample: Sample,
    layers: Sequence[str],
    features: Features = "noisy",
) -> list[tuple[Part, ...]]:
    """Find the noisy sample's part of each layer's output.

    Args:
        run: gives what the layers gave for a noisy sample, using a function in place of `capture`. It is called three
            times or more, without grad.
        sample: the noisy sample, (B, *) or nested.
        layers: their names, for the message.
        features: "noisy" for the noisy tokens and streams, "all" for whatever depends on the noisy sample.

    Returns:
        for each layer its parts, at least one.

    Raises:
        ValueError: a layer does not depend on the sample, or is not finite, or the samples cannot be told apart in it.
    """
    sample = map_leaves(lambda x: x.detach().nan_to_num(0, 0, 0), sample)
    everything = _disturb(sample)
    look: dict[str, Any] = {"samples": batch_size(sample), "listed": _has_list(sample), "noisy": features == "noisy"}
    found: list[tuple[Part, ...]] = [()] * len(layers)
    modes = [_Watch(unmixed=True), _Watch(unmixed=False), None]
    for mode in modes if features == "noisy" else modes[1:]:

        def passed(value: Sample, mode: _Watch | None = mode) -> list[Captured]:
            with torch.no_grad(), mode or nullcontext():
                return run(value, mode.capture if mode else capture)

        try:
            base = passed(sample)
            if not batch_size(sample):
                return [(Part(stream=0, batch=0, channel=_channel(of.streams[0], of.weights)),) for of in base]
            every = passed(everything)
            ones = _Ones(passed, everything, sample)
            for i, captured in enumerate(base):
                parts = (_part(i, k, base, every, ones, **look) for k in range(len(captured.streams)))
                found[i] = found[i] or tuple(part for part in parts if part is not None)
        except NotImplementedError:  # a kernel that cannot be watched, such as FlexAttention
            if mode is None:
                raise
            continue
        if all(found):
            return found
    blind = next(i for i, parts in enumerate(found) if not parts)
    if not all(bool(stream.isfinite().all()) for stream in base[blind].streams):
        raise ValueError(
            f"the teacher's layer {layers[blind]!r} gives NaN or infinity, so that the noisy sample's part of it cannot be found. Look "
            "for them in the weights that `wrap` was given; float16 holds numbers up to 65504."
        )
    raise ValueError(
        f"the teacher's layer {layers[blind]!r} gives no gradient to the sample: it does not depend on it. Pass `layers=` that lie on "
        "the sample's path, and the `cond` of training."
    )


def _has_list(sample: Any) -> bool:
    if isinstance(sample, Tensor | list):
        return isinstance(sample, list)
    return any(_has_list(part) for part in (sample.values() if isinstance(sample, dict) else sample))


class _Ones:
    """The passes in which one sample is disturbed; each is run when it is asked for."""

    def __init__(self, layers: Callable[[Sample], list[Captured]], everything: Sample, sample: Sample) -> None:
        self.layers, self.everything, self.sample = layers, everything, sample
        self.passes: dict[int, list[Captured]] = {}

    def __getitem__(self, index: int) -> list[Captured]:
        if index not in self.passes:
            self.passes[index] = self.layers(_only(index, self.everything, self.sample))
        return self.passes[index]


def _disturb(sample: Sample) -> Sample:
    generator = torch.Generator().manual_seed(OWN_SEED)

    def disturb(x: Tensor) -> Tensor:
        if not x.numel():
            return x
        noise = torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator))  # laid out in memory as x is
        return noise.mul_(x.detach().std(correction=0) + 0.1).add_(x.detach())

    return map_leaves(disturb, sample)


def _only(index: int, changed: Any, sample: Any) -> Any:
    """One sample changed, the others as they were, laid out in memory as they were: else kernels may round otherwise."""
    if isinstance(sample, Tensor):
        one = sample.detach().clone()
        one[index] = changed[index]
        return one
    if isinstance(sample, list):
        return [*sample[:index], changed[index], *sample[index + 1 :]]
    if isinstance(sample, dict):
        return {key: _only(index, changed[key], sample[key]) for key in sample}
    return _like(sample, [_only(index, c, s) for c, s in zip(changed, sample, strict=True)])


def _part(
    layer: int,
    stream: int,
    base: list[Captured],
    every: list[Captured],
    ones: _Ones,
    *,
    samples: int,
    listed: bool,
    noisy: bool,
) -> Part | None:
    """The part of one stream of a layer, from passes with nothing, with everything, and with one sample disturbed."""
    tensor = base[layer].streams[stream].detach()
    if tensor.ndim < 2:
        same = not tensor.ndim or torch.equal(tensor, every[layer].streams[stream])
        return None if same else Part(stream=stream, batch=0, channel=0)
    channel = _channel(tensor, base[layer].weights)
    moved = _moved(tensor, every[layer].streams[stream], channel)
    if not moved.any():
        return None
    if noisy:
        moved = moved & _moved_before(base[layer], every[layer], tensor, channel)

    def only(index: int) -> Tensor:
        return moved & _moved(tensor, ones[index][layer].streams[stream], channel)

    dims = [d for d in range(tensor.ndim) if d != channel]
    batch = _batch_dim(moved, only(0), dims, samples)
    if listed and batch is not None and tensor.shape[batch[0]] != samples:  # one after the other, of any lengths
        batch = None
    if batch is None:
        rows = _rows([only(i) for i in range(samples)], dims)
        if rows is None:
            raise ValueError(
                f"the {samples} samples cannot be told apart in a feature of shape {tuple(tensor.shape)}. Register an adapter "
                "with a `select` that puts the batch first."
            )
        return Part(stream=stream, batch=rows[0], channel=channel, tokens=rows[0], picked=rows[1])
    whole = Part(stream=stream, batch=batch[0], alternating=batch[1], channel=channel)
    partial = [d for d in dims if not _over(moved, whole.batch, d).all()]
    if partial == [whole.batch] and tensor.shape[whole.batch] != samples:
        return replace(whole, tokens=whole.batch, picked=(_places(_over(moved, whole.batch)),))
    tokens = [d for d in partial if d != whole.batch]
    if len(tokens) != 1:
        return whole
    table = _over(moved, whole.batch, tokens[0])
    answers = table[table.any(1)]  # a sample that is not finite or hardly answers says nothing
    if bool((answers == answers[0]).all()):
        return replace(whole, tokens=tokens[0], picked=(_places(answers[0]),))
    if len(table) != samples or len(answers) != samples:
        return whole
    return replace(whole, tokens=tokens[0], picked=tuple(_places(row) for row in table))


def _moved(base: Tensor, other: Tensor, channel: int) -> Tensor:
    """Where a tensor has changed by more than rounding, with its channels reduced to one.

    A channel's change is measured by the largest change of that channel, so that neither a channel of huge value nor one
    that changes hugely hides the others; channels that hardly change anywhere do not count.
    """
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    change = (other.detach().to(wide) - base.detach().to(wide)).abs().nan_to_num(0, 0, 0)
    rest = [d for d in range(change.ndim) if d != channel]
    largest = change.amax(rest, keepdim=True)
    counts = largest > 1e-6 * largest.max()
    share = change / largest.clamp_min(torch.finfo(change.dtype).tiny)
    return ((share > max(1e-5, torch.finfo(base.dtype).eps / 2)) & counts).any(channel, keepdim=True)


def _moved_before(base: Captured, every: Captured, tensor: Tensor, channel: int) -> Tensor:
    """Where the sample lay when it entered the layer's list of blocks, if that can be told; else everywhere."""
    pairs = [(a, b) for a, b in zip(base.entered, every.entered, strict=True) if a.shape == tensor.shape]
    moved = [mask for a, b in pairs if (mask := _moved(a, b, channel)).any()]
    return moved[0] if len(moved) == 1 else torch.ones_like(tensor.narrow(channel, 0, 1), dtype=torch.bool)


def _batch_dim(moved: Tensor, first: Tensor, dims: list[int], samples: int) -> tuple[int, bool] | None:
    """The dimension that holds the samples, and whether they alternate in it."""
    if samples == 1:
        single = [d for d in dims if moved.shape[d] == 1]
        return (single or dims)[0], False
    for d in dims:
        held = _places(_over(moved, d))
        own = _places(_over(first, d))
        if moved.shape[d] == samples and own == (0,):
            return d, False
        count, rest = divmod(len(held), samples)
        if rest == 0 and own == held[:count]:
            return d, False
        if rest == 0 and own == held[::samples]:
            return d, True
    if moved.shape[0] == samples and not first.any():  # a layer that hardly answers at all
        return 0, False
    return None


def _rows(ones: list[Tensor], dims: list[int]) -> tuple[int, tuple[tuple[int, ...], ...]] | None:
    """The dimension along which every sample has places of its own, and those."""
    for d in dims:
        masks = torch.stack([_over(one, d) for one in ones])
        if bool(masks.any(1).all()) and bool((masks.sum(0) <= 1).all()):
            return d, tuple(_places(mask) for mask in masks)
    return None


def _channel(tensor: Tensor, weights: tuple[str, int, int] | None) -> int:
    """The dimension of the channels: where the last weights on the way put them."""
    kind, rank, channels = weights or ("", 0, 0)
    if kind == "conv" and rank == tensor.ndim and tensor.shape[1] == channels:
        return 1
    if tensor.ndim >= 4 and tensor.shape[1] == channels:
        return 1
    if tensor.shape[-1] == channels or tensor.ndim <= 3:
        return 1 if tensor.ndim == 3 and channels == tensor.shape[1] != tensor.shape[2] else tensor.ndim - 1
    return 1


def _over(mask: Tensor, *kept: int) -> Tensor:
    """Whether anything holds along the dimensions kept, in their order."""
    dims = tuple(dict.fromkeys(kept))
    rest = [d for d in range(mask.ndim) if d not in dims]
    return mask.permute(*dims, *rest).reshape(*(mask.shape[d] for d in dims), -1).any(-1)


def _places(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())


class _Watch(TorchDispatchMode):
    """Notes which weights were used last; with `unmixed`, every token attends to itself alone."""

    def __init__(self, *, unmixed: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unmixed = unmixed
        self.weights: tuple[str, int, int] | None = None
        self.softmax: Tensor | None = None

    def capture(self, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
        return Captured(capture(output).streams, self.weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if "convolution" in name and isinstance(result, Tensor):
            self.weights = ("conv", result.ndim, result.shape[1])
        elif name in ("addmm", "mm", "linear"):
            self.weights = ("linear", result.ndim, result.shape[-1])
        elif self.unmixed and "scaled_dot_product" in name:
            query, value = args[0], args[2]
            output = result[0] if isinstance(result, tuple) else result
            if query.shape[-2] == value.shape[-2]:
                output.copy_(value.repeat_interleave(output.shape[1] // value.shape[1], 1))
            else:
                output.zero_()
        elif self.unmixed and name in ("_softmax", "_safe_softmax") and result.ndim > 2:
            self.softmax = result
            if result.shape[-1] == result.shape[-2]:
                result.copy_(torch.eye(result.shape[-1], dtype=result.dtype, device=result.device).expand_as(result))
        elif (
            name in ("_to_copy", "clone") and self.softmax is not None and args[0].data_ptr() == self.softmax.data_ptr()
        ):
            self.softmax = result
        elif name == "bmm" and self.softmax is not None and self.softmax.shape[-1] != self.softmax.shape[-2]:
            if self.softmax.data_ptr() in (args[0].data_ptr(), args[1].data_ptr()):  # cross-attention by hand
                result.zero_()
        return result
