"""Calls drawn by Hypothesis, and what is held against each: of the loss, of students, of `wrap`, of the other methods."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from models import distance
from paper import PaperObjective
from torch import nn

from fuzz import cases, values
from fuzz.judge import outcome
from fuzz.values import EITHER, REFUSED, SAME
from perceptual_diffusion import SelfPerceptualObjective, adapters, schedules
from perceptual_diffusion._shapes import leaves, map_leaves
from perceptual_diffusion.adapters import _registry
from perceptual_diffusion.adapters._explained import Explained
from perceptual_diffusion.objective import call_model


def agree(got, want, tolerance=1e-4):
    """The losses are those of Algorithm 1; where these are not finite, neither are ours."""
    assert got.shape == want.shape
    finite = want.isfinite() & (want.abs() < 1e30)
    assert got[finite].isfinite().all()
    if finite.any() and want[finite].abs().max() > 0:
        assert distance(got[finite], want[finite]) < tolerance


@dataclass(repr=False)
class Call:
    """A call of `loss` or of the objective, what was changed in it, and what has to come of it."""

    case: cases.Case
    base: list
    arguments: dict
    verdict: str = SAME
    told: list = field(default_factory=list)
    student: object = Ellipsis

    def __repr__(self):
        return f"{next(n for n in cases.CASES if cases.case(n) is self.case)}, {len(self.base)}: {self.told}"

    def __call__(self):
        rest = dict(self.arguments)
        if "model_pred" in rest:
            return self.case.objective.loss(rest.pop("model_pred"), **rest)
        return self.case.objective(
            self.case.student if self.student is Ellipsis else self.student, rest.pop("clean"), **rest
        )

    def expected(self):
        given = self.arguments
        predicted = given["model_pred"] if "model_pred" in given else self.case.predict(given)
        predicted = self.student.way(predicted) if isinstance(self.student, Giving) else predicted
        while isinstance(predicted, list | tuple | values.Other):
            predicted = predicted.sample if isinstance(predicted, values.Other) else predicted[0]
        if isinstance(self.student, Giving):
            predicted = predicted[:, : given["clean"].shape[1]]  # the rest is a variance
        return self.case.expected(predicted, given)


@st.composite
def losses(draw):
    case = cases.case(draw(st.sampled_from(list(cases.CASES))))
    batch = max(case.least, draw(st.sampled_from([2, 1, 3, 0])))
    given = case.arguments(batch, draw(st.integers(0, 99)))
    call = Call(case, list(case.student.parameters()), given)
    if draw(st.booleans()):
        with torch.no_grad():
            predicted = case.predict(given)
        given["model_pred"] = map_leaves(lambda x: x.requires_grad_(), predicted)
        call.base = list(leaves(given["model_pred"]))
    ways = {"t": values.times(case.objective.schedule.high), "cond": values.conditions()}
    for name in draw(st.lists(st.sampled_from([n for n in given if n != "reduction"]), max_size=2, unique=True)):
        label, verdict, way = draw(ways.get(name.removesuffix("_prime"), values.samples(name)))
        given[name] = way({} if name == "cond" and given[name] is None else given[name])
        if verdict == REFUSED and label.startswith("one is") and not batch:
            verdict = EITHER
        call.verdict = max(call.verdict, verdict, key=[SAME, EITHER, REFUSED].index)
        call.told.append(f"{name}: {label}")
    return call


def judge(call):
    result, error = outcome(call, *call.case.modules, given=call.arguments)
    assert error is None or call.verdict != SAME, f"{call.told}: {error!r}"
    assert error is not None or call.verdict != REFUSED, f"{call.told} gives {result}"
    if error is not None or not isinstance(call.student, Giving | type(Ellipsis)):
        return
    want, close = call.expected(), 0.2 if call.verdict == EITHER else 1e-4
    agree(result, want, close)
    if call.verdict == SAME and want.requires_grad and len(want):
        assert result.requires_grad
        agree(*(gradient(loss, call.base) for loss in (result, want)), 1e-3)


def gradient(loss, base):
    """To all of `base` as one vector."""
    found = torch.autograd.grad(loss.sum(), base, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(x).flatten() if g is None else g.flatten() for x, g in zip(base, found, strict=True)]
    )


class Giving(nn.Module):
    """A model with another way to give its prediction."""

    def __init__(self, model, way):
        super().__init__()
        self.model, self.way = model, way

    def forward(self, x, t, **cond):
        return self.way(self.model(x, t, **cond))


@st.composite
def students(draw):
    """Calls of the objective with other students, other outputs, and other values of what is not data."""
    case = cases.case(draw(st.sampled_from(["maps", "maps, split", "maps, autograd", "maps, defaults", "condition"])))
    call = Call(case, list(case.student.parameters()), case.arguments(draw(st.sampled_from([2, 1, 3])), 0))
    kind = draw(st.sampled_from(["output", "model", "reduction", "generator"]))
    if kind == "output":
        label, call.verdict, way = draw(values.outputs())
        call.student = Giving(case.student, way)
    elif kind == "model":
        call.student = draw(
            st.sampled_from(
                [
                    *values.FOREIGN[:-6],
                    nn.Identity(),
                    nn.Module(),
                    nn.ModuleList([case.student]),
                    cases.ConvNet,
                    cases.ConvNet().to("meta"),
                ]
            )
        )
        label, call.verdict = f"{call.student!r}", REFUSED
        if isinstance(call.student, nn.Identity) and call.arguments["cond"] is None:
            call.verdict = EITHER  # it takes anything, and gives x_t
    else:
        label = draw(
            st.sampled_from(
                [
                    v
                    for v in [*values.FOREIGN, *values.NUMBERS]
                    if not isinstance(v, torch.Generator | values.np.ndarray)
                ]
            )
        )
        call.arguments[kind], call.verdict = label, EITHER if label is None and kind == "generator" else REFUSED
    call.told.append(f"{kind}: {label}"[:60])
    return call


@st.composite
def wraps(draw):
    """Calls of `wrap` with other models, schedules and options."""
    model, schedule = cases.ConvNet(), schedules.Linear()
    options = {"prediction": "v_prediction", "layers": "body", "call": Explained(call_model)}
    for name in draw(
        st.lists(st.sampled_from(["model", "schedule", *values.OPTIONS]), min_size=1, max_size=3, unique=True)
    ):
        if name == "model":
            model = draw(st.sampled_from([*values.FOREIGN, *values.models()]))
        elif name == "schedule":
            schedule = draw(st.sampled_from([*values.FOREIGN, *values.schedules()]))
        else:
            options[name] = draw(st.sampled_from(values.OPTIONS[name]))
    return draw(st.sampled_from([PaperObjective, SelfPerceptualObjective])), model, schedule, options


def judge_wrap(call):
    kind, model, schedule, options = call
    modules = [model] if isinstance(model, nn.Module) else []
    objective, error = outcome(lambda: kind.wrap(model, schedule, **options), *modules)
    if error is not None or not isinstance(model, cases.ConvNet):
        return
    clean, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t, t_prime = torch.tensor([[0.3, 0.6], [0.5, 0.2]])
    if objective.schedule.discrete:
        t, t_prime = (1000 * t).long(), (1000 * t_prime).long()
    loss, error = outcome(lambda: objective.loss(noise, clean=clean, noise=noise, t=t, t_prime=t_prime))
    assert error is not None or (loss.ndim == 0 and loss.isfinite()), loss
    loss, error = outcome(lambda: objective(model, clean), model)
    trained = any(parameter.requires_grad for parameter in model.parameters())
    assert error is not None or (loss.requires_grad == trained and loss.isfinite()), loss


PICTURES, STUDENT = torch.ones(2, 3, 4, 4), cases.ConvNet()
METHODS = {
    "add_noise": lambda o, x: o.add_noise(x, PICTURES, torch.ones(2) / 2),
    "add_noise, noise": lambda o, x: o.add_noise(PICTURES, x, torch.ones(2) / 2),
    "add_noise, t": lambda o, x: o.add_noise(PICTURES, PICTURES, x),
    "target": lambda o, x: o.target(x, PICTURES, torch.ones(2) / 2),
    "target, t": lambda o, x: o.target(PICTURES, PICTURES, x),
    "check, model": lambda o, x: o.check(x, PICTURES),
    "check, clean": lambda o, x: o.check(STUDENT, x),
    "check, cond": lambda o, x: o.check(STUDENT, PICTURES, cond=x),
    "set_rng_state": lambda o, x: o.set_rng_state(x),
    "find": lambda o, x: adapters.find(x),
    "read": lambda o, x: adapters.read(x),
    "register": lambda o, x: adapters.register(x, lambda model: None),
    "register, factory": lambda o, x: adapters.register("a.B", x),
    "Adapter, time": lambda o, x: adapters.Adapter(family="a", layers=("b",), time=x),
    "TimmTeacher": lambda o, x: adapters.TimmTeacher(x),
    "DecoderTeacher": lambda o, x: adapters.DecoderTeacher(x),
}


@st.composite
def methods(draw):
    return draw(st.sampled_from(list(METHODS))), draw(
        st.sampled_from([*values.FOREIGN, *values.NUMBERS, *values.NAMES])
    )


def judge_method(call):
    objective = cases.case("maps").objective
    before = objective.rng_state()
    outcome(lambda: METHODS[call[0]](objective, call[1]), *cases.case("maps").modules)
    objective.set_rng_state(before)
    _registry._factories.pop("a.B", None)


FUZZ = {
    "losses": (losses(), judge, 160, 6000), "students": (students(), judge, 40, 1500), "wraps": (wraps(), judge_wrap, 60, 2000),
    "methods": (methods(), judge_method, 40, 500),
}  # fmt: skip
"""What is called, what judges it, and how often: in every run of the tests, and in the slow ones."""
