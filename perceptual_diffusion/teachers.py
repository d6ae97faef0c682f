"""Where f* comes from: a frozen copy of the model that holds only what runs up to the last tapped layer, or a module."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from perceptual_diffusion import taps
from perceptual_diffusion._checkpoints import unfreeze
from perceptual_diffusion._shapes import batch_size, first, leaves, map_tensors
from perceptual_diffusion.copies import Used, drop, frozen_copy
from perceptual_diffusion.features import FEATURES, Captured, Features, Part, capture, locate
from perceptual_diffusion.types import Cond, Feature, FeatureSelect, ModelCall, Sample

PLACES = ("mask", "ind", "len", "tag", "segment")
"""Words in the names of conditions that say where the tokens of a sequence are."""
LOOKS = 4
"""After so many masks that leave the noisy sample's tokens where they are, masks are looked at no more."""
REMEMBERED = 64
"""Shapes of the inputs whose layout is remembered, and masks for each."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ModuleTeacher:
    """Features of a module at named layers, with a gradient to its input and none to its weights.

    The module is put into `eval()` and frozen, and stays so.

    Args:
        module: the perceptual network.
        layers: dotted names of the layers to compare.
        call: runs the module at a time in the schedule's unit.
        select: takes one tensor, batch first, out of a layer's output; by default the noisy sample's part is found.
        features: "noisy" for the noisy sample's tokens and streams, "all" for whatever depends on the noisy sample.
        prepare: mends in place what `eval()` breaks.
        stop: leave each pass after the last layer.

    Raises:
        ValueError: a layer does not exist, or `features` is unknown.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        layers: Sequence[str],
        call: ModelCall,
        select: FeatureSelect | None = None,
        features: Features = "noisy",
        prepare: Callable[[nn.Module], None] | None = None,
        stop: bool = True,
    ) -> None:
        for name in layers:
            taps.layer(module, name)
        if features not in FEATURES:
            raise ValueError(f"unknown features {features!r}, expected 'noisy' or 'all'.")
        self.module = module.eval().requires_grad_(False)
        self.layers, self.call, self.select, self.stop = tuple(layers), call, select, stop
        self.features = features
        if prepare is not None:
            prepare(self.module)
        self._parts: dict[str, dict[Any, list[tuple[Part, ...]]]] = {}
        self._unfrozen = False

    def __call__(self, x_t: Sample, t: Tensor, cond: Cond, /) -> list[Feature]:
        """Give the features of the noisy sample.

        Args:
            x_t: the noisy sample, (B, *) or nested.
            t: times in the schedule's unit, shape (B,).
            cond: the model's keyword arguments; taken without their gradient.

        Returns:
            features in the order of `layers`, more than one for a layer in which several streams are the noisy sample's:
            tokens (B, N, C), maps (B, C, *), or (B k, ...) with k frames; a list of B tensors (1, N, C) where samples differ
            in their number of tokens.

        Raises:
            ValueError: a layer did not run, or the gradient to the sample was lost.
        """
        held = next(self.module.parameters(), None)
        for leaf in leaves(x_t):
            if held is not None and leaf.device != held.device:
                raise ValueError(
                    f"the teacher is on {held.device}, expected {leaf.device}, the device of the sample. "
                    f"Call `objective.to({str(leaf.device)!r})`."
                )
        x_t, cond = self._cast(x_t), self._cast(map_tensors(Tensor.detach, dict(cond)))

        def run(sample: Sample, select: FeatureSelect) -> list[Any]:
            with _no_fast_path():
                return taps.run(
                    self.module,
                    self.layers,
                    lambda: self.call(self.module, sample, t, cond),
                    select=select,
                    stop=self.stop,
                )

        grad = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves(x_t))
        if grad and not self._unfrozen:
            unfreeze(self.module, lambda: self._watched(run, x_t, capture))
            self._unfrozen = True
        if self.select is not None:
            features = [[feature] for feature in run(x_t, self.select)]
        else:
            parts = self._located(partial(self._watched, run), x_t, cond)
            given = zip(run(x_t, capture), parts, strict=True)
            features = [[part.take(layer, batch_size(x_t)) for part in found] for layer, found in given]
        if grad:
            for name, of_layer in zip(self.layers, features, strict=True):
                if not all(leaf.requires_grad for feature in of_layer for leaf in leaves(feature)):
                    raise ValueError(
                        f"the teacher's layer {name!r} gives no gradient to the sample: it does not depend on it, or the model "
                        "runs under no_grad or reentrant checkpointing. Tap another layer, or use non-reentrant checkpointing."
                    )
        return [feature for of_layer in features for feature in of_layer]

    def _watched(
        self, run: Callable[[Sample, FeatureSelect], list[Captured]], sample: Sample, select: FeatureSelect
    ) -> list[Captured]:
        """What the layers gave, with what entered the first block of each one's list."""
        entered: dict[str, tuple[Tensor, ...]] = {}

        def enter(name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            held = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            entered.setdefault(name, tuple(value.detach().clone() for value in held if value.is_floating_point()))

        handles = []
        for name in self.layers:
            parent, _, place = name.rpartition(".")
            blocks = taps.layer(self.module, parent)._modules if parent and place.isdecimal() else {}
            block = next(iter(blocks.values()), None)
            if block is not None:
                handles.append(block.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        device = first(sample).device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                layers = run(sample, select)
        finally:
            for handle in handles:
                handle.remove()
            for buffer, before in buffers:
                buffer.data.copy_(before)
        return [layer._replace(entered=entered.get(name, ())) for name, layer in zip(self.layers, layers, strict=True)]

    def _located(
        self, run: Callable[[Sample, FeatureSelect], list[Captured]], x_t: Sample, cond: Cond
    ) -> list[tuple[Part, ...]]:
        """The noisy sample's part of each layer, found again when the layout of the inputs changes."""
        shapes = repr((_layout(x_t), _layout(cond)))
        if shapes not in self._parts and len(self._parts) >= REMEMBERED:
            self._parts.pop(next(iter(self._parts)))
        seen = self._parts.setdefault(shapes, {})
        places = _places(cond)
        if places in seen:
            return seen[places]
        known = list(seen.values())
        if len(known) >= LOOKS and all(parts == known[0] for parts in known):
            return known[0]  # masks and indices do not move the sample's tokens in this model
        if len(seen) >= REMEMBERED:
            seen.pop(next(iter(seen)))
        found = locate(run, x_t, self.layers, self.features)
        if all(bool(leaf.isfinite().all()) for leaf in leaves(x_t)):  # what a broken batch shows is not kept
            seen[places] = found
        return found

    def _cast(self, value: Any) -> Any:
        """Give floating tensors the dtype of the weights, unless autocast sees to it."""
        weight = next((p for p in self.module.parameters() if p.dtype in FLOATS), None)
        if weight is None or torch.is_autocast_enabled(weight.device.type):
            return value
        return map_tensors(lambda x: x.to(weight.dtype) if x.is_floating_point() else x, value)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the module, as `nn.Module.to` does."""
        self.module.to(*args, **kwargs)
        return self

    @property
    def parameters_held(self) -> int:
        """How many parameters the teacher holds in memory."""
        return sum(p.numel() for p in self.module.parameters())


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Without torch's kernels for attention in eval mode without grad: they round otherwise than the pass with grad."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _layout(value: Any) -> Any:
    """Shapes of tensors and values of numbers: what decides where the tokens of a sequence lie."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return {key: _layout(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_layout(item) for item in value]
    return value if isinstance(value, bool | int | str | None) else type(value).__name__


def _places(value: Any, name: str = "") -> tuple[bytes, ...]:
    """The contents of masks and indices, also in nested conditions."""
    if isinstance(value, Tensor):
        tells = value.dtype == torch.bool or any(word in name for word in PLACES)
        return (value.detach().cpu().double().numpy().tobytes(),) if tells else ()
    if isinstance(value, Mapping):
        return tuple(place for key, item in value.items() for place in _places(item, f"{name} {key}"))
    if isinstance(value, list | tuple):
        return tuple(place for item in value for place in _places(item, name))
    return ()


class CopyTeacher(ModuleTeacher):
    """A frozen copy of the model as it is now; after its first pass it holds only what that pass ran.

    Args:
        model: the MSE-trained model, also inside DDP or torch.compile.
        layers: dotted names of the layers to compare.
        call: runs the model at a time in the schedule's unit.
        select: as in `ModuleTeacher`.
        features: likewise.
        prepare: likewise.
        truncate: drop what the first pass does not run.

    Raises:
        ValueError: the model is partitioned (FSDP, ZeRO-3) or cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: Sequence[str],
        call: ModelCall,
        select: FeatureSelect | None = None,
        features: Features = "noisy",
        prepare: Callable[[nn.Module], None] | None = None,
        truncate: bool = True,
    ) -> None:
        super().__init__(
            frozen_copy(model), layers=layers, call=call, select=select, features=features, prepare=prepare
        )
        self._truncate = truncate

    def __call__(self, x_t: Sample, t: Tensor, cond: Cond, /) -> list[Feature]:
        if not self._truncate:
            return super().__call__(x_t, t, cond)
        ran: set[nn.Module] = {self.module}
        handles = [
            module.register_forward_pre_hook(lambda module, args: ran.add(module)) for module in self.module.modules()
        ]
        try:
            with Used() as used:
                features = super().__call__(x_t, t, cond)
        finally:
            for handle in handles:
                handle.remove()
        self._truncate = False
        drop(self.module, ran, used.ids, self.layers)
        return features
