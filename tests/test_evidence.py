"""The benchmark of whether the objective helps: its sampler, metrics, recipes, rows and tables."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_fidelity")
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks/evidence"
sys.path.insert(0, str(FOLDER))

import _bases  # noqa: E402
import _classifier  # noqa: E402
import _data  # noqa: E402
import _measures  # noqa: E402
import _rows  # noqa: E402
import _sampling  # noqa: E402
import pictures  # noqa: E402
import render  # noqa: E402
import run  # noqa: E402
from _bases import BASES  # noqa: E402
from _plan import RECIPES, SEARCHED, TABLES, Sampling  # noqa: E402

from perceptual_diffusion.cli._errors import UserError  # noqa: E402
from perceptual_diffusion.cli.files import load_state  # noqa: E402

UNET, DIT = (replace(BASES[name], dataset="digits", batch=4) for name in ("fashion-unet", "fashion-dit-flow"))


# --- sampling -------------------------------------------------------------------------------------------------------------


class Output:
    def __init__(self, sample):
        self.sample = sample


class Knowing(torch.nn.Module):
    """A model that knows the only picture there is."""

    def __init__(self, scheduler, clean):
        super().__init__()
        self.scheduler, self.clean, self.passes = scheduler, clean, 0

    def forward(self, x, t, class_labels):
        self.passes += 1
        if not hasattr(self.scheduler, "alphas_cumprod"):
            sigma = (t.double() / 1000).float()[:, None, None, None]
            return Output((x - self.clean) / sigma)  # noise - clean, of x = (1 - sigma) clean + sigma noise
        bar = self.scheduler.alphas_cumprod[t.long()][:, None, None, None]
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
        return Output(alpha * (x - alpha * self.clean) / sigma - sigma * self.clean)


@pytest.mark.parametrize("base", [UNET, DIT], ids=["DDIM", "flow"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_model_that_knows_the_picture_samples_it(base, guidance):
    clean, noise = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    scheduler = base.scheduler()
    model = Knowing(scheduler, clean)
    made = _sampling.sample(
        model, scheduler, noise, torch.arange(3), steps=25, null=10, guidance=guidance, rescale=0.7, batch=3
    )
    assert (made - clean).abs().max() < 1e-3
    assert model.passes == (25 if guidance == 1 else 50)


def test_guidance_is_its_formula():
    cond, free = torch.randn(2, 5, 4, 6, 6, dtype=torch.float64).unbind()
    assert torch.allclose(_sampling.guided(cond, free, 1.0, 0.0), cond)
    assert torch.allclose(_sampling.guided(cond, free, 3.0, 0.0), 3 * cond - 2 * free)
    whole = _sampling.guided(cond, free, 3.0, 1.0)
    assert torch.allclose(whole.flatten(1).std(1), cond.flatten(1).std(1))
    part = _sampling.guided(cond, free, 3.0, 0.7)
    assert torch.allclose(part, 0.7 * whole + 0.3 * (3 * cond - 2 * free))


# --- metrics --------------------------------------------------------------------------------------------------------------


def test_the_frechet_distance_of_two_normals_is_that_of_their_moments():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(40_000, 3, generator=generator)
    other = torch.randn(40_000, 3, generator=generator) * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([1.0, 0.0, -2.0])
    assert _measures.frechet(one, other) == pytest.approx(5 + 1 + 0 + 0.25, rel=0.03)
    assert abs(_measures.frechet(one, one)) < 1e-6


def test_metrics_tell_a_set_from_another_and_not_from_itself():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 600, 8, generator=generator).unbind()
    logits = 20 * torch.nn.functional.one_hot(torch.arange(600) % 10, 10).float()
    labels = torch.arange(600) % 10
    same = _measures.compare("Net", (a, logits), (b, logits), labels)
    far = _measures.compare("Net", (a, logits), (b + 5, torch.zeros(600, 10)), labels)
    assert set(same) == {f"{m}-Net" for m in ("FD", "KID", "precision", "recall", "CS", "class")}
    assert same["FD-Net"] < 1 < 150 < far["FD-Net"]
    assert abs(same["KID-Net"]) < 20 < far["KID-Net"]
    assert min(same["precision-Net"], same["recall-Net"]) > 0.8
    assert far["precision-Net"] == far["recall-Net"] == 0
    assert same["CS-Net"] == pytest.approx(10, rel=0.1)
    assert far["CS-Net"] == pytest.approx(1)
    assert (same["class-Net"], far["class-Net"]) == (1, pytest.approx(0.1))
    assert "class-Net" not in _measures.compare("Net", (a, logits), (b, logits), None)


def test_the_classifier_is_the_one_whose_accuracy_is_given():
    about = json.loads(_classifier.WEIGHTS.with_suffix(".json").read_text())
    assert 0.9 < about["test accuracy"] < 0.96
    network = _classifier.read()
    assert not any(p.requires_grad for p in network.parameters())
    features, logits = network(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))
    assert (features.shape, logits.shape) == ((2, 128), (2, 10))
    try:
        data = _data.load("fashion-mnist")
    except Exception as error:  # the pictures are a package of Debian's
        pytest.skip(str(error))
    found = network(data.real.images[:2000])[1].argmax(1)
    assert float((found == data.real.labels[:2000]).float().mean()) == pytest.approx(about["test accuracy"], abs=0.015)


# --- recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.loss and recipe.teacher != "sp"])
def test_every_recipe_trains(name):
    tuning = run.tuning(UNET, UNET.build(), RECIPES[name], 0, "cpu", batch=2)
    before = [p.detach().clone() for p in tuning.model.parameters()]
    row = tuning.step()
    assert all(math.isfinite(value) for value in row.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, tuning.model.parameters(), strict=True))


def test_every_recipe_is_in_a_table_and_every_entry_names_one():
    used = {name for entries in TABLES.values() for _, name, _ in entries}
    assert used == set(RECIPES)
    assert {base for entries in TABLES.values() for base, _, _ in entries} == set(run.BASES)
    assert set(map(str, range(1, 9))) <= set(TABLES)


def test_the_average_as_teacher_is_the_average_itself():
    tuning = run.tuning(UNET, UNET.build(), RECIPES["sp, taught by its average"], 0, "cpu", batch=2)
    assert tuning.objective.teacher.module is tuning.average.module
    before = next(tuning.average.module.parameters()).clone()
    tuning.step()
    tuning.step()
    assert not torch.equal(before, next(tuning.average.module.parameters()))


@pytest.mark.parametrize("base", [UNET, DIT], ids=["unet", "dit"])
def test_mse_gets_as_much_compute_as_the_recipe_it_is_compared_with(base, monkeypatch):
    monkeypatch.setattr(_bases.Base, "read", lambda self: self.build())
    recipe = RECIPES["mse-equal-compute"]
    mse = run.tuning(base, base.build(), recipe, 0, "cpu")
    other = run.tuning(base, base.build(), RECIPES[recipe.as_much_as], 0, "cpu")
    steps = run.steps_of(base, recipe, mse, "cpu")
    spent = other.count_flops() * RECIPES[recipe.as_much_as].steps
    assert abs(steps * mse.count_flops() - spent) <= mse.count_flops()
    assert 1.2 < steps / RECIPES[recipe.as_much_as].steps < 1.75


def test_a_model_taught_by_sp_has_that_teacher_and_is_trained_anew_when_it_changes(small, monkeypatch, capsys):
    stop = run.Budget(1e6)
    run.train_base(replace(small, steps=2), "cpu", stop, 2, n=24)
    taught, given = "sp, taught by sp", []
    tuning = run.tuning
    monkeypatch.setattr(run, "tuning", lambda *args, **how: given.append(how.get("teacher")) or tuning(*args, **how))
    run.fine_tuned(small, taught, 0, "cpu", stop)
    own = run.fine_tuned(small, "sp", 0, "cpu", stop).state_dict()
    teacher = next(t for t in given if t is not None)
    assert all(torch.equal(v, own[k]) for k, v in teacher.state_dict().items())
    files = set(run.RUNS.glob(f"*{taught}*"))
    run.fine_tuned(small, taught, 0, "cpu", stop)
    assert set(run.RUNS.glob(f"*{taught}*")) == files
    monkeypatch.setitem(run.RECIPES, "sp", replace(run.RECIPES["sp"], lr=1e-3))
    model = run.fine_tuned(small, taught, 0, "cpu", stop)
    assert len(set(run.RUNS.glob(f"*{taught}*")) - files) == 1
    assert all(p.requires_grad for p in model.parameters())


def test_the_average_that_taught_can_be_trained_on(small, capsys):
    stop = run.Budget(1e6)
    run.train_base(replace(small, steps=2), "cpu", stop, 2, n=24)
    model = run.fine_tuned(small, "sp, taught by its average", 0, "cpu", stop)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("name", "falls"), [("recommended", False), ("recommended, falling rate", True)])
def test_a_falling_rate_reaches_zero_when_the_steps_are_done(small, name, falls, monkeypatch, capsys):
    stop = run.Budget(1e6)
    run.train_base(replace(small, steps=2), "cpu", stop, 2, n=24)
    monkeypatch.setitem(run.RECIPES, name, replace(run.RECIPES[name], steps=60))
    rates, step = [], run.FineTuning.step

    def noted(self):
        row = step(self)
        rates.append(self.optimizer.param_groups[0]["lr"] / self.lr)
        return row

    monkeypatch.setattr(run.FineTuning, "step", noted)
    run.fine_tuned(small, name, 0, "cpu", stop)
    assert rates[:3] == pytest.approx([0.02, 0.04, 0.06])
    assert rates[49:] == pytest.approx([1 - step / 60 if falls else 1.0 for step in range(49, 60)])


def test_the_learning_rate_of_a_base_rises_stays_and_falls_to_a_tenth():
    base = replace(UNET, steps=10_000)
    assert [round(base.factor(step), 4) for step in (0, 249, 499, 6000, 8000, 9999, 20_000)] == [
        0.002, 0.5, 1, 1, 0.55, 0.1002, 0.1
    ]  # fmt: skip
    twice = replace(base, steps=20_000, rounds=2)
    assert [round(twice.factor(step), 4) for step in (0, 9999, 10_000, 16_000, 18_000, 19_999, 40_000)] == [
        0.002, 0.1002, 1, 1, 0.55, 0.1002, 0.1
    ]  # fmt: skip


def test_a_restart_rises_to_where_the_learning_rate_was():
    base = replace(UNET, steps=20_000)
    found = [base.factor(step, start=16_000) for step in (0, 249, 499, 1999, 3999)]
    assert found == pytest.approx([0.002, 0.5, base.factor(16_499), base.factor(17_999), base.factor(19_999)])


def test_an_unconditional_base_never_sees_a_class():
    free = replace(BASES["fashion-unet-unconditional"], dataset="digits", batch=64)
    tuning = run.tuning(free, free.build(), RECIPES["sp"], 0, "cpu")
    _, cond = tuning._batch(torch.Generator().manual_seed(0))
    assert cond["class_labels"].tolist() == [10] * 64


# --- from a base to its rows ------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A benchmark of seconds, on digits, in a folder of its own."""
    base = replace(UNET, steps=4)
    for module in (run, _bases):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "bases")
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(run._rows, "read", lambda path=tmp_path / "results.json", read=_rows.read: read(path))
    monkeypatch.setattr(run._rows, "add", lambda rows, path=tmp_path / "results.json", add=_rows.add: add(rows, path))
    monkeypatch.setattr(run, "RECIPES", {name: replace(r, steps=min(r.steps, 2)) for name, r in RECIPES.items()})
    return base


