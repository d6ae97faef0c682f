"""Where f* comes from: a frozen copy of the model that holds only what runs up to the last tapped layer, or a module."""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Self, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from perceptual_diffusion import taps
from perceptual_diffusion._checkpoints import unfreeze
from perceptual_diffusion._restore import Kept, NoFastPath
from perceptual_diffusion._shapes import batch_size, first, leaves, map_tensors, tensors_in
from perceptual_diffusion.compiled import CompiledPass, options_of
from perceptual_diffusion.copies import Seen, alias_copy, cut, frozen_copy
from perceptual_diffusion.features import FEATURES, Captured, Features, Part, capture, locate
from perceptual_diffusion.precision import Precision
from perceptual_diffusion.types import Cond, Feature, FeatureSelect, ModelCall, Sample

_T = TypeVar("_T")

PLACES = ("mask", "ind", "len", "tag", "segment")
"""Words in the names of conditions that say where the tokens of a sequence are."""
LOOKS = 4
"""After so many masks that leave the noisy sample's tokens where they are, masks are looked at no more."""
REMEMBERED = 64
"""Shapes of the inputs whose layout is remembered, and masks for each."""
NO_MORE, ONE_MORE, FAILED = range(3)
"""What a process tells the others that hold parts of the teacher's weights, before each pass that looks at a layout."""
ON_HOST = ("cpu",)
"""Devices whose tensors are read without waiting, so in every pass: numpy writes into them unseen."""

