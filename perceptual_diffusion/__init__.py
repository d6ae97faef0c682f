"""A perceptual training loss for any diffusion or flow model, made by the model's own frozen copy.

from perceptual_diffusion import SelfPerceptualObjective

objective = SelfPerceptualObjective.wrap(model, noise_scheduler)
loss = objective(model, latents, cond={"encoder_hidden_states": text})
"""

from perceptual_diffusion import (
    adapters,
    checks,
    distances,
    nonfinite,
    parameterizations,
    schedules,
    teachers,
    timesteps,
    weights,
)
from perceptual_diffusion.inspection import probe_layers
from perceptual_diffusion.monitor import Monitor
from perceptual_diffusion.objective import PAPER, SelfPerceptualObjective

__version__ = "0.1.0"

__all__ = [
    "PAPER",
    "Monitor",
    "SelfPerceptualObjective",
    "adapters",
    "checks",
    "distances",
    "nonfinite",
    "parameterizations",
    "probe_layers",
    "schedules",
    "teachers",
    "timesteps",
    "weights",
]
