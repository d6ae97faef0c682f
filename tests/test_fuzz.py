"""Whatever the objective is called with, it gives the loss of Algorithm 1 or refuses it by a sentence of its own."""

import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from fuzz import cases, values
from fuzz.calls import FUZZ, STUDENT, Giving
from fuzz.judge import outcome, refusal
from hypothesis import Phase, given, settings
from paper import PaperObjective
from timm_models import sit
from torch import nn

from perceptual_diffusion import adapters, schedules
from perceptual_diffusion._shapes import map_leaves
from perceptual_diffusion.adapters import _tree as tree
from perceptual_diffusion.adapters import diffusers
from perceptual_diffusion.adapters._explained import Explained


def fuzz(strategy, judge, count, **how):
    settings(max_examples=count, database=None, derandomize=True, **how)(given(strategy)(judge))()


@pytest.mark.parametrize("name", FUZZ)
def test_a_call_is_right_or_refused(name):
    strategy, judge, count, _ = FUZZ[name]
    fuzz(strategy, judge, count)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZ)
def test_ten_thousand_calls_are_right_or_refused(name):
    strategy, judge, _, count = FUZZ[name]
    fuzz(strategy, judge, count, phases=[Phase.generate])


def test_the_slow_calls_are_ten_thousand():
    assert sum(count for *_, count in FUZZ.values()) >= 10_000
    assert sum(count for *_, count, _ in FUZZ.values()) == 300


# --- what the calls found, one by one ---------------------------------------------------------------------------------

IMAGES, SMALL = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 8, 8)
EMPTY, SIT, LISTED = cases.ConvNet().to("meta"), sit(), nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)])})
REFUSED = {
    "t in float8": lambda o: o.add_noise(IMAGES, IMAGES, torch.ones(2).to(torch.float8_e4m3fn)),
    "t in uint16": lambda o: o.add_noise(IMAGES, IMAGES, torch.ones(2).to(torch.uint16)),
    "t that is sparse": lambda o: o.add_noise(IMAGES, IMAGES, torch.ones(2).to_sparse()),
    "a reduction that is an array": lambda o: o(STUDENT, IMAGES, reduction=np.ones(2)),
    "a device that is none": lambda o: o.set_rng_state(torch.Generator().get_state(), "nowhere"),
    "a device that is a number": lambda o: o.set_rng_state(torch.Generator().get_state(), 1.5),
    "a dtype that is a name": lambda o: wrap(teacher_dtype="float16"),
    "an example that is a tensor": lambda o: wrap(example=torch.ones(2, 3)),
    "a call that is none": lambda o: wrap(call=3),
    "a pipeline with numbers for names": lambda o: PaperObjective.wrap(SimpleNamespace(components={1: nn.Identity()}), schedules.Linear()),
    "a model that fails": lambda o: wrap()(cases.case("condition").student, IMAGES),
}  # fmt: skip


def wrap(**options):
    return PaperObjective.wrap(
        STUDENT, **{"schedule": schedules.Linear(), "prediction": "v_prediction", "layers": "body"} | options
    )


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_let_through_to_torch_is_refused(name):
    result, error = outcome(lambda: REFUSED[name](cases.case("maps").objective), STUDENT)
    assert error is not None, result