_turns: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
"""One lock for each module, held in the first pass of a teacher. Not the teacher's own: locks are neither copied nor pickled."""
_read = WeakTensorKeyDictionary()
"""What was read of the caller's tensors, with the version they had."""


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
        stop: leave each pass after the last layer; by default it is left where that is safe, and else run to its end: where
            the module is sharded (FSDP, ZeRO-3) or has the hooks by which accelerate or diffusers offload it.
        compile: run every pass but the first as one graph up to the last layer; a dict holds arguments of torch.compile.

    Raises:
        ValueError: a layer does not exist, `features` is unknown, or `stop` and `compile` exclude one another.
        TypeError: `compile` is neither a bool nor a dict.
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
        stop: bool | None = None,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        self._options = options_of(compile)
        if self._options is not None and stop is False:
            raise ValueError(
                "`stop` is False, but a compiled pass always ends at the last layer. Pass `compile=False`."
            )
        for name in layers:
            taps.layer(module, name)
        if features not in FEATURES:
            raise ValueError(f"unknown features {features!r}, expected 'noisy' or 'all'.")
        self.module = module.eval().requires_grad_(False)
        self.layers, self.call, self.select, self.stop = tuple(layers), call, select, stop
        self.features = features
        if prepare is not None:
            prepare(self.module)
        self._parts: dict[Any, dict[Any, list[tuple[Part, ...]]]] = {}
        self._settled: dict[Any, list[tuple[Part, ...]]] = {}
        self._unfrozen = self._ran = self._cut = False
        self.all_know = False
        """Whether the processes have agreed that each knows the layouts of the passes that follow."""
        self._compiled: CompiledPass | None = None
        self._precision = Precision(self.module)

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
        if self._ran:
            return self._features(x_t, t, cond)
        with _turns.setdefault(self.module, threading.RLock()):
            features = self._features(x_t, t, cond)
            self._ran = True
            return features

    def _features(self, x_t: Sample, t: Tensor, cond: Cond) -> list[Feature]:
        told = cond
        held = next(self.module.parameters(), None)
        free = taps.may_stop(self.module, self.layers)
        stop = free or self._cut if self.stop is None else self.stop
        for leaf in leaves(x_t) if free else ():  # else hooks bring the weights to the sample
            if held is not None and leaf.device != held.device:
                raise ValueError(
                    f"the teacher is on {held.device}, expected {leaf.device}, the device of the sample. "
                    f"Call `objective.to({str(leaf.device)!r})`."
                )
        (x_t, cond), in_dtype = self._precision(x_t, map_tensors(Tensor.detach, dict(cond)))

        def run(sample: Sample, select: FeatureSelect, cond: Cond = cond) -> list[Any]:
            with NoFastPath():
                found: list[Any] = in_dtype(
                    lambda: taps.run(
                        self.module,
                        self.layers,
                        lambda: self.call(self.module, sample, t, cond),
                        select=select,
                        stop=stop,
                    )
                )
            return found

        def fast(sample: Sample, select: FeatureSelect) -> list[Any]:
            if self._options is None or not self._ran:  # a copy sees in its first pass what it needs
                return run(sample, select)
            if self._compiled is None:
                self._compiled = CompiledPass(self.module, self.layers, select=select, options=self._options)
            compiled = self._compiled
            with NoFastPath():
                found: list[Any] = in_dtype(lambda: compiled(lambda module: self.call(module, sample, t, cond)))
            return found

        def look(sample: Sample, select: FeatureSelect) -> list[Captured]:
            return self._watched(partial(run, cond=map_tensors(_without_nan, cond)), sample, select)

        grad = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves(x_t))
        if grad and not self._unfrozen:
            unfreeze(self.module, lambda: self._watched(run, x_t, capture))
            self._unfrozen = True
        if self.select is not None:
            features = [[feature] for feature in fast(x_t, self.select)]
        else:
            parts = self._located(look, x_t, told, free)
            given = zip(fast(x_t, capture), parts, strict=True)
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

        hooks = []
        for name in self.layers:
            parent, _, place = name.rpartition(".")
            blocks = taps.layer(self.module, parent)._modules if parent and place.isdecimal() else {}
            block = next(iter(blocks.values()), None)
            if block is not None:
                hooks.append((block, partial(enter, name)))
        before = Kept(self.module, first(sample).device)
        try:
            layers = taps.hooked(lambda: run(sample, select), hooks, before=True)
        finally:
            before.restore()
        return [layer._replace(entered=entered.get(name, ())) for name, layer in zip(self.layers, layers, strict=True)]

    def _located(
        self, run: Callable[[Sample, FeatureSelect], list[Captured]], x_t: Sample, cond: Cond, free: bool
    ) -> list[tuple[Part, ...]]:
        """The noisy sample's part of each layer, found again when the layout of the inputs changes."""
        known = self._known(x_t, cond)
        alone = free or not (taps.several_processes() and taps.gathered(self.module))
        if alone or (known and self.all_know):
            return known or self._locate(run, x_t, cond)
        device, passing = first(x_t).device, False

        def run_together(sample: Sample, select: FeatureSelect) -> list[Captured]:
            nonlocal passing
            passing = True
            _agree(ONE_MORE, device)
            captured = run(sample, select)
            passing = False
            return captured

        try:
            found = known or self._locate(run_together, x_t, cond)
        except Exception:
            if not passing:  # in a pass the others wait for weights, and not for this
                taps.largest([FAILED], device)
            raise
        with torch.no_grad():
            while _agree(NO_MORE, device):  # weights are gathered from all: who needs no pass has to run it, too
                run(x_t, capture)
        return found

    def knows(self, x_t: Sample, cond: Cond) -> bool:
        """Whether a pass on these needs no others before it, that find the noisy sample's part."""
        return self.select is not None or self._known(x_t, cond) is not None

    def _known(self, x_t: Sample, cond: Cond) -> list[tuple[Part, ...]] | None:
        """What was found for this layout before."""
        shapes = _layout(x_t), _layout(cond)
        if shapes in self._settled:
            return self._settled[shapes]
        return self._parts.get(shapes, {}).get(_places(cond))

    def _locate(
        self, run: Callable[[Sample, FeatureSelect], list[Captured]], x_t: Sample, cond: Cond
    ) -> list[tuple[Part, ...]]:
        shapes = _layout(x_t), _layout(cond)
        if shapes not in self._parts and len(self._parts) >= REMEMBERED:
            self._settled.pop(oldest := next(iter(self._parts)), None)
            self._parts.pop(oldest)
        seen = self._parts.setdefault(shapes, {})
        if len(seen) >= REMEMBERED:
            seen.pop(next(iter(seen)))
        found = locate(run, x_t, self.layers, self.features)
        broken = any(not bool(leaf.isfinite().all()) for leaf in leaves(x_t))
        if not broken and not any(
            bool(x.isnan().any()) for x in tensors_in(cond)
        ):  # what a broken batch shows is not kept
            seen[_places(cond)] = found
            if len(seen) >= LOOKS and all(parts == found for parts in seen.values()):
                self._settled[shapes] = found  # masks and indices do not move the sample's tokens in this model
        return found

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the module, as `nn.Module.to` does."""
        self.module.to(*args, **kwargs)
        return self

    @property
    def parameters_held(self) -> int:
        """How many parameters the teacher holds in memory."""
        return sum(p.numel() for p in self.module.parameters())


def _without_nan(x: Tensor) -> Tensor:
    return x.nan_to_num(0, torch.inf, -torch.inf) if x.is_floating_point() else x


def _agree(says: int, device: torch.device) -> int:
    """Tell the other processes what this one needs, and give the most that any does; all ask before each pass."""
    (most,) = taps.largest([says], device)
    if most == FAILED:
        raise ValueError(
            "another process could not find the noisy sample's part of the teacher's features, and none can go on alone, as the "
            "teacher's weights are gathered from all. Mend what the error of that process says."
        )
    return most


def _layout(value: Any) -> tuple[Any, ...]:
    """Shapes of tensors and values of numbers: what decides where the tokens of a sequence lie."""
    if isinstance(value, Tensor):
        return "tensor", value.shape
    if isinstance(value, Mapping):
        return "mapping", *((key, _layout(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return "list", *map(_layout, value)
    return type(value).__name__, value if isinstance(value, bool | int | str) else None


def _places(value: Any, name: str = "") -> tuple[bytes, ...]:
    """The contents of masks and indices, also in nested conditions."""
    if isinstance(value, Tensor):
        tells = value.dtype == torch.bool or any(word in name for word in PLACES)
        return (_contents(value),) if tells else ()
    if isinstance(value, Mapping):
        return tuple(place for key, item in value.items() for place in _places(item, f"{name} {key}"))
    if isinstance(value, list | tuple):
        return tuple(place for item in value for place in _places(item, name))
    return ()


def _contents(value: Tensor) -> bytes:
    """The numbers of a mask or an index; one on a device is copied to the host once, and again when it was written into."""
    if value.device.type in ON_HOST or type(value) is not Tensor or value.is_inference():
        return value.detach().cpu().double().numpy().tobytes()
    known = _read.setdefault(value if value._base is None else value._base, {})  # parts of a batch are made anew
    key, version = (value.dtype, value.storage_offset(), value.shape, value.stride()), value._version
    if key not in known or known[key][0] != version:
        if len(known) >= REMEMBERED:
            known.pop(next(iter(known)))
        known[key] = version, value.detach().cpu().double().numpy().tobytes()
    found: bytes = known[key][1]
    return found


class CopyTeacher(ModuleTeacher):
    """A frozen copy of the model as it is now, that holds only what a pass up to the last tapped layer uses.

    With `example`, that is all it ever allocates. Without, it is cut by its first pass.

    Args:
        model: the MSE-trained model, also inside DDP or torch.compile.
        layers: dotted names of the layers to compare.
        call: runs the model at a time in the schedule's unit.
        select: as in `ModuleTeacher`.
        features: likewise.
        prepare: likewise.
        compile: likewise.
        truncate: leave out what a pass does not use.
        dtype: the dtype of the copy's parameters, but of those that the model keeps in float32; by default the model's.
        example: a noisy sample, its times and its condition, as a pass is given them, with every condition that is used later.
        without: modules of `model` that no pass up to the layers runs, where that is known: they are left out from the start.

    Raises:
        ValueError: the model is partitioned (FSDP, ZeRO-3), offloaded, or cannot be copied; or `example` cannot be run.
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
        compile: bool | Mapping[str, Any] = False,
        truncate: bool = True,
        dtype: torch.dtype | None = None,
        example: tuple[Sample, Tensor, Cond] | None = None,
        without: Collection[nn.Module] = (),
    ) -> None:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"`dtype` is {dtype}, expected a floating dtype, such as torch.bfloat16.")
        spare = set(without) if truncate else set()
        if truncate and example is not None:
            spare |= _unused(model, example, layers=layers, call=call, prepare=prepare)
        super().__init__(
            frozen_copy(model, without=spare, dtype=dtype),
            layers=layers,
            call=call,
            select=select,
            features=features,
            prepare=prepare,
            compile=compile,
        )
        self._truncate, self._cut = truncate and example is None, bool(spare)

    def _features(self, x_t: Sample, t: Tensor, cond: Cond) -> list[Feature]:
        run = super()._features
        if not self._truncate or not taps.may_stop(self.module, self.layers):
            return run(x_t, t, cond)
        seen, features = _watched_calls(self, lambda: run(x_t, t, cond))
        cut(self.module, seen.spare(self.module, self.layers))
        self._truncate, self._cut = False, True
        return features


