"""Model families: how a model is called, where its middle is, how its prediction is taken out of its output.

    adapters.find(model)                              the adapter of a model
    adapters.register("package.ClassName", factory)   for other people's models; `factory(model) -> Adapter`

A package brings its own adapters with an entry point of the group `perceptual_diffusion.adapters`: a function without
arguments that calls `register`.
"""

from perceptual_diffusion.adapters import _wrap, diffusers  # noqa: F401  (they register themselves)
from perceptual_diffusion.adapters._accelerate import Checkpoints
from perceptual_diffusion.adapters._registry import Adapter, find, register
from perceptual_diffusion.adapters.diffusers import Concat
from perceptual_diffusion.adapters.outside import DecoderTeacher, TimmTeacher
from perceptual_diffusion.adapters.schedulers import Process, read

__all__ = ["Adapter", "Checkpoints", "Concat", "DecoderTeacher", "Process", "TimmTeacher", "find", "read", "register"]