def test_a_base_is_trained_measured_and_gone_on_with(small, capsys):
    stop = run.Budget(1e6)
    run.train_base(replace(small, steps=2), "cpu", stop, 2, n=24)
    run.train_base(small, "cpu", stop, 2, n=24)
    log = json.loads((_bases.FOLDER / f"{small.name}.json").read_text())
    assert [row["step"] for row in log["log"]] == [2, 4]
    assert small.trained == 4
    assert log["compute"] > 0
    assert all(math.isfinite(value) for value in log["log"][1].values())
    weights = small.read().state_dict()
    run.train_base(small, "cpu", stop, 2, n=24)  # nothing is left to do
    assert all(torch.equal(v, weights[k]) for k, v in small.read().state_dict().items())
    (run.RUNS / f"{small.name}.safetensors").unlink()
    with pytest.raises(UserError, match="has been trained for 4 steps"):
        run.train_base(small, "cpu", stop, 2, n=24)


def test_a_base_whose_state_is_lost_goes_on_from_its_weights(small, monkeypatch, capsys):
    stop, state = run.Budget(1e6), run.RUNS / f"{small.name}.safetensors"
    run.train_base(replace(small, steps=2), "cpu", stop, 2, n=24)
    before = json.loads((_bases.FOLDER / f"{small.name}.json").read_text())
    old = state.read_bytes()
    state.unlink()
    rates, draws, starts = [], [], []
    tuning = run.tuning

    def seen(*args, factor=None, **how):
        made = tuning(*args, factor=lambda step: rates.append(step) or factor(step), **how)
        draws.append(args[3])
        starts.append({k: v.clone() for k, v in args[1].state_dict().items()})
        return made

    monkeypatch.setattr(run, "tuning", seen)
    held = small.read().state_dict()
    run.train_base(replace(small, steps=4), "cpu", stop, 2, n=24, restart=True)
    run.train_base(replace(small, steps=6), "cpu", stop, 2, n=24, restart=True)  # its state is here: no second restart
    log = json.loads((_bases.FOLDER / f"{small.name}.json").read_text())
    assert [row["step"] for row in log["restarts"]] == [2]
    assert log["restarts"][0]["before"] == {
        name: before[name] for name in ("torch", "command", "commit", "hardware", "date")
    }
    assert [row["step"] for row in log["log"]] == [2, 4, 6]
    assert log["steps"] == small.trained == 6
    assert draws == [3, 3], "the draws of a restart are not those of the first steps again"
    assert all(torch.equal(v, held[k]) for k, v in starts[0].items())
    assert rates == [0, 1, 2, 3], "the steps of the restart, once each"
    assert load_state(state)[1]["done"] == 4
    state.write_bytes(old)  # the lost one comes back
    with pytest.raises(UserError, match="start"):
        run.train_base(replace(small, steps=8), "cpu", stop, 2, n=24)
    state.unlink()
    with pytest.raises(UserError, match=r"is not here\. Bring it, or delete") as caught:
        run.train_base(replace(small, steps=6), "cpu", stop, 2, n=24, restart=True)
    assert "--restart" not in str(caught.value)


