"""A teacher whose weights are narrower than what it is given: values stay as they are until they meet a weight.

Rounding the inputs themselves would spoil what is no activation: sizes and crops, rotary tables, coordinates, sigmas and
fractional times (999 becomes 1000 in bfloat16). So the conditions are left alone, and each of torch's own layers casts what
enters it to the dtype of its weights. No weight is cast, and the graph keeps no copy of one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from perceptual_diffusion._shapes import map_tensors

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)
MEETING = (
    nn.Linear, nn.Bilinear, _ConvNd, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase, nn.MultiheadAttention, nn.RNNBase,
    nn.PReLU,
)  # fmt: skip
"""Layers of torch that take only what has the dtype of their weights."""


class Precision:
    """In which dtypes a module gets what it is given, and how it is run on them.

    - Weights as wide as what is given, or wider: that is cast up to them.
    - Weights of half precision, narrower than something that is given: nothing is cast; layers cast what enters them. A model
      that mixes dtypes outside of such layers refuses that; it then runs under autocast of the weights' dtype, which on a GPU
      keeps a quarter more activations.

    The weights count by their narrowest floating dtype. An autocast that is on is left to do its work, but for weights of half
    precision that meet wider values: it would cast them again at every use, or keep wider activations.

    Args:
        module: the perceptual network.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.autocast = False
        """Whether the module has been found to need autocast."""
        self._met = False
        self._known: tuple[torch.dtype, str] | None = None
        self._dtype = torch.float32

    def __call__(self, *given: Any) -> tuple[tuple[Any, ...], Callable[[Callable[[], Any]], Any]]:
        """Prepare what is given.

        Args:
            given: samples and conditions, nested.

        Returns:
            them, cast where that loses nothing, and a function that runs a pass on them.
        """
        narrowest = self._narrowest()
        if narrowest is None:
            return given, _run
        dtype, device = narrowest
        if device == "meta":  # offloaded, until hooks bring it to where the sample is
            device = next((x.device.type for x in _floating(given)), "cpu")
        if dtype in HALF and not all(is_held(x.dtype, dtype) for x in _floating(given)):
            self._meet()
            return given, lambda attempt: self._run(attempt, device, dtype)
        if torch.is_autocast_enabled(device):
            return given, _run
        return map_tensors(lambda x: x.to(dtype) if x.is_floating_point() else x, given), _run

    def _narrowest(self) -> tuple[torch.dtype, str] | None:
        """Dtype and device of the narrowest weights; looked up again when the first weight has changed its own."""
        first = next((p for p in self.module.parameters() if p.dtype in FLOATS), None)
        if first is None:
            return None
        if self._known != (first.dtype, first.device.type):
            self._known = first.dtype, first.device.type
            self._dtype = first.dtype
            for parameter in self.module.parameters():
                if parameter.dtype in FLOATS and not is_held(self._dtype, parameter.dtype):
                    self._dtype = parameter.dtype
        return self._dtype, first.device.type

    def _meet(self) -> None:
        if self._met:
            return
        for module in self.module.modules():
            own = type(module).forward.__module__.startswith("torch.nn.")  # subclasses with a forward know what they do
            if own and isinstance(module, MEETING) and _meet not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_meet, with_kwargs=True)
        self._met = True

    def _run(self, attempt: Callable[[], Any], device: str, dtype: torch.dtype) -> Any:
        if not self.autocast:
            try:
                with torch.autocast(device, enabled=False):
                    return attempt()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # what a model raises is told again as a RuntimeError; only torch's own may be of dtypes
                own = error.__cause__ is None or isinstance(error.__cause__, RuntimeError)
                if not own or not torch.amp.is_autocast_available(device):
                    raise
        try:
            with torch.autocast(device, dtype=dtype):
                result = attempt()
        except RuntimeError as error:
            raise error from error.__cause__  # not from the attempt before
        self.autocast = True
        return result


def _run(attempt: Callable[[], Any]) -> Any:
    return attempt()


def _meet(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Cast what enters a layer to the dtype of its weights."""
    weight = next((p for p in module._parameters.values() if p is not None), None)
    if weight is None or weight.dtype not in FLOATS:  # quantised, or stored in eight bits and cast by its owner
        return None

    def cast(value: Tensor) -> Tensor:
        return value.to(weight.dtype) if value.is_floating_point() else value

    return map_tensors(cast, args), map_tensors(cast, kwargs)


def _floating(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        if x.is_floating_point():
            found.append(x)
        return x

    map_tensors(look, value)
    return found


def is_held(dtype: torch.dtype, by: torch.dtype) -> bool:
    """Whether a dtype's values are held `by` another without rounding."""
    return torch.promote_types(dtype, by) == by
