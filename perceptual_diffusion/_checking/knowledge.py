"""Whether what is declared of a trained student fits what it knows: its prediction, its times, its schedule."""

import math

import torch
from torch import Tensor

from perceptual_diffusion._checking import skill
from perceptual_diffusion._checking.batch import Batch
from perceptual_diffusion._checking.numbers import TINY, mean
from perceptual_diffusion._checking.report import SetupError
from perceptual_diffusion._shapes import check_sample, leaves
from perceptual_diffusion.parameterizations import Prediction
from perceptual_diffusion.types import Sample

KNOWS = 0.3
"""The skill from which a student is taken for a trained one."""
GAP, FALL = 0.1, 0.6
"""How much higher the skill must be with another prediction or other times, and to what share what it leaves open must
fall, before these are named."""
WRONG, ODD = 0.75, 0.9
"""To what share what the student leaves open has to fall at other times to be a fault, and to be warned of."""
LEVELS = ((0.05, "later"), (-0.05, "earlier"), (0.1, "later"), (-0.1, "earlier"))
"""By how much of the schedule the times are moved to see whether the student reads another level of noise."""


def judge(batch: Batch, predicted: Sample, *, above_zero: bool) -> float:
    """Compare the prediction and the times declared with others, and give the skill of the ones declared.

    Args:
        batch: the batch.
        predicted: ŷ.
        above_zero: whether ŷ has a smaller MSE than zero.

    Returns:
        the skill of the batch.

    Raises:
        SetupError: others fit far better.
    """
    schedule, declared = batch.objective.schedule, batch.objective.prediction
    own = _skills(batch, predicted, declared)
    known = skill.total(own)
    others = skill.other_predictions(schedule, declared, batch.t)
    best, other = max(((skill.total(_skills(batch, predicted, p)), p) for p in others), key=lambda fit: fit[0])
    chance = 3 / math.sqrt(sum(leaf.numel() for leaf in leaves(batch.clean)))  # of a few numbers, any may fit
    answers = ((formula, _answer(batch, t)) for formula, t in skill.other_times(schedule, batch.t))
    fits = [
        (skill.total(_skills(batch, answer, supposed)), formula, supposed)
        for formula, answer in (answers if known < 1 - GAP else ())
        if answer is not None
        for supposed in (declared, *others)
    ]
    told, formula, supposed = max(fits, key=lambda fit: fit[0], default=(-1.0, "", declared))
    if told > best + 2 * GAP and _far_better(told, known, chance):
        raise _misread_times(declared, supposed, formula, _share(told, known))
    if _far_better(best, known, chance):
        raise _misread(declared, other, _share(best, known))
    if not above_zero:
        batch.warnings.append(
            "the student's MSE is not below that of predicting zero, and no other prediction or unit of time fits. It is "
            f"untrained; or the schedule, `cond` or the scale of `clean` (root mean square {math.sqrt(mean(batch.clean)):.3g}) "
            "is not that of its training."
        )
    elif known > KNOWS and len(batch.t) >= 4:
        _check_level(batch, own)
    return known


def _far_better(told: float, known: float, chance: float) -> bool:
    return told > max(KNOWS, known + GAP) + chance and 1 - told < FALL * (1 - known)


def _check_level(batch: Batch, own: skill.Skills) -> None:
    """Refuse a schedule if the student does better when told that there is more, or less, noise than there is."""
    schedule, known = batch.objective.schedule, skill.total(own)
    best, text = ODD, ""
    for by, word in LEVELS:
        answer = _answer(batch, schedule.at((schedule.rank(batch.t) + by).clamp(0, 1)).to(batch.t.dtype))
        if answer is None:
            continue
        told = _skills(batch, answer, batch.objective.prediction)
        wins = float((told[0] > own[0]).double().mean())
        left = (1 - skill.total(told)) / max(1 - known, TINY)
        if left < best and wins >= 0.75:
            best = left
            text = f"told times {abs(by):.0%} of the schedule {word}, it explains {_share(skill.total(told), known)}"
    if best < WRONG:
        raise SetupError(
            "schedule",
            f"`model` was trained on another schedule than {schedule!r}: {text}. Pass the schedule of its training.",
        )
    if text:
        batch.warnings.append(f"`model` may have been trained on another schedule: {text}.")


def _skills(batch: Batch, predicted: Sample, prediction: Prediction) -> skill.Skills:
    schedule = batch.objective.schedule
    return skill.skills(predicted, batch.clean, batch.noise, batch.t, schedule=schedule, prediction=prediction)


def _answer(batch: Batch, t: Tensor) -> Sample | None:
    """The prediction for x_t at times that the model may not be meant for."""
    try:
        with torch.no_grad():
            answer = batch.run(batch.x_t, t)
        check_sample("model_pred", answer, batch.clean)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # such as a model that looks its times up in a table
        return None
    return answer


def _misread(declared: Prediction, other: Prediction, share: str) -> SetupError:
    """The error for an output that fits another prediction."""
    name = other.name
    way = f"-parameterizations.get({name[1:]!r})" if name.startswith("-") else repr(name)
    return SetupError(
        "prediction",
        f"`prediction` is {declared.name!r}, but as {name!r} the output of `model` explains {share}. Pass `prediction={way}`.",
    )


def _misread_times(declared: Prediction, supposed: Prediction, formula: str, share: str) -> SetupError:
    """The error for an output that fits other times."""
    kind = "" if supposed.name == declared.name else f", as {supposed.name!r}"
    return SetupError(
        "time",
        f"`model` is given its times in a wrong unit: with `{formula}` in the place of t it explains {share}{kind}. Pass a "
        "`call` that gives it the times of its training, or another schedule.",
    )


def _share(better: float, known: float) -> str:
    return f"{better:.1%} of what x_t leaves open, not {known:.1%}"
