"""The layer probe: each measurement against a layer whose answer is known, and what a probe is as an object."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from diffusers import DDIMScheduler
from models import ConvNet, TwoStreams, conditional_unet, dit, unet
from paper import PaperObjective
from torch import nn
from zoo import build

from perceptual_diffusion import parameterizations, schedules
from perceptual_diffusion.inspection import Probe, probe_layers
from perceptual_diffusion.inspection.measure import Setting
from perceptual_diffusion.inspection.perturb import dot, of_norm, perturbations

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

LINEAR = {"schedule": schedules.Linear(), "prediction": "flow_prediction"}


class Layered(nn.Module):
    """Its one layer sees the noisy sample itself; its prediction is as wrong in every channel."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, t):
        self.layer(x)
        return 0.1 * x


class Same(nn.Module):
    def forward(self, x):
        return x.clone()


class Loud(nn.Module):
    """One channel a hundred times as loud as the others, and far from zero."""

    def forward(self, x):
        return x * torch.tensor([100.0, 1, 1, 1]).view(-1, 1, 1)


class Mean(nn.Module):
    """Every channel is the mean of all: rank 1."""

    def forward(self, x):
        return x.mean(1, keepdim=True).expand_as(x)


class Smooth(nn.Module):
    """The mean of 3 x 3 places: white noise is averaged away."""

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Edges(nn.Module):
    """What smoothing takes away."""

    def forward(self, x):
        return x - Smooth()(x)


class Constant(nn.Module):
    """Features that do not depend on the sample."""

    def forward(self, x):
        return torch.ones_like(x) + 0 * x.detach()


def row(layer, clean=None, **options):
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(6, 4, 8, 8, generator=generator) if clean is None else clean
    probe = probe_layers(Layered(layer), clean, layers=["layer"], **LINEAR | options)
    return probe.rows[0]


def pictures(count=6):
    """Smooth pictures of one bright block each."""
    clean = torch.full((count, 4, 16, 16), -1.0)
    for i in range(count):
        clean[i, :, i : i + 8, i + 1 : i + 9] = 1.0
    return clean


# --- features ---------------------------------------------------------------------------------------------------------


def test_a_loud_channel_holds_the_energy():
    found = row(Loud())
    assert found.channels == 4
    assert found.outlier == pytest.approx(1e4 / (1e4 + 3), rel=1e-2)
    assert row(Same()).outlier == pytest.approx(0.25, rel=0.2)


def test_the_scale_is_the_root_mean_square():
    assert row(Same(), clean=torch.zeros(64, 4, 8, 8), bands=1).scale == pytest.approx(math.sqrt(1 / 3), rel=0.05), (
        "E t²"
    )
    assert row(Loud()).scale == pytest.approx(row(Same()).scale * math.sqrt((1e4 + 3) / 4), rel=0.02)


def test_the_effective_rank_is_one_of_equal_channels_and_all_of_independent_ones():
    assert row(Mean()).rank == pytest.approx(1 / 4, rel=1e-3)
    assert row(Same()).rank == pytest.approx(1, rel=0.05)


def test_the_rank_is_of_what_varies_however_far_from_zero():
    class Offset(nn.Module):
        def forward(self, x):
            return x + 1e3

    found = row(Offset())
    assert found.rank == pytest.approx(row(Same()).rank, rel=1e-2)
    assert found.scale == pytest.approx(1e3, rel=1e-2)


# --- sensitivity ------------------------------------------------------------------------------------------------------


def test_a_layer_that_copies_the_sample_answers_to_everything_alike():
    found = row(Same(), clean=pictures())
    assert set(found.sensitivity) == {"error", "blur", "shift", "occlusion"}
    for kind, values in found.sensitivity.items():
        assert values == pytest.approx([1.0] * 4, rel=1e-3), kind
    assert found.structure == pytest.approx(1.0, rel=1e-3)


def test_a_layer_that_smooths_answers_to_structure_and_one_that_finds_edges_to_noise():
    smooth, edges = row(Smooth(), clean=pictures()), row(Edges(), clean=pictures())
    assert smooth.structure > 2
    assert edges.structure < 0.7
    assert min(smooth.sensitivity["occlusion"]) > 3 > max(edges.sensitivity["occlusion"])


def test_the_ranking_puts_structure_before_noise():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Edges(), Same(), Smooth()])

        def forward(self, x, t):
            return sum(layer(x) for layer in self.layers)

    names = [f"layers.{i}" for i in range(3)]
    probe = probe_layers(Three(), pictures(), layers=names, **LINEAR)
    assert [r.name for r in probe.rows] == names
    assert probe.ranking == names[::-1]


