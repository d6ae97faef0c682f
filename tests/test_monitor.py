"""What is logged of a run agrees with the losses it is made from."""

import pytest
import torch
from models import ConvNet
from paper import PaperObjective

from perceptual_diffusion import Monitor, schedules

DISCRETE = schedules.Discrete.scaled_linear().zero_terminal_snr()


def at(model, x_t, t, cond):
    return model(x_t, t / 1000)


def wrap(schedule=DISCRETE, **options):
    model = ConvNet()
    given = {"prediction": "v_prediction", "layers": ["body"], "seed": 0, "call": at} | options
    return model, PaperObjective.wrap(model, schedule, **given)


def test_means_agree_with_the_terms_of_the_calls():
    model, objective = wrap()
    monitor, seen = Monitor(objective, bands=2), []
    for times in ([0, 499, 500], [999, 10, 20]):
        t = torch.tensor(times)
        objective(model, torch.randn(3, 3, 8, 8), t=t)
        monitor.update()
        seen.append((t, *objective.terms.values()))
    t, sp, mse = (torch.cat(column) for column in zip(*seen, strict=True))
    found = monitor.pop()
    early = t < 500
    expected = {
        "sp": sp, "mse": mse, "sp/t 0 to 499": sp[early], "mse/t 0 to 499": mse[early],
        "sp/t 500 to 999": sp[~early], "mse/t 500 to 999": mse[~early],
    }  # fmt: skip
    assert found == pytest.approx({name: float(value.mean()) for name, value in expected.items()})
    assert list(found) == list(expected)


def test_a_reading_starts_anew_and_empty_bands_are_left_out():
    model, objective = wrap()
    monitor = Monitor(objective)
    objective(model, torch.randn(2, 3, 8, 8), t=torch.tensor([0, 1]))
    monitor.update()
    assert set(monitor.pop()) == {"sp", "mse", "sp/t 0 to 249", "mse/t 0 to 249"}
    assert monitor.pop() == {}


def test_the_times_of_the_last_call_can_be_read():
    model, objective = wrap()
    t, t_prime = torch.tensor([3, 4]), torch.tensor([5, 6])
    objective(model, torch.randn(2, 3, 8, 8), t=t, t_prime=t_prime)
    assert objective.times["t"].tolist() == [3, 4]
    assert objective.times["t_prime"].tolist() == [5, 6]


@pytest.mark.parametrize(
    ("schedule", "prediction", "labels"),
    [
        (schedules.Linear(), "flow_prediction", ["0 to 0.5", "0.5 to 1"]),
        (schedules.Linear(scale=1000), "flow_prediction", ["0 to 500", "500 to 1000"]),
        (schedules.EDM(), "sample", ["0.002 to 0.3012", "0.3012 to 80"]),
    ],
)
def test_bands_are_named_in_the_unit_of_the_schedule(schedule, prediction, labels):
    model, objective = wrap(schedule, prediction=prediction)
    monitor = Monitor(objective, bands=2)
    objective(model, torch.randn(64, 3, 8, 8))
    monitor.update()
    assert [name.removeprefix("sp/t ") for name in monitor.pop() if name.startswith("sp/")] == labels


def test_no_bands_leave_the_two_means():
    model, objective = wrap()
    monitor = Monitor(objective, bands=0)
    objective(model, torch.randn(2, 3, 8, 8))
    monitor.update()
    assert set(monitor.pop()) == {"sp", "mse"}


def test_updating_before_a_loss_is_refused():
    with pytest.raises(ValueError, match="after the loss"):
        Monitor(wrap()[1]).update()


@pytest.mark.parametrize("bands", [-1, 2.0, True, "four"])
def test_a_wrong_number_of_bands_is_refused(bands):
    with pytest.raises(ValueError, match="whole number of at least 0"):
        Monitor(wrap()[1], bands=bands)


def test_the_size_of_features_is_that_of_the_teacher_and_changes_nothing():
    model, objective = wrap(layers=["body", "head"])
    clean = torch.randn(4, 3, 8, 8)
    objective(model, clean)
    before, terms = objective.rng_state(), objective.terms
    found = (monitor := Monitor(objective)).features(clean)
    assert set(found) == {"features/body", "features/head"}
    assert monitor.features(clean) == found
    assert torch.equal(objective.rng_state(), before)
    assert objective.terms is terms
    with torch.no_grad():
        for parameter in objective.teacher.module.body.parameters():
            parameter.mul_(3)
    grown = monitor.features(clean)
    assert grown["features/body"] > 1.5 * found["features/body"]


def test_features_can_be_measured_before_the_first_loss():
    model, objective = wrap()
    clean = torch.randn(4, 3, 8, 8)
    first = Monitor(objective).features(clean)
    objective(model, clean).backward()
    assert Monitor(objective).features(clean) == first
    assert float(model.stem.weight.grad.abs().sum()) > 0


def test_an_empty_batch_leaves_nothing_to_read():
    model, objective = wrap()
    monitor = Monitor(objective)
    objective(model, torch.randn(2, 3, 8, 8))
    objective(model, torch.randn(0, 3, 8, 8))
    monitor.update()
    assert monitor.pop() == {}