def test_samples_of_every_seed_way_and_base_are_kept(small, capsys):
    stop = run.Budget(1e6)
    run.train_base(replace(small, steps=2), "cpu", stop, 2, n=24)
    ways = [Sampling(steps=2), Sampling(steps=3)]
    ways += [Sampling(steps=2, guidance=3.0, rescale=rescale) for rescale in (0.0, 0.7)]
    for seed in (0, 1):
        for how in ways:
            run.make_rows("1", small, "base", how, seed, 24, "cpu", stop)
    assert len(list(run.RUNS.glob("*.png"))) == 8
    run.train_base(small, "cpu", stop, 2, n=24)
    run.make_rows("1", small, "base", ways[0], 0, 24, "cpu", stop)
    assert len(list(run.RUNS.glob("*.png"))) == 9


@pytest.mark.parametrize("drop", [0.1, 1.0])
def test_recipes_are_shown_from_the_noise_that_is_measured(small, monkeypatch, capsys, drop):
    stop, base = run.Budget(1e6), replace(small, drop=drop)
    run.train_base(replace(base, steps=2), "cpu", stop, 2, n=24)
    monkeypatch.setattr(
        pictures, "SHOWN", {title: (name, replace(how, steps=2)) for title, (name, how) in pictures.SHOWN.items()}
    )
    made = pictures.make(base, 1, "cpu", stop)
    assert list(made) == [title for title in pictures.SHOWN if drop < 1 or "guidance" not in title]
    measured, _ = run.draw(
        base, run.fine_tuned(base, "recommended", 1, "cpu", stop), Sampling(steps=2), seed=1, n=48, device="cpu"
    )
    assert (made["recommended"].int() - measured[:20].int()).abs().max() <= 1, (
        "another size of batch may round otherwise"
    )
    figure = pictures.figure(made, base.null)
    assert [axes.get_title("left") for axes in figure.axes] == list(made)
    shown = torch.from_numpy(figure.axes[-1].images[0].get_array()[36:68, 2:34, 0].copy())
    assert torch.equal(shown, made["recommended"][10, 0])


