"""Why the objective helps or not: spectra, a teacher's sight and gradients against what is worked out by hand; the command."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_fidelity")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/evidence"))

import _bases
import _why
import run
import why
from _bases import BASES
from _plan import RECIPES
from paper import PaperObjective

from perceptual_diffusion import schedules


def wave(row, column, size=32):
    """A picture of one spatial frequency, shape (1, 1, H, W)."""
    place = torch.arange(size) * (2 * math.pi / size)
    return torch.cos(row * place[:, None] + column * place[None])[None, None]


# --- spectra --------------------------------------------------------------------------------------------------------------


def test_the_power_of_a_picture_sums_to_its_mean_square():
    images = torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    spectrum = _why.power(images)
    assert torch.allclose(spectrum.sum((1, 2)), images.square().mean((1, 2, 3)))
    assert torch.allclose(_why.by_band(spectrum).sum(1), images.square().mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("row", "column", "ring", "band"),
    [(0, 0, 0, 0), (1, 0, 1, 1), (0, 2, 2, 1), (2, 1, 2, 2), (3, 4, 5, 3), (0, 16, 16, 4), (12, 12, 17, 5), (16, 16, 23, 5)],
)  # fmt: skip
def test_a_wave_lies_in_the_ring_and_the_band_of_its_frequency(row, column, ring, band):
    picture = wave(row, column)
    spectrum = _why.power(picture)[0]
    rings = _why.rings(spectrum)
    assert rings.argmax() == ring
    members = sum(round(math.hypot(min(i, 32 - i), min(j, 32 - j))) == ring for i in range(32) for j in range(32))
    assert float(rings[ring]) == pytest.approx(float(picture.square().mean()) / members, rel=1e-5)
    assert _why.by_band(spectrum).argmax() == band
    parts = _why.split(picture)
    assert torch.allclose(parts[band], picture, atol=1e-5)
    assert torch.allclose(parts.sum(0), picture, atol=1e-5)


def test_noise_has_the_same_power_in_every_ring():
    images = torch.randn(400, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        _why.rings(_why.power(images).mean(0)) * 1024, torch.ones(24), atol=0.35
    )  # the corner is one place


# --- the grid -------------------------------------------------------------------------------------------------------------


def test_a_flat_spectrum_has_no_grid():
    point = torch.zeros(1, 1, 32, 32)
    point[0, 0, 5, 7] = 1
    assert [_why.grid(_why.power(point)[0], period) for period in (2, 4, 8)] == pytest.approx([1, 1, 1], rel=1e-4)


@pytest.mark.parametrize("period", [2, 4, 8])
def test_a_grid_stands_out_at_its_own_period_alone(period):
    comb = torch.zeros(1, 1, 32, 32)
    comb[..., ::period, ::period] = 1  # equal power (period)^-4 at all multiples of 32 / period
    spectrum = _why.power(comb)[0] + 1e-6
    expected = {p: (period**-4 + 1e-6) / 1e-6 if p <= period else 1.0 for p in (2, 4, 8)}
    assert {p: _why.grid(spectrum, p) for p in (2, 4, 8)} == pytest.approx(expected, rel=1e-3)


def test_one_frequency_of_a_grid_counts_as_one_of_its_three():
    spectrum = torch.ones(32, 32)
    spectrum[16, 0] = 8
    assert _why.grid(spectrum, 2) == pytest.approx(2)  # 8 ** (1 / 3): the others are (0, 16) and (16, 16)
    spectrum[16, 1] = 100  # off the axis, where pictures have less power for other reasons
    assert _why.grid(spectrum, 2) == pytest.approx(2)
    spectrum[15, 0] = 3
    assert _why.grid(spectrum, 2) == pytest.approx((8 / 2) ** (1 / 3))  # beside it now 3 and 1


# --- times, errors --------------------------------------------------------------------------------------------------------


def test_times_lie_in_their_bands():
    t = _why.times(schedules.Linear(scale=1000), 10, 50, torch.Generator().manual_seed(0))
    assert torch.equal((t // 100).long(), torch.arange(10)[:, None].expand(10, 50))
    discrete = _why.times(
        schedules.Discrete(alpha_bar=torch.linspace(0.99, 0.01, 20)), 10, 50, torch.Generator().manual_seed(0)
    )
    assert torch.equal(discrete // 2, torch.arange(10)[:, None].expand(10, 50))


class Off(torch.nn.Module):
    """Predicts `scale` of the noise where the flow is asked for; of a clean sample of 0 the noise is the flow."""

    def __init__(self, scale):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def forward(self, x, t, class_labels=None):
        return self.scale * x / t[:, None, None, None]


def linear(features, **options):
    """An objective on the straight path whose teacher is linear."""
    return PaperObjective(
        schedule=schedules.Linear(), prediction="flow_prediction", teacher=lambda x, t, cond: [features(x)], seed=0, **options
    )  # fmt: skip


@pytest.fixture
def batch():
    noise = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"clean": torch.zeros_like(noise), "noise": noise, "cond": {}, "t": torch.linspace(0.1, 0.9, 6)}


def test_the_error_of_the_clean_sample_is_sigma_times_that_of_the_flow(batch):
    of_flow, of_clean = _why.errors(linear(torch.clone), Off(1.5), **batch)
    assert torch.allclose(of_flow, 0.5 * batch["noise"], atol=1e-5)
    assert torch.allclose(of_clean, -batch["t"][:, None, None, None] * 0.5 * batch["noise"], atol=1e-5)


def test_the_clean_sample_of_a_prediction_has_that_error(batch):
    objective, model = linear(torch.clone), Off(1.5)
    x_t = batch["t"][:, None, None, None] * batch["noise"]
    found = _why.clean_hat(objective, x_t, model(x_t, batch["t"]), batch["t"])
    assert torch.allclose(found, _why.errors(objective, model, **batch)[1], atol=1e-5)


# --- the teacher's sight, and the gradients -------------------------------------------------------------------------------


def lowest(x):
    """What is below a frequency of 3 in the pixels of a model's sample."""
    return torch.nn.functional.pixel_unshuffle(_why.split(_why.pixels(x))[:2].sum(0), 2)


