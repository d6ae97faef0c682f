"""Look into a model: its blocks, what a step will cost, and what its layers would be as a perceptual network.

trace(model, run)                            the blocks in execution order, with shapes, parameters and cost
step_cost(model, run, layers, sample=x_t)    a step of the objective next to a step of MSE
example(model)                               inputs for a model of diffusers, made from its config
probe_layers(model, clean, schedule=...)     measurements of the layers on a batch
SavedBytes(), LiveBytes()                    bytes that graphs keep for their backward, and that are alive, while entered
weights_held(modules)                        number and bytes of parameters
"""

from perceptual_diffusion.adapters.examples import example
from perceptual_diffusion.inspection.blocks import Block, trace
from perceptual_diffusion.inspection.cost import StepCost, step_cost
from perceptual_diffusion.inspection.measure import LayerRow
from perceptual_diffusion.inspection.memory import LiveBytes, SavedBytes, weights_held
from perceptual_diffusion.inspection.probe import Probe, probe_layers

__all__ = [
    "Block",
    "LayerRow",
    "LiveBytes",
    "Probe",
    "SavedBytes",
    "StepCost",
    "example",
    "probe_layers",
    "step_cost",
    "trace",
    "weights_held",
]