def test_changes_are_what_they_are_called():
    clean = pictures(3)
    changes = perturbations(clean, torch.ones_like(clean), None, torch.Generator().manual_seed(0))
    assert torch.equal(changes["error"], torch.ones_like(clean))
    moved = clean + changes["shift"]
    assert torch.equal(moved[..., :-1, :-1], clean[..., 1:, 1:])
    occluded = clean + changes["occlusion"]
    changed = (changes["occlusion"] != 0).any(1)
    assert [int(place.sum()) for place in changed] == [64] * 3, "a block of half the height and half the width"
    assert occluded[changed[:, None].expand_as(clean)].unique().tolist() == [-0.5], (
        "the mean of a quarter 1 and the rest -1"
    )
    blurred = clean + changes["blur"]
    assert blurred.var() < clean.var()
    assert float(blurred.sum()) == pytest.approx(float(clean.sum()), rel=1e-4)


def test_a_changed_sample_is_the_clean_one_changed_and_noised_as_before():
    clean = pictures()
    objective = PaperObjective.wrap(ConvNet(channels=4), layers="body", **LINEAR)
    generator = torch.Generator().manual_seed(0)
    setting = Setting(base=objective, clean=clean, cond={}, bands=1, spatial=None, generator=generator)
    at = setting.round(objective.teacher.module, 0, 0.2, 0.9)
    alpha = (1 - at.t).view(-1, 1, 1, 1)
    assert torch.allclose(at.x_t, alpha * clean + (1 - alpha) * at.noise, atol=1e-6)
    found = parameterizations.convert(
        at.predicted, at.x_t, at.t, schedule=objective.schedule, source="flow_prediction", to="sample"
    )
    shift = perturbations(clean, clean, None, generator)["shift"]
    for kind, change in {"error": found - clean, "shift": shift}.items():
        structured, white = at.changed[kind]
        assert torch.allclose(structured, at.x_t + alpha * change, atol=1e-4)
        assert torch.allclose(*((x - at.x_t).flatten(1).norm(dim=1) for x in (structured, white)), rtol=1e-4)


def test_changes_are_compared_at_one_norm():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 5) * torch.tensor([0.0, 2.0, 30.0]).view(-1, 1, 1)
    assert torch.allclose(of_norm(a, b).flatten(1).norm(dim=1), b.flatten(1).norm(dim=1))
    pair = {"x": a, "y": b}
    assert torch.allclose(dot(pair, pair), a.square().sum((1, 2)) + b.square().sum((1, 2)))
    assert torch.allclose(dot(list(a), list(b)), dot(a, b))


@pytest.mark.parametrize(
    ("shape", "spatial", "kinds"), [((3, 7), None, 1), ((3, 7, 2), None, 4), ((3, 2, 7), None, 4), ((3, 2, 7), (), 1)]
)
def test_only_what_has_space_is_blurred(shape, spatial, kinds):
    changes = perturbations(torch.randn(shape), torch.zeros(shape), spatial, torch.Generator())
    assert len(changes) == kinds
    if kinds == 4:
        long = shape.index(7)
        assert bool(changes["shift"].movedim(long, 0)[:-1].any())
        assert not bool(changes["shift"].movedim(long, 0)[-1].any()), "the last place stays"


# --- gradients --------------------------------------------------------------------------------------------------------


def apart(by):
    """t' at a fixed distance from t: on the straight path κ = t' − t."""
    return lambda schedule, like, /, *, t, generator: torch.where(t < 0.5, t + by, t - by)


@pytest.mark.parametrize("by", [0.1, 0.4])
def test_the_gradient_through_a_layer_that_copies_is_that_of_mse_times_kappa_squared(by):
    found = row(Same(), t_prime=apart(by))
    assert found.gradient == pytest.approx([by**2] * 4, rel=1e-3)
    assert found.cosine == pytest.approx([1.0] * 4, abs=1e-4)


def test_the_gradient_through_a_loud_channel_points_along_it():
    found = row(Loud(), t_prime=apart(0.1))
    assert found.cosine == pytest.approx([0.5] * 4, abs=0.1), "one of four equal channels"
    assert found.gradient == pytest.approx([0.01 * 1e4 / 2] * 4, rel=0.2)


def test_at_t_prime_equal_to_t_there_is_no_gradient_and_no_cosine():
    found = row(Same(), t_prime=lambda schedule, like, /, *, t, generator: t)
    assert found.gradient == (0.0,) * 4
    assert found.cosine == (None,) * 4


def test_the_distance_is_that_of_the_gradient():
    mse, mae = (row(Same(), t_prime=apart(0.1), distance=distance) for distance in ("mse", "mae"))
    assert mae.gradient != pytest.approx(mse.gradient, rel=0.5)
    assert max(mae.cosine) < 0.95
    assert mae.sensitivity == mse.sensitivity


# --- models -----------------------------------------------------------------------------------------------------------