FOUND = {
    "a batch in float8": (lambda o: o(STUDENT, IMAGES.to(torch.float8_e4m3fn)), "has dtype torch.float8_e4m3fn, expected a floating"),
    "a sparse batch": (lambda o: o(STUDENT, IMAGES.to_sparse()), "has the layout torch.sparse_coo, expected a dense tensor"),
    "a batch on meta": (lambda o: o(STUDENT, IMAGES.to("meta")), "`clean` is on the meta device, where it has no values"),
    "a student on meta": (lambda o: o(EMPTY, IMAGES), "`model` is a ConvNet on the meta device"),
    "a condition on meta": (
        lambda o: cases.case("classes").objective.loss(
            SMALL, clean=SMALL, noise=SMALL, t=torch.tensor([5, 6]), cond={"class_labels": torch.ones(2).long().to("meta")}
        ),
        r"`cond` \{'class_labels': \(2,\)\} has a tensor on the meta device",
    ),
    "no student": (lambda o: o(3, IMAGES), "`model` is 3, expected the student"),
    "a condition that is missing": (
        lambda o: cases.case("condition").objective(cases.case("condition").student, IMAGES),
        r"Shifted cannot be run on a sample of shape \(2, 3, 4, 4\).*`cond` \{\}.*missing 1 required.*'shift'",
    ),
    "a condition of another batch": (
        lambda o: cases.case("text").objective(
            cases.case("text").student, torch.ones(2, 4, 8, 8), cond={"encoder_hidden_states": torch.ones(3, 5, 8)}
        ),
        r"`cond` \{'encoder_hidden_states': \(3, 5, 8\)\}",
    ),
    "two classes of one sample": (
        lambda o: cases.case("classes").objective.loss(
            SMALL[:1], clean=SMALL[:1], noise=SMALL[:1], t=torch.tensor([5]), cond={"class_labels": torch.tensor([0, 1])}
        ),
        r"`cond` has 2 labels in 'class_labels' for a sample of shape \(1, 3, 8, 8\). Pass one for each",
    ),
    "the same in the teacher": (
        lambda o: cases.case("text").objective.loss(
            torch.ones(2, 4, 8, 8), clean=torch.ones(2, 4, 8, 8), noise=torch.zeros(2, 4, 8, 8), t=torch.tensor([5, 6])
        ),
        "`cond` .*missing 1 required positional argument: 'encoder_hidden_states'",
    ),
    "an output that holds itself": (lambda o: o(Giving(STUDENT, values.OUTPUTS["itself"][1]), IMAGES), "`model_pred` has shape .*…"),
    "a scripted model": (lambda o: adapters.find(torch.jit.ScriptModule()), "`model` is a .*without layers to tap"),
    "a layer that is a list": (
        lambda o: tree.check_called(LISTED, ["blocks"]),
        r"`layers` has 'blocks', a ModuleList, which is never called itself. Name a module in it, such as 'blocks.0'",
    ),
    "a condition to join that is no list": (
        lambda o: diffusers._join([torch.ones(2, 3)] * 2, [torch.ones(2, 3)], 1, False), r"`cond\['concat'\]` is .*a list of 2 tensors",
    ),
    "a SiT, of which there are two signs": (
        lambda o: PaperObjective.wrap(SIT, FlowMatchEulerDiscreteScheduler()),
        "the family SiT differ in what they predict. Pass `prediction='-flow_prediction'` or `prediction='flow_prediction'`",
    ),
    "a variance of a 1-D convolution": (
        lambda o: o.loss(torch.ones(2, 8, 6), clean=torch.ones(2, 4, 6), noise=torch.ones(2, 4, 6), t=torch.ones(2) / 2),
        r"If half of it is a variance, pass `output=lambda output, x_t: output.narrow\(1, 0, 4\)`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_refused_by_name(name):
    call, message = FOUND[name]
    _, error = outcome(lambda: call(cases.case("maps").objective), STUDENT)
    assert error is not None
    assert re.search(message, str(error)), error


class Own(ValueError):
    """An exception of a model's own, which its user waits for."""


def test_errors_of_the_models_own_and_of_memory_stay_what_they_are():
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        of_a_cpu = error
    for error in (
        torch.OutOfMemoryError("full"),
        of_a_cpu,
        Own("mine"),
        KeyboardInterrupt(),
        StopAsyncIteration("mine"),
    ):

        def fail(model, x_t, t, cond, error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            Explained(fail)(STUDENT, IMAGES, torch.ones(2), {})
        assert caught.value is error


def test_a_pass_that_fails_in_torch_is_a_runtime_error_too():
    with pytest.raises(RuntimeError, match="inconsistent tensor size") as caught:
        Explained(lambda *args: torch.ones(2) @ torch.ones(3))(STUDENT, IMAGES, torch.ones(2), {})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value.__cause__, RuntimeError)


@dataclass
class Counting:
    """A sampler of times that counts."""

    calls: int = 0

    def __call__(self, schedule, like, /, *, t, generator):
        self.calls += 1
        return torch.rand(len(like), generator=generator) * 0.8 + 0.1


def test_check_leaves_a_sampler_that_counts_where_it_was():
    sampler, model = Counting(), cases.ConvNet()
    objective = PaperObjective.wrap(
        model, schedules.Linear(), prediction="v_prediction", layers="body", t=sampler, t_prime=sampler
    )
    objective.check(model, torch.randn(4, 3, 6, 6))
    assert sampler.calls == 0
    objective(model, torch.randn(4, 3, 6, 6))
    assert sampler.calls == 2


def test_a_call_that_succeeds_is_not_described():
    """What a call is given is put into words only where it fails."""

    class Silent(dict):
        def items(self):
            raise AssertionError("looked at")

    out = Explained(lambda model, x_t, t, cond: x_t)(STUDENT, IMAGES, torch.ones(2), Silent(a=1))
    assert out is IMAGES


def test_the_judge_tells_a_refusal_from_a_crash():
    def raised(call):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call()
        return refusal(caught.value)

    assert raised(lambda: torch.ones(2) + torch.ones(3)).startswith("it is a RuntimeError")
    assert raised(lambda: int("a")).startswith("it comes from")
    assert raised(lambda: map_leaves(torch.add, (IMAGES,), (IMAGES, IMAGES))).startswith("no `raise` made it")
    assert not raised(lambda: adapters.find(3))
    x = torch.ones(2)
    with pytest.raises(AssertionError, match=r"left behind: \['random streams'\]"):
        outcome(lambda: torch.rand(1))
    with pytest.raises(AssertionError, match=r"left behind: \['modules'\]"):
        outcome(lambda: SIT.train(not SIT.training), SIT)
    with pytest.raises(AssertionError, match="an argument was written to"):
        outcome(lambda: x.add_(1), given=[x])