def test_a_table_is_made_once(small, monkeypatch, capsys):
    run.train_base(replace(small, steps=2), "cpu", run.Budget(1e6), 2, n=24)
    make = lambda table, name, **how: run.make_rows(  # noqa: E731
        table, small, name, Sampling(steps=2, **how), 0, 24, "cpu", run.Budget(1e6)
    )
    make("5", "sp")
    make("1", "base", guidance=3.0)
    rows = run._rows.read()
    assert {row["table"] for row in rows} == {"1", "5"}
    assert {row["nfe"] for row in rows if row["loss"] == "base"} == {4}
    assert all(row["compute"] > 0 for row in rows if row["loss"] == "sp")
    assert len(list(run.RUNS.glob("*.png"))) == 2
    monkeypatch.setattr(run, "draw", None)
    make("5", "sp")
    make("6", "sp")  # the same model in another table
    again = run._rows.read()
    assert len(again) == len(rows) + sum(row["table"] == "5" for row in rows)
    monkeypatch.setattr(_bases.Base, "trained", 7)
    with pytest.raises(TypeError):  # of another base they have to be made anew
        make("5", "base")


def test_real_pictures_are_references(small):
    run.make_references(replace(small, dataset="digits"), 0, "cpu")
    rows = {row["metric"]: row for row in run._rows.read()}
    assert {"FD-EffLite0", "KID-EffLite0", "recall-EffLite0", "nearest"} <= set(rows)
    assert rows["nearest"]["value"] > 0
    assert rows["nearest"]["n"] == len(_data.load("digits").train)