LABELS = {"class_labels": torch.tensor([1, 2, 3])}
DDIM = {"schedule": DDIMScheduler()}
FAMILIES = {
    "unet": (unet, 3, LABELS, ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"], 2),
    "conditional unet": (
        conditional_unet, 4, {"encoder_hidden_states": torch.zeros(3, 5, 8)},
        ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"], 2,
    ),
    "dit": (dit, 4, LABELS, [f"transformer_blocks.{i}" for i in range(3)], 1),
}  # fmt: skip


@pytest.mark.parametrize(("make", "channels", "cond", "names", "middle"), FAMILIES.values(), ids=FAMILIES)
def test_the_layers_of_a_family_are_its_blocks_and_its_middle_is_marked(make, channels, cond, names, middle):
    probe = probe_layers(make(), torch.randn(3, channels, 8, 8), cond=cond, draws=1, **DDIM)
    assert [r.name for r in probe.rows] == names
    assert probe.middle == (names[middle],)
    assert sorted(probe.ranking) == sorted(names)
    assert probe.skipped == {}
    assert [r.until for r in probe.rows] == sorted(r.until for r in probe.rows)
    for r in probe.rows:
        numbers = [r.scale, r.outlier, r.rank, r.structure, *r.gradient, *r.cosine, *sum(r.sensitivity.values(), ())]
        assert all(number is not None and math.isfinite(number) for number in numbers)
        assert all(-1 <= cosine <= 1 for cosine in r.cosine)
        assert 0 < r.rank <= 1
        assert 1 / r.channels <= r.outlier <= 1


@pytest.mark.parametrize(
    ("schedule", "prediction", "edges"),
    [
        (schedules.Linear(), "flow_prediction", [0, 0.25, 0.5, 0.75, 1]),
        (schedules.Linear(scale=2, reverse=True), "-flow_prediction", [0, 0.5, 1, 1.5, 2]),
        (schedules.Cosine(), "v_prediction", [0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_bands_part_the_schedule(schedule, prediction, edges):
    probe = probe_layers(ConvNet(), torch.randn(2, 3, 6, 6), schedule=schedule, prediction=prediction, layers="body")
    assert [low for low, _ in probe.bands] == pytest.approx(edges[:-1])
    assert [high for _, high in probe.bands] == pytest.approx(edges[1:])


def test_bands_of_sigma_are_equal_in_rank():
    schedule = schedules.EDM()
    probe = probe_layers(
        ConvNet(), torch.randn(2, 3, 6, 6), schedule=schedule, prediction="sample", layers="body", bands=2
    )
    (low, middle), (again, high) = probe.bands
    assert middle == again
    assert middle == pytest.approx(math.exp(-1.2), rel=1e-3), "the median of EDM's log-normal"
    assert schedule.low <= low < middle < high <= schedule.high


def test_times_at_which_the_prediction_is_singular_can_be_left_out():
    options = {"schedule": schedules.Linear(), "prediction": "sample", "layers": "body", "bands": 2}
    with pytest.raises(ValueError, match="sigma is 0"):
        probe_layers(ConvNet(), torch.randn(2, 3, 6, 6), **options)
    probe = probe_layers(ConvNet(), torch.randn(2, 3, 6, 6), t_range=(0.2, 0.8), **options)
    assert probe.bands == (pytest.approx((0.2, 0.5)), pytest.approx((0.5, 0.8)))


def test_samples_of_several_parts_are_probed_by_the_models_own_error():
    clean = {"image": torch.randn(4, 3, 6, 6), "sound": torch.randn(4, 4)}
    probe = probe_layers(TwoStreams(), clean, layers=["join", "see"], **LINEAR)
    assert [list(r.sensitivity) for r in probe.rows] == [["error"]] * 2
    assert all(number > 0 for r in probe.rows for number in (*r.gradient, r.structure))


@pytest.mark.filterwarnings("ignore")
def test_lists_of_samples_are_probed():
    model, tiny = build("ZImageTransformer2DModel.ragged")
    probe = probe_layers(model, tiny.clean, schedule=tiny.scheduler(), cond=tiny.cond, draws=1, bands=2)
    assert {"layers.0", "layers.3"} < {r.name for r in probe.rows}
    assert probe.middle == ("layers.2",)
    assert all(value > 0 for r in probe.rows for value in (r.structure, *r.gradient))


def test_blocks_beside_the_path_of_the_sample_are_no_candidates():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.context_blocks = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(2)])
            self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])

        def forward(self, x, t, context):
            for block in self.context_blocks:
                context = torch.tanh(block(context))
            for block in self.blocks:
                x = torch.tanh(block(x)) + context
            return x

    clean = torch.randn(2, 3, 6, 6)
    probe = probe_layers(Model(), clean, cond={"context": torch.randn(2, 3, 6, 6)}, **LINEAR)
    assert [r.name for r in probe.rows] == [f"blocks.{i}" for i in range(3)]
    assert probe.skipped == {}
    assert probe.middle == ("blocks.1",)


def test_a_layer_that_gives_nothing_of_the_sample_is_left_out_with_the_reason():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Constant(), Same()])

        def forward(self, x, t):
            return sum(layer(x) for layer in self.layers)

    probe = probe_layers(Two(), torch.randn(2, 3, 6, 6), layers=["layers.0", "layers.1"], **LINEAR)
    assert [r.name for r in probe.rows] == ["layers.1"]
    assert list(probe.skipped) == ["layers.0"]
    assert "layers.0 is not measured" in probe.table()
    with pytest.raises(ValueError, match="no layer could be measured"):
        probe_layers(Two(), torch.randn(2, 3, 6, 6), layers=["layers.0"], **LINEAR)


