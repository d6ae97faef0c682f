"""Set-ups that looked right and trained nothing, or the wrong thing: each is right here, or refused."""

import pytest
import torch
from diffusers import EDMEulerScheduler
from models import ConvNet, dit, unet
from paper import PaperObjective
from torch import nn
from torch.optim.swa_utils import AveragedModel

from perceptual_diffusion import schedules, taps
from perceptual_diffusion.adapters import _registry

LABELS = {"class_labels": torch.tensor([0, 1])}


def times_given(objective, model, t):
    """The times that the model itself is given for times t of the schedule."""
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    objective(model, torch.randn(2, 3, 16, 16), cond=LABELS, t=t)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("schedule", [schedules.Linear(), schedules.Linear(scale=1000), schedules.Cosine()])
def test_a_family_that_wants_0_to_1000_gets_that_on_every_path(schedule):
    model = unet()
    objective = PaperObjective.wrap(model, schedule, prediction="v_prediction")
    t = torch.tensor([0.25, 0.75]) * schedule.high
    torch.testing.assert_close(times_given(objective, model, t), torch.tensor([250.0, 750.0]))


def test_indices_and_calls_of_the_users_own_are_left_alone():
    model = unet()
    objective = PaperObjective.wrap(model, schedules.Discrete.linear(), prediction="epsilon")
    assert times_given(objective, model, torch.tensor([3, 999])).tolist() == [3, 999]
    seen = []

    def call(model, x_t, t, cond):
        seen.append((x_t, t))
        return model(x_t, t, **cond)

    clean, noise = torch.randn(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    objective = PaperObjective.wrap(model, EDMEulerScheduler(), call=call)
    objective(model, clean, cond=LABELS, noise=noise, t=torch.tensor([50.0, 2.0]))
    assert torch.equal(seen[0][0], clean)
    assert seen[0][1].tolist() == [50.0, 2.0]


def test_a_family_whose_time_cannot_be_told_is_refused():
    with pytest.raises(
        ValueError, match="`call` is missing: models of the family UNet2DModel take a time as 'timestep'"
    ):
        PaperObjective.wrap(unet(), schedules.EDM(), prediction="v_prediction")


def test_a_family_is_given_its_own_time_on_a_path_that_begins_with_noise():
    model, seen = unet(), []
    schedule = schedules.Interpolant(lambda t: t, lambda t: 1 - t)
    objective = PaperObjective.wrap(model, schedule, prediction="v_prediction")
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True)
    objective(model, torch.randn(2, 3, 16, 16), cond=LABELS, t=torch.tensor([0.25, 1.0]))
    assert seen[0].tolist() == [750.0, 0.0]


def objective_of(teacher, **options):
    return PaperObjective(
        schedule=schedules.Linear(), prediction="v_prediction", teacher=teacher, call=lambda m, x, t, c: m(x), **options
    )


@pytest.mark.parametrize(
    "teacher",
    [torch.no_grad()(lambda x, t, cond: [x * 2]), lambda x, t, cond: [x.detach()], lambda x, t, cond: [x.long()]],
)
def test_a_teacher_without_a_gradient_is_refused_also_beside_the_mse(teacher):
    model = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="gives no gradient to the sample"):
        objective_of(teacher, mse_weight=1.0)(model, torch.randn(2, 3, 4, 4))
    with torch.no_grad():
        assert objective_of(teacher, mse_weight=1.0)(model, torch.randn(2, 3, 4, 4)).isfinite()


def test_a_teacher_on_another_device_says_how_to_move_it():
    model = ConvNet()
    objective = PaperObjective.wrap(model, schedules.Linear(), prediction="v_prediction", layers="body")
    objective.to("meta")
    with pytest.raises(ValueError, match=r"the teacher is on meta, expected cpu.*`objective.to\('cpu'\)`"):
        objective(model, torch.randn(2, 3, 6, 6))


def test_a_part_compiled_on_its_own_is_unwrapped_in_the_copy():
    model, x, t = ConvNet(), torch.randn(2, 3, 6, 6), torch.tensor([0.2, 0.7])
    options = {"prediction": "v_prediction", "layers": "body"}
    plain = PaperObjective.wrap(model, schedules.Linear(), **options)
    model.body = torch.compile(model.body, backend="eager")
    objective = PaperObjective.wrap(model, schedules.Linear(), **options)
    assert not any("_orig_mod" in module._modules for module in objective.teacher.module.modules())
    assert torch.equal(objective.teacher(x, t, {})[0], plain.teacher(x, t, {})[0])


def test_averaged_weights_are_a_teacher():
    model = ConvNet()
    averaged = AveragedModel(model)
    assert taps.unwrap(averaged) is averaged.module
    objective = PaperObjective.wrap(
        model, schedules.Linear(), prediction="v_prediction", layers="body", teacher=averaged
    )
    assert objective(model, torch.randn(2, 3, 6, 6)).requires_grad


@pytest.mark.parametrize(
    ("state", "error"),
    [("abc", TypeError), (torch.zeros(3, dtype=torch.uint8), ValueError), (torch.zeros(3), ValueError)],
)
def test_a_state_of_no_generator_is_refused(state, error):
    with pytest.raises(error, match="`state` is"):
        objective_of(lambda x, t, cond: [x]).set_rng_state(state)


@pytest.mark.parametrize("gives", [None, 3, [], [None]])
def test_a_teacher_that_gives_no_features_is_named_also_in_training(gives):
    with pytest.raises(TypeError, match="`teacher` gives"):
        objective_of(lambda x, t, cond: gives)(nn.Conv2d(3, 3, 1), torch.randn(2, 3, 4, 4))


def test_a_known_family_keeps_its_output_beside_layers_and_a_call_given_by_hand():
    model, clean = dit(), torch.randn(2, 4, 8, 8)
    objective = PaperObjective.wrap(
        model,
        schedules.Discrete.linear(),
        prediction="epsilon",
        layers=["transformer_blocks.0"],
        call=lambda m, x, t, c: m(x, timestep=t, **c),
    )
    loss = objective(model, clean, cond=LABELS)  # the model also gives a variance: eight channels for four
    loss.backward()
    assert float(model.proj_out_2.weight.grad.abs().sum()) > 0


def test_a_broken_plug_in_is_not_taken_for_a_missing_one(monkeypatch):
    class Broken:
        name, value = "mine", "mine:register"

        def load(self):
            raise ImportError("no such module")

    monkeypatch.setattr(_registry, "entry_points", lambda group: [Broken()])
    monkeypatch.setattr(_registry, "_loaded_entry_points", False)
    with pytest.raises(ValueError, match=r"'mine:register' .* cannot be loaded: no such module"):
        PaperObjective.wrap(ConvNet(), schedules.Linear(), prediction="v_prediction", layers="body")