def _unused(
    model: nn.Module,
    example: tuple[Sample, Tensor, Cond],
    *,
    layers: Sequence[str],
    call: ModelCall,
    prepare: Callable[[nn.Module], None] | None,
) -> set[nn.Module]:
    """The modules that a pass does not use; it runs on an alias and leaves no trace in the model."""
    alias, originals = alias_copy(model)
    teacher = ModuleTeacher(alias, layers=layers, call=call, select=capture, prepare=prepare)
    devices = {parameter.device for parameter in alias.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            seen, _ = _watched_calls(teacher, lambda: teacher(*example))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's own
        raise ValueError(f"the model cannot be run on `example`: {error}") from error
    return {originals[module] for module in seen.spare(alias, layers)}


def _watched_calls(teacher: ModuleTeacher, run: Callable[[], _T]) -> tuple[Seen, _T]:
    """Run something, and give what the model ran and used in it, but not what the teacher did around it, with the result."""
    seen, call = Seen(), teacher.call

    def watched(model: Any, x_t: Any, t: Tensor, cond: Cond, /) -> Any:
        with seen:
            return call(model, x_t, t, cond)

    try:
        try:
            teacher.call = watched
            return seen, seen.watching(teacher.module, run)
        finally:
            teacher.call = call
    finally:  # once more, for an interrupt in the first
        teacher.call = call
