"""The base of a LoRA model as its teacher: the modules are copied, the base weights shared, the LoRA layers left out.

Nothing of the student is switched on or off, so its modes, its adapters, its dropout and its checkpointing stay as they
are, also while a backward recomputes the student's forward.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from perceptual_diffusion._alias import Alias
from perceptual_diffusion._shapes import leaves
from perceptual_diffusion.features import Features
from perceptual_diffusion.teachers import ModuleTeacher
from perceptual_diffusion.types import Cond, Feature, FeatureSelect, ModelCall, Sample

logger = logging.getLogger("perceptual_diffusion")


class LoraTeacher(ModuleTeacher):
    """Features of the base of a LoRA model, with a gradient to the sample; it holds no base weights of its own.

    The base weights are the model's and follow it to another device or dtype. Copied is what training changes in place:
    weights that require grad when the teacher is built (`bias="all"`, layers unfrozen), and the statistics of norms. Of
    layers into which adapters are merged, the teacher holds unmerged copies as long as they are.

    Args:
        model: a model with the LoRA layers of PEFT or of diffusers' `add_adapter`, also inside DDP or torch.compile.
        layers: dotted names of the layers to compare, as they are without LoRA.
        call: runs the model at a time in the schedule's unit.
        select: as in `ModuleTeacher`.
        features: likewise.
        prepare: likewise.
        compile: likewise.

    Raises:
        ValueError: the model has no LoRA layers, an adapter altered the base weights when it was added, or the base is
            partitioned (FSDP, ZeRO-3), offloaded, or cannot be copied.
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
    ) -> None:
        self._alias = Alias(model)
        super().__init__(
            self._alias.module,
            layers=layers,
            call=call,
            select=select,
            features=features,
            prepare=prepare,
            compile=compile,
        )
        # A module that checkpoints itself over its weights would have them unfrozen, and they are the student's. Frozen,
        # it has no backward in the student either.
        self._unfrozen = True
        self._place = self._alias.weight.device, self._alias.weight.dtype

    def __call__(self, x_t: Sample, t: Tensor, cond: Cond, /) -> list[Feature]:
        """Give the features of the noisy sample, as `ModuleTeacher` does, by the base as it is now."""
        self._alias.follow()
        device, dtype = place = self._alias.weight.device, self._alias.weight.dtype
        for leaf in leaves(x_t):
            if leaf.device != device:
                raise ValueError(
                    f"the base weights of `model` are on {device}, expected {leaf.device}, the device of the sample: with "
                    f"`teacher='lora'` they are the student's. Call `model.to({str(leaf.device)!r})`; if the model is offloaded, use "
                    "`teacher='copy'`."
                )
        if place != self._place:
            logger.info("the base of the student is now %s on %s, and the teacher with it", dtype, device)
            self._place = place
        return super().__call__(x_t, t, cond)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move nothing: the base is the student's, and what the teacher holds besides follows it in the next pass."""
        logger.info("the weights of teacher='lora' are the student's: they move with `model.to`")
        return self

    @property
    def parameters_held(self) -> int:
        """How many parameters the teacher holds besides the student's."""
        return self._alias.parameters_held
