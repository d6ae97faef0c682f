"""Read schedule, prediction and unit of time from a diffusers scheduler, without importing diffusers.

`SCHEDULERS` is the table of all of diffusers' classes; `docs/schedulers.md` is printed from it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from perceptual_diffusion.adapters import _processes
from perceptual_diffusion.adapters._processes import Config, ModelInput, Process

__all__ = ["SCHEDULERS", "Case", "ModelInput", "Process", "read"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """How the schedulers of a class are read when their config holds certain settings, or why they are not.

    Attributes:
        read: `(scheduler, config) -> process`; None: refused.
        when: the settings; empty: any.
        schedule: for the documentation: the schedule.
        time: likewise: the unit of t.
        prediction: likewise: what the model predicts.
        model: likewise: what the model is given; empty: x_t and t.
        note: likewise: anything else.
        refused: the reason, and what to do, a sentence each.
    """

    read: Callable[[Any, Config], Process] | None = None
    when: Config = field(default_factory=dict)
    schedule: str = ""
    time: str = ""
    prediction: str = ""
    model: str = ""
    note: str = ""
    refused: tuple[str, str] = ("", "")


def read(scheduler: Any) -> Process:
    """Read a diffusers scheduler.

    - DDPM and its like (a table of ᾱ_t): t is the index, x_t the variance-preserving sample, which is what the model is
      given; the variance-exploding sample of the Euler and LMS schedulers' `add_noise` is x_t / alpha_t.
    - flow matching: t is a timestep from 0 to 1000, sigma = t / 1000 whatever the shift; with inverted sigmas t = 0 is
      the noise. The shift, dynamic or not, says how training times are drawn.
    - EDM and its like: t is sigma. The model is given c_in x_t and a function of sigma.

    All classes are in `docs/schedulers.md`.

    Args:
        scheduler: an instance of a scheduler class of diffusers, or of a subclass of one.

    Returns:
        the process.

    Raises:
        TypeError: it is no scheduler.
        ValueError: its class or a setting of it cannot be read; the message says why, and what to pass.
    """
    config = getattr(scheduler, "config", None)
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    if not isinstance(config, Mapping) or not any(name.endswith("Scheduler") for name in names):
        raise TypeError(
            f"`schedule` is a {type(scheduler).__name__}, expected a diffusers scheduler or a schedule of perceptual_diffusion.schedules."
        )
    known = next((name for name in names if name in SCHEDULERS), None)
    if known is None:
        raise ValueError(
            f"{names[0]} cannot be read: it is unknown. Pass a schedule of perceptual_diffusion.schedules and `prediction=`, "
            "the ones the model was trained with."
        )
    case = next(c for c in SCHEDULERS[known] if all(config.get(key) == value for key, value in c.when.items()))
    if case.read is None:
        settings = " and ".join(f"{key}={value!r}" for key, value in case.when.items())
        raise ValueError(
            f"{names[0]}{settings and f' with {settings}'} cannot be read: {case.refused[0]}. {case.refused[1]}."
        )
    return case.read(scheduler, config)


# The table

_OWN = "its `prediction_type`"
_DISTILLED = "A distilled model is no denoiser: the loss trains it back into one."

TABLE = Case(read=_processes.table, schedule="Discrete(ᾱ_t)", time="index, 0 … T − 1", prediction=_OWN)
FLOW = Case(
    read=_processes.flow,
    schedule="Linear(scale=T)",
    time="0 (clean) … T (noise)",
    prediction='"flow_prediction"',
    note="The shift says how t is drawn.",
)
EDM_LIKE = Case(
    read=_processes.karras,
    schedule="EDM",
    time="sigma",
    prediction="epsilon: edm(sigma_data); v_prediction: −edm(sigma_data)",
    model="c_in x_t, ln(sigma) / 4",
)


def _like(case: Case, **changes: Any) -> Case:
    return Case(**{**vars(case), **changes})


_NO_FLOW = Case(
    when={"prediction_type": "flow_prediction"},
    refused=(
        "a flow is a velocity along the straight path, and this scheduler runs along its table of ᾱ_t",
        "Set use_flow_sigmas=True where the class has it, or pass FlowMatchEulerDiscreteScheduler()",
    ),
)
_SOLVER = (
    Case(
        when={"use_flow_sigmas": True, "prediction_type": "v_prediction"},
        refused=(
            "its steps take alpha x_t − sigma v for the clean sample, which on the straight path it is not",
            "Pass the scheduler that the model was trained with, or `schedules.Linear(scale=1000)` and `prediction=`",
        ),
    ),
    _like(
        FLOW,
        read=_processes.solver_flow,
        when={"use_flow_sigmas": True},
        prediction=_OWN,
        note="`flow_shift` says how t is drawn.",
    ),
    _NO_FLOW,
    TABLE,
)
_TOKENS = (
    Case(
        refused=(
            "it denoises token ids, which have neither a gradient nor alpha and sigma",
            "The self-perceptual loss needs a model of continuous samples",
        )
    ),
)
_STAGES = (
    Case(
        when={"use_flow_sigmas": False},
        refused=(
            "its sigmas are those of the straight path all the same, so its steps are of no one path",
            "Set use_flow_sigmas=True",
        ),
    ),
    _like(FLOW, read=_processes.staged_flow, when={"stages": 1}, prediction=_OWN),
    Case(
        refused=(
            "with several stages x_t is a mixture with the upsampled result of the stage before, not of the clean sample and noise",
            "Read the scheduler with stages=1, and train the stage of full size",
        )
    ),
)
_REVERSED = _like(
    FLOW,
    read=_processes.inverted_flow,
    when={"invert_sigmas": True},
    schedule="Linear(scale=T, reverse=True)",
    time="0 (noise) … T (clean)",
    prediction='"-flow_prediction"',
)
_DATA_LAST = Case(
    read=_processes.data_last,
    schedule="Linear(reverse=True)",
    time="0 (noise) … 1 (clean)",
    prediction='"-flow_prediction"',
)

SCHEDULERS: dict[str, tuple[Case, ...]] = {
    **dict.fromkeys(
        (
            "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler",
            "PNDMScheduler", "LMSDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
            "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler",
            "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "UnCLIPScheduler",
        ),
        (_NO_FLOW, TABLE),
    ),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), (_NO_FLOW, _like(TABLE, note=_DISTILLED))),
    "RePaintScheduler": (_like(TABLE, prediction='"epsilon"'),),
    "EulerDiscreteScheduler": (
        Case(
            read=_processes.continuous,
            when={"timestep_type": "continuous", "prediction_type": "v_prediction"},
            schedule="EDM",
            time="sigma",
            prediction="−edm(1)",
            model="x_t / √(sigma² + 1), ln(sigma) / 4",
            note="ln sigma ~ N(0.7, 1.6²), as Stable Video Diffusion is trained. "
            "With other predictions diffusers gives the model the index all the same.",
        ),
        _NO_FLOW,
        TABLE,
    ),
    **dict.fromkeys(
        (
            "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler",
            "DPMSolverSinglestepScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
        ),
        _SOLVER,
    ),
    "FlowMatchEulerDiscreteScheduler": (_REVERSED, FLOW),
    **dict.fromkeys(("FlowMatchHeunDiscreteScheduler", "LTXEulerAncestralRFScheduler"), (FLOW,)),
    "FlowMatchLCMScheduler": (
        Case(
            when={"invert_sigmas": True},
            refused=(
                "its steps take the noise for the clean sample where sigmas are inverted",
                "Pass FlowMatchEulerDiscreteScheduler with the same config, or "
                "`schedules.Linear(scale=1000, reverse=True)` and `prediction='-flow_prediction'`",
            ),
        ),
        _like(FLOW, note=_DISTILLED),
    ),
    "FlowMapEulerDiscreteScheduler": (
        _like(FLOW, note="A flow map gives the velocity where its second time is t: call it so."),
    ),
    "MiniMaxH3Scheduler": (_like(_DATA_LAST, note="The shift says how t is drawn."),),
    "RFD4ProteinaScheduler": (_DATA_LAST,),
    **dict.fromkeys(("HeliosScheduler", "HeliosDMDScheduler"), _STAGES),
    "PiflowScheduler": (
        Case(
            refused=(
                "its model gives a policy for a whole segment of time, n_grid predictions for one sample",
                "Train the flow-matching model that it was distilled from, with FlowMatchEulerDiscreteScheduler",
            )
        ),
    ),
    "SCMScheduler": (
        Case(
            read=_processes.trigflow,
            when={"prediction_type": "trigflow"},
            schedule="Linear()",
            time="sin τ / (sin τ + cos τ), 0 (clean) … 1 (noise), of the scheduler's angle τ",
            prediction='"flow_prediction"',
            note="Of the model itself, before the pipeline turns its output into TrigFlow's; the clean sample is the latent, "
            "not yet times sigma_data. " + _DISTILLED,
        ),
        Case(refused=("it knows 'trigflow' only", "Set prediction_type='trigflow'")),
    ),
    **dict.fromkeys(("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"), (EDM_LIKE,)),
    "CosineDPMSolverMultistepScheduler": (
        _like(
            EDM_LIKE,
            read=_processes.karras_angle,
            model="c_in x_t, atan(sigma) 2 / π",
            note="The model's time is drawn about evenly, below the scheduler's `sigma_min` too.",
        ),
    ),
    "CMStochasticIterativeScheduler": (
        Case(
            read=_processes.consistency,
            schedule="EDM",
            time="sigma, above `sigma_min`",
            prediction="(x_0 − c_skip x_t) / c_out of consistency models",
            model="c_in x_t, 250 ln(sigma)",
            note=_DISTILLED,
        ),
    ),
    "ScoreSdeVeScheduler": (
        Case(read=_processes.score_ve, schedule="EDM", time="sigma", prediction="SCORE, −ε / sigma", note="ln sigma is drawn about evenly."),
    ),
    "KarrasVeScheduler": (
        Case(
            read=_processes.karras_ve,
            schedule="EDM",
            time="sigma",
            prediction="2 SCORE: the score of pixels in [0, 1]",
            model="(x_t + 1) / 2, sigma / 2",
            note="As its pipeline has it, for samples in [-1, 1].",
        ),
    ),
    "IPNDMScheduler": (
        Case(read=_processes.pseudo_linear, schedule="Cosine()", time="0 (clean) … 1 (noise)", prediction='"v_prediction"'),
    ),
    "DDPMWuerstchenScheduler": (
        Case(
            read=_processes.wuerstchen,
            schedule="cosine ᾱ_t within [0.0001, 0.9999]",
            time="0 (clean) … 1 (noise)",
            prediction='"epsilon"',
        ),
    ),
    **dict.fromkeys(
        (
            "AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler",
            "VQDiffusionScheduler",
        ),
        _TOKENS,
    ),
    "ConsistencyDecoderScheduler": (
        Case(
            refused=(
                "it is a part of a VAE, whose decoder it runs twice",
                "Pass the scheduler of the diffusion model, or `schedules.Discrete.cosine(1024)`, `prediction=` and `call=`",
            )
        ),
    ),
    "ScoreSdeVpScheduler": (
        Case(
            refused=(
                "it is deprecated, and says neither how noise is added nor which time the model is given",
                "Pass `schedules.Interpolant(alpha, sigma)`, `prediction='epsilon'` and `call=`",
            )
        ),
    ),
}  # fmt: skip
"""What is known of each class: the first case whose settings hold is the scheduler's."""