def test_a_teacher_that_sees_coarse_errors_is_found_to_see_only_those():
    picture = torch.randn(5, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    parts = torch.stack([torch.nn.functional.pixel_unshuffle(part, 2) for part in _why.split(picture)])
    x = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    found = _why.seen(lambda x: [2 * lowest(x), lowest(x)], x, parts, size=0.1)
    expected = torch.tensor([5.0, 5, 0, 0, 0, 0])[:, None].expand(6, 5)  # 2² + 1², whatever the size of the part
    assert torch.allclose(found, expected, atol=1e-3)


def test_gradients_of_a_teacher_that_sees_everything_are_those_of_mse_times_kappa_squared(batch):
    class At:
        def __call__(self, schedule, like, *, t, generator):
            return 1 - t

    objective, model = linear(torch.clone, t_prime=At()), Off(1.5)
    to_prediction, to_weights = _why.gradients(objective, model, **batch, generator=torch.Generator().manual_seed(0))
    kappa = 1 - 2 * batch["t"]  # t' - t, on the straight path
    assert torch.allclose(to_prediction[1], 2 * 0.5 * batch["noise"] / 1024, atol=1e-7)
    assert torch.allclose(to_prediction[0], kappa[:, None, None, None] ** 2 * to_prediction[1], atol=1e-7)
    square = batch["noise"].square().mean((1, 2, 3))  # d MSE / d scale = 2 (scale - 1) times this
    assert to_weights.flatten().tolist() == pytest.approx(
        [float((kappa**2 * square).sum()), float(square.sum())], rel=1e-4
    )


def test_the_gradient_has_no_energy_where_the_teacher_does_not_see(batch):
    to_prediction, _ = _why.gradients(linear(lowest), Off(1.5), **batch, generator=torch.Generator().manual_seed(0))
    of_sp, of_mse = (_why.by_band(_why.power(_why.pixels(g)).sum(0)) for g in to_prediction)
    assert of_sp[2:].sum() < 1e-6 * of_sp.sum()
    assert of_mse[2:].sum() > 0.9 * of_mse.sum()


def test_the_cosine_is_that_of_the_angle():
    assert _why.cosine(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.6)


# --- where the two losses have their minimum ------------------------------------------------------------------------------


def origins_of(batch, count=5):
    """Origins of each x_t of a batch, and the noise that makes x_t of them, shape (B, K, C, H, W) each."""
    t = batch["t"][:, None, None, None, None]
    clean = torch.randn(6, count, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    return clean, ((t * batch["noise"][:, None]) - (1 - t) * clean) / t


def test_nothing_is_left_of_the_gradient_of_a_linear_teacher(batch):
    pairs, t = origins_of(batch), batch["t"]
    found = _why.left(linear(lowest), *pairs, t, (t + 0.3).clamp(max=1), {})
    assert torch.allclose(found, torch.zeros(6, dtype=torch.float64), atol=1e-9)


def test_something_is_left_where_the_teacher_bends_and_less_where_it_is_asked_near(batch):
    """A square bends as much everywhere: the part that is left falls with the square of t' − t."""
    t = torch.full((6,), 0.5)
    pairs = origins_of(batch | {"t": t})
    far, near, nearest = (
        _why.left(linear(lambda x: x + x.square()), *pairs, t, t + by, {}) for by in (0.4, 0.04, 0.004)
    )
    assert (far > 0.01).all()
    assert torch.allclose(near / nearest, torch.full((6,), 100.0, dtype=torch.float64), rtol=0.2)


def test_an_x_t_of_one_origin_says_nothing(batch):
    t = torch.full((6,), 0.5)
    clean, noise = (x[:, :1].expand(-1, 5, -1, -1, -1) for x in origins_of(batch | {"t": t}))
    one = _why.left(linear(torch.square), clean, noise, t, t + 0.3, {})
    assert one.isnan().all()  # without a rounding error that all share, which would be 1
    found = _why._mean_and_error([torch.cat([one, torch.tensor([0.1, 0.3])])])
    assert found["mean"] == pytest.approx([0.2])
    assert found["error"] == pytest.approx([0.1])


class Known(torch.nn.Module):
    """Predicts the flow of data from N(0, 1) per place: of x_t the mean of ε − x_0 is (t − (1 − t)) x_t / ((1 − t)² + t²)."""

    def forward(self, x, t, class_labels=None):
        t = t[:, None, None, None]
        return (2 * t - 1) / ((1 - t) ** 2 + t**2) * x


@pytest.mark.parametrize("time", [0.3, 0.7, 1.0])
def test_origins_are_drawn_from_the_posterior(time):
    t = torch.full((400,), time)
    x_t = torch.ones(400, 4, 8, 8)
    found = _why.origins(linear(torch.clone), Known(), x_t, t, {}, 200, torch.Generator().manual_seed(0))
    variance = (1 - time) ** 2 + time**2
    assert float(found.mean()) == pytest.approx((1 - time) / variance, abs=0.02)
    assert float(found.var()) == pytest.approx(time**2 / variance, rel=0.06)


# --- the command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fashion-unet", "fashion-dit-flow"])
def test_the_command_measures_and_draws(name, tmp_path, monkeypatch, capsys):
    base = replace(BASES[name], dataset="digits", batch=4)
    monkeypatch.setattr(_bases.Base, "read", lambda self: self.build())
    monkeypatch.setattr(why, "BASES", {name: base})
    for constant, small in {
        "STEPS": 3,
        "SHOWN": 3,
        "TIMES": 3,
        "RANKS": (0.1, 0.9),
        "DRAWS": 3,
        "ANCESTRAL": 3,
    }.items():
        monkeypatch.setattr(_why, constant, small)
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(run, "RECIPES", {k: replace(r, steps=min(r.steps, 2)) for k, r in RECIPES.items()})
    arguments = ["base", "sp", "--model", name, "--n", "4", "--out", str(tmp_path / "out")]
    why.main(arguments)
    found = json.loads((tmp_path / "out/why.json").read_text())[name]
    assert found["command"] == "python benchmarks/evidence/why.py " + " ".join(arguments)
    assert {"n", "seed", "hardware", "date", "commit", "torch"} <= set(found)
    images = {"held out", "training", "base", "base, guidance 3", "sp"}
    assert set(found["spectra"]["power"]) == set(found["spectra"]["grid"]) == images
    loss = found["losses"]["by time"]
    assert loss["base"]["ratio prediction"] == [1] * 3
    assert loss["base"]["error of ratio prediction"] == [0] * 3
    assert loss["sp"]["ratio prediction"] != [1] * 3
    energy = found["losses"]["by frequency"]["sp"]
    assert [sum(row) for row in energy] == pytest.approx(loss["sp"]["clean"], rel=1e-3)
    assert sum(found["unseen"]["share"]) == pytest.approx(1, rel=1e-3)
    for values in found["gradients"].values():
        assert all(-1 <= c <= 1 for key in ("cosine", "repeat of sp", "repeat of mse") for c in values[key])
        assert [sum(row) for row in values["share of sp"]] == pytest.approx([1] * 3, rel=1e-3)
    drawn = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {f"evidence_{name}_{part}.png" for part in ("trajectory", "spectrum", "errors", "teacher", "left")}
    for values in found["left"].values():
        assert all(0 <= x <= 1 for x in values["mean"])


def test_numbers_lie_on_a_line_and_are_no_more_precise_than_they_are():
    written = why.text({"a": torch.tensor([[1.23456789, 2.0], [3.0, 4.0]]), "b": "x [1,  2]", "c": 7})
    assert written == '{\n "a": [\n  [ 1.2346, 2.0 ],\n  [ 3.0, 4.0 ]\n ],\n "b": "x [1,  2]",\n "c": 7\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        why.text({"a": math.nan})