def test_bad_input_to_the_command_is_said_and_ends_it(small, monkeypatch, capsys):
    monkeypatch.setattr(_bases.Base, "trained", 4)
    for words, said in (
        (("base", "fashion-unet"), "has been trained for 4 steps"),
        (("table", "9"), "unknown name '9'"),
    ):
        monkeypatch.setattr(sys, "argv", ["run.py", *words])
        with pytest.raises(SystemExit) as end:
            run.main()
        assert end.value.code == 2
        assert said in capsys.readouterr().err


def test_one_way_to_sample_can_be_chosen(monkeypatch):
    made = []
    monkeypatch.setattr(run, "make_rows", lambda table, base, name, how, *given: made.append((name, how)))
    command = ["run.py", "table", "1", "--seed", "0", "--only", "base", "--only", "recommended", "--ways", "1"]
    monkeypatch.setattr(sys, "argv", command)
    run.main()
    assert made == [("base", Sampling()), ("recommended", Sampling())]


# --- rows and tables --------------------------------------------------------------------------------------------------------


def a_row(**changed):
    return dict.fromkeys(_rows.COLUMNS, "x") | {"value": 1.0, "compute": 1e12, "seed": 0, "rescale": 0.0} | changed


def test_a_row_takes_the_place_of_its_like(tmp_path):
    path = tmp_path / "rows.json"
    _rows.add([a_row(), a_row(seed=1)], path)
    _rows.add([a_row(value=2.0, date="later")], path)
    assert [(r["seed"], r["value"]) for r in _rows.read(path)] == [(0, 2.0), (1, 1.0)]


@pytest.mark.parametrize("row", [a_row(value=math.nan), a_row(more=1), {"value": 1.0}])
def test_a_row_that_says_nothing_is_refused_and_loses_none(row, tmp_path):
    path = tmp_path / "rows.json"
    _rows.add([a_row()], path)
    with pytest.raises(ValueError, match=r"has the columns|is nan"):
        _rows.add([row], path)
    assert len(_rows.read(path)) == 1


def test_processes_do_not_lose_each_others_rows(tmp_path):
    path = tmp_path / "rows.json"
    code = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import _rows; from pathlib import Path\n"
        "for seed in range(10): _rows.add([dict.fromkeys(_rows.COLUMNS, sys.argv[1]) | {'seed': seed, 'value': 1.0}],"
        f" Path({str(path)!r}))"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("a", "b")]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert len(_rows.read(path)) == 20