def test_a_probe_leaves_the_model_as_it_was():
    model = unet(dropout=0.5).train()
    model.conv_in.requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    probe_layers(
        model, torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), cond=LABELS, draws=1, **DDIM
    )
    assert torch.equal(torch.rand(3), expected), "the global generator is not used"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.conv_in.parameters()] == [False, False]
    assert all(p.requires_grad for p in model.mid_block.parameters())
    assert all(p.grad is None for p in model.parameters())


# --- the object -------------------------------------------------------------------------------------------------------


@pytest.fixture
def probe():
    return probe_layers(ConvNet(), torch.randn(2, 3, 6, 6), layers=["stem", "body"], draws=1, **LINEAR)


def test_a_seed_gives_the_same_numbers_again():
    clean, model = torch.randn(2, 3, 6, 6), ConvNet()
    one, two, other = (probe_layers(model, clean, layers="body", seed=seed, **LINEAR) for seed in (1, 1, 2))
    assert one == two
    assert one.rows != other.rows


def test_more_draws_are_more_samples():
    clean, model = torch.randn(2, 3, 6, 6), ConvNet()
    one, many = (probe_layers(model, clean, layers="body", draws=draws, **LINEAR) for draws in (1, 5))
    assert one.rows != many.rows
    assert many.rows[0].scale == pytest.approx(one.rows[0].scale, rel=0.5)


def test_a_probe_cannot_be_changed(probe):
    with pytest.raises(dataclasses.FrozenInstanceError):
        probe.rows = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        probe.rows[0].name = "x"


def test_json_holds_everything(probe):
    found = json.loads(probe.to_json())
    assert found.pop("ranking") == probe.ranking
    assert set(found) == {field.name for field in dataclasses.fields(Probe)}
    assert [r["name"] for r in found["rows"]] == ["stem", "body"]
    assert found["rows"][0]["gradient"] == list(probe.rows[0].gradient)
    assert (found["samples"], found["draws"], found["distance"]) == (2, 1, "mse")


def test_the_table_has_a_line_for_each_layer(probe):
    lines = probe.table().splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["stem", "body"]
    assert {line.split()[1] for line in lines[1:3]} == {"1", "2"}
    assert len({len(line) for line in lines[:3]}) == 1
    assert "bands of t: 0 to 0.25" in lines[3]


def test_the_plot_shows_the_layers(probe, tmp_path):
    from PIL import Image

    probe.plot(tmp_path / "probe.png")
    with Image.open(tmp_path / "probe.png") as picture:
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    probe.plot(tmp_path / "probe.svg")
    assert "<svg" in (tmp_path / "probe.svg").read_text()


def test_a_plot_without_matplotlib_says_how_to_install_it(probe, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'perceptual-diffusion\[demo\]'"):
        probe.plot(tmp_path / "probe.png")


WRONG = {
    "no tensor": (TypeError, "`clean` is", {"clean": 3}),
    "no bands": (ValueError, "`bands` is 0, expected a whole number of at least 1", {"bands": 0}),
    "no draws": (ValueError, "`draws` is 1.5", {"draws": 1.5}),
    "no layer": (ValueError, "no module 'mid' in ConvNet", {"layers": ["mid"]}),
    "one of two": (ValueError, "no module 'mid' in ConvNet", {"layers": ["body", "mid"]}),
    "no dimension": (ValueError, r"`spatial` is \(4,\), expected dimensions from 1 to 3", {"spatial": (4,)}),
    "no prediction": (ValueError, "`prediction` is missing", {"prediction": None}),
    "no schedule": (TypeError, "`schedule` is", {"schedule": 3}),
}


@pytest.mark.parametrize(("error", "message", "options"), WRONG.values(), ids=WRONG)
def test_a_probe_refuses(error, message, options):
    options = {"clean": torch.randn(2, 3, 6, 6), "layers": ["body"], **LINEAR, **options}
    with pytest.raises(error, match=message):
        probe_layers(ConvNet(), **options)
