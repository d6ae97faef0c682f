"""EDM denoisers D(x, sigma): the preconditioned networks of EDM and EDM2, k-diffusion's wrappers, and their like.

D takes clean + sigma ε and gives the clean sample (Karras et al. 2022, eq. 7). The scaling of its input, the time of the
network inside and the mixing with x are its own business, so on `schedules.EDM()` t is sigma and the prediction "sample":

    SelfPerceptualObjective.wrap(net, schedules.EDM())

Such classes are copied into modules of any name, or unpickled into modules without one, so they are known by their
structure. Labels go into `cond` under the names of their forward (`class_labels`, `augment_labels`, ...).

- sigma is drawn from the schedule. VP, VE and iDDPM denoisers are trained between their own `sigma_min` and `sigma_max`:
  `schedules.EDM(sigma_min=net.sigma_min, sigma_max=net.sigma_max)`, with `p_mean` and `p_std` of their training.
- An iDDPM denoiser rounds the time of its network to the nearest of its levels, but takes x and sigma as they are, so any
  sigma is right. A sampler of yours that draws `net.round_sigma(sigma)` keeps to the levels.
- A network that is preconditioned outside of itself (`parameterizations.edm`) is not such a denoiser.
- A student in half precision needs its loss scaled up, since a mean over features has gradients of about 1 / (B C H W):
  EDM's own loss is a sum. Multiply by `clean[0].numel()`, or pass `cond={"force_fp32": True}`.
"""

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from perceptual_diffusion import taps
from perceptual_diffusion.types import Cond

SIGMA = re.compile(r"(.*_)?sigmas?(_.*)?")
"""Names of the argument that is sigma."""
METHODS = ("round_sigma", "get_scalings", "sigma_to_t")
"""What only a denoiser D(x, sigma) has."""


def conventions(model: nn.Module) -> dict[str, Any] | None:
    """Give the fields of an adapter, but its layers, where a model is an EDM denoiser D(x, sigma); else None.

    Args:
        model: any module, also inside DDP or torch.compile.

    Returns:
        `family`, `call`, `time`, `prediction` and `prepare`, or None.
    """
    inner = taps.unwrap(model)
    sigma = _argument(inner)
    if sigma is None:
        return None
    if not any(callable(getattr(inner, name, None)) for name in METHODS) and "sigma_data" not in _used(inner):
        return None
    return {
        "family": "EDM", "call": _Call(sigma), "time": "sigma", "prediction": "sample", "prepare": in_full_precision,
    }  # fmt: skip


def in_full_precision(teacher: nn.Module) -> None:
    """Let a denoiser that runs its network in float16 run it in float32.

    In float16 the loss is about right and its gradient less so. Plain autograd underflows, since the loss is a mean over
    batch and feature: measured on tiny nets at a batch of 64 and an error of 0.1 of the data, the loss is off by 0.4 % and
    the gradient by 6 to 33 % at 8 x 8 pixels, 69 to 100 % at 32 x 32. With the gradient scaled, as `micro_batch` does, some
    5 % remain, for the two features differ by little.
    """
    for module in teacher.modules():
        if vars(module).get("use_fp16"):
            module.use_fp16 = False  # type: ignore[assignment]


@dataclass(frozen=True)
class _Call:
    """Runs D(x, sigma): sigma in the second place, or by its name."""

    keyword: str

    def __call__(self, model: Any, x_t: Any, t: Tensor, cond: Cond, /) -> Any:
        if self.keyword:
            return model(x_t, **{self.keyword: t}, **cond)
        return model(x_t, t, **cond)


def _argument(model: nn.Module) -> str | None:
    """The name of the argument that is sigma, empty where it is the second; None where there is none."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # a scripted model
        return None
    for place, parameter in enumerate(parameters):
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if place and named and parameter.default is parameter.empty and SIGMA.fullmatch(parameter.name):
            return "" if place == 1 and parameter.kind is not parameter.KEYWORD_ONLY else parameter.name
    return None


def _used(model: nn.Module) -> set[str]:
    """The names that a forward and its class' methods that it calls use: a bare network may hold a `sigma_data` unused."""
    code = getattr(inspect.unwrap(model.forward), "__code__", None)
    methods = [getattr(getattr(type(model), name, None), "__code__", None) for name in getattr(code, "co_names", ())]
    return {name for part in (code, *methods) if part is not None for name in part.co_names}