def test_rows_of_another_base_or_another_n_are_other_lines_and_not_in_the_verdict():
    def rows_of(values, **about):
        return [
            a_row(**({"table": "1", "metric": "FD-X", "base": "b", "nfe": 25, "guidance": "none", "loss": loss, "seed": s,
                      "n": 100, "base_steps": 20, "steps": 5} | about | {"value": v}))
            for loss, of in values.items() for s, v in enumerate(of)
        ]  # fmt: skip

    new = rows_of({"recommended": (1.0, 1.0), "mse-equal-compute": (2.0, 2.0)})
    others = rows_of({"recommended": (9.0, 9.0)}, n=10) + rows_of({"recommended": (7.0, 7.0)}, base_steps=10)
    more = [
        row | {"nfe": 50, "n": 40, "value": 3 * row["value"] if row["loss"] == "recommended" else row["value"]}
        for row in new
    ]
    guided = [row | {"guidance": 3.0, "nfe": 50, "value": 9.0} for row in new]
    alone = rows_of({"base": (1.0, 1.0)}, n=1000)  # hides no comparison
    young = [row | {"nfe": 10, "base_steps": 10} for row in new]
    rows = [*others, *new, *(row | {"table": "7"} for row in new), *more, *guided, *alone, *young]
    assert render.table(rows, "1").count("\n") == 1 + 4 + 2 + 2 + 1 + 2
    assert render.verdict(rows).splitlines()[2:] == [
        "| b | recommended | 25 | 100 | FD-X | 2 | 0.500 | 0.500 – 0.500 |",
        "| b | recommended | 50 | 40 | FD-X | 2 | 1.500 | 1.500 – 1.500 |",
    ]  # fmt: skip
    near = rows_of({"sp, t' = t ± 40": (3.0, 3.0), "sp": (4.0, 4.0)})
    assert render.verdict([*near, *rows]).splitlines()[4:] == [
        "| b | sp, t' = t ± 40 | 25 | 100 | FD-X | 2 | 1.500 | 1.500 – 1.500 |"
    ]
    with pytest.raises(ValueError, match="several rows of seed 0"):
        render.verdict([*rows, *rows_of({"recommended": (5.0,)}, distance="other")])


def test_the_interval_of_a_ratio_is_students():
    rows = [a_row(loss="new", metric="FD", seed=s, value=v) for s, v in enumerate((1.0, 2.0, 4.0))]
    rows += [a_row(loss="old", metric="FD", seed=s, value=v) for s, v in enumerate((2.0, 4.0, 4.0))]
    middle, low, high, seeds = render.ratio(rows, {"loss": "new"}, {"loss": "old"}, "FD")
    logs = [math.log(0.5), math.log(0.5), 0.0]
    mean = sum(logs) / 3
    half = 4.30265 * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3)
    assert seeds == 3
    assert (middle, low, high) == pytest.approx((math.exp(mean), math.exp(mean - half), math.exp(mean + half)))
    assert render.ratio(rows[:1] + rows[3:], {"loss": "new"}, {"loss": "old"}, "FD") is None
    rows[0]["value"] = -0.1  # as KID may be
    assert render.ratio(rows, {"loss": "new"}, {"loss": "old"}, "FD") is None


def test_the_tables_of_the_docs_are_those_of_the_results():
    assert all(tuple(row) == _rows.COLUMNS for row in _rows.read())
    text = render.DOCUMENT.read_text(encoding="utf-8")
    assert render.fill(text, _rows.read()) == text
    with pytest.raises(ValueError, match="no place"):
        render.fill("", [a_row(table="1", metric="FD")])


def test_the_price_is_the_plans_trainings_and_passes(monkeypatch):
    way = Sampling(steps=50, guidance=3.0, n=1000)
    plan = {number: [] for number in "1234567"} | {
        "1": [(render.UNET, "base", (way,)), (render.UNET, "sp", (Sampling(),))],
        "2": [(render.UNET, "sp", (Sampling(),)), ("another base", "sp", (way,))],
    }
    monkeypatch.setattr(render, "TABLES", plan)
    rows = [
        {"model": "M", "resolution": 8, "variant": name, "flops": flops}
        for name, flops in (("MSE", 3e12), ("plain autograd", 4e12), ("as printed", 9e12))
    ]
    training, sampling = 4e12 * 64 * 1000, 1e12
    whole = 3 * (training + sampling * (2 * 50 * 1000 + 25 * 10_000))
    hours = [flops / (0.4 * 989.4e12 * 3600) for flops in (training + sampling * 250_000, whole)]
    assert render.price(rows).splitlines()[2:] == [f"| M, 8 | 256 | 250 | {hours[0]:.1f} | {hours[1]:.1f} |"]
    assert {row["variant"] for row in render.counted()} == {"MSE", "plain autograd", "micro-batches of 1"}


def test_the_figure_shows_each_recipe_against_mse_of_the_same_seed_n_and_base():
    about = {
        "table": "1",
        "metric": "FD-X",
        "base": "b",
        "base_steps": 20,
        "nfe": 25,
        "guidance": "none",
        "n": 100,
        "compute": 9,
    }
    values = {
        ("mse-equal-compute", 0): 2.0,
        ("mse-equal-compute", 1): 4.0,
        ("sp", 0): 3.0,
        ("sp", 1): 2.0,
        ("new", 1): 1.0,
    }
    rows = [a_row(**about | {"loss": loss, "seed": seed, "value": value}) for (loss, seed), value in values.items()]
    wrong = ({"n": 10}, {"base_steps": 10}, {"nfe": 50}, {"guidance": 3.0}, {"metric": "KID-X"}, {"base": "c"})
    others = [a_row(**about | {"loss": "sp", "value": 9.0} | other) for other in wrong]
    longer = [a_row(**about | {"loss": loss, "seed": 1, "value": value, "compute": compute}) for loss, value, compute in (
        (render.LONGER_MSE, 0.5, 36), ("longer", 0.25, 37), ("base", 8.0, 0)
    )]  # fmt: skip
    searched = [
        row
        | {
            "dataset": "x, against training pictures",
            "value": 5 * row["value"] if row["loss"] == "new" else row["value"],
        }
        for row in rows
    ]
    found = render.against_mse([*others, *rows, *searched])
    assert found == {
        "b, N = 100": {"new": [0.25], "sp": [1.5, 0.5]},
        "b, N = 100, against training pictures": {"new": [1.25], "sp": [1.5, 0.5]},
    }
    found = render.against_mse([*others, *rows, *longer])
    assert found == {"b, N = 100": {"new": [0.25], "sp": [1.5, 0.5], "longer": [0.5], "base": [2.0]}}
    found = render.against_mse([*others, *rows])
    axes = render.draw(found).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["sp", "new"]
    assert sorted(x for line in axes.lines[::2][:2] for x in line.get_xdata()) == [0.25, 0.5, 1.5]
    assert render.against_mse(others) == {}


# --- the search, and the base of the package --------------------------------------------------------------------------------


def test_a_search_is_compared_with_training_pictures_only():
    whole, search = _data.load("digits"), _data.load(f"digits{_data.SEARCH}")
    known = {image.numpy().tobytes() for image in whole.train.images}
    assert {image.numpy().tobytes() for image in search.real.images} <= known
    assert torch.equal(search.train.images, whole.train.images)
    assert not torch.equal(whole.real.images, search.real.images[: len(whole.real)])
    assert all(_data.SEARCH in BASES[base].dataset for table in SEARCHED for base, _, _ in TABLES[table])
    assert {base for table in SEARCHED for base, _, _ in TABLES[table]}.isdisjoint(
        base for table in TABLES.keys() - set(SEARCHED) for base, _, _ in TABLES[table]
    )
    assert not any(_data.SEARCH in BASES[base].dataset for name in "12345678" for base, _, _ in TABLES[name])


def test_every_recipe_of_the_search_costs_what_the_recommended_one_does():
    assert {RECIPES[name].as_much_as for _, name, _ in TABLES["search"]} <= {None, "recommended"}
    assert [RECIPES[name].as_much_as for _, name, _ in TABLES["length"]] == [TABLES["length"][1][1], None]
    assert all(RECIPES[name].as_much_as for _, name, _ in TABLES["search"] if name.startswith("search: "))


def test_emoji_are_asked_for_as_often_as_they_come_among_those_compared_with():
    base = BASES["emoji-unet"]
    real = _data.load("emoji").real.labels
    assert torch.equal(base.classes(base.n).bincount(), real.bincount())


def test_the_base_of_the_package_is_read_as_it_is_and_not_trained_here():
    base = BASES["emoji-unet"]
    record = json.loads((ROOT / "perceptual_diffusion/assets/base/training.json").read_text())
    assert base.trained == record["steps"]
    assert sum(p.numel() for p in base.read().parameters()) == record["parameters"]
    assert base.scheduler().config.prediction_type == "v_prediction"
    with pytest.raises(UserError, match="base of the package"):
        run.train_base(base, "cpu", run.Budget(1), 10)
