"""The benchmark of the gradient's noise: it runs, its formulas hold where the answer is known, its stored rows are its own."""

import json
import sys
from pathlib import Path

import pytest
import torch

from perceptual_diffusion.timesteps import Contributing

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gradient_noise  # noqa: E402

STORED = [
    json.loads(line) for line in (ROOT / "benchmarks/results/gradient_noise.jsonl").read_text("utf-8").splitlines()
]


@pytest.fixture(scope="module")
def bench():
    return gradient_noise.Bench(0)


def kinds(rows):
    return [(row["objective"], row.get("way"), row.get("factor"), "shift" in row) for row in rows]


def test_a_run_of_a_few_samples_gives_the_kinds_of_row_that_are_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_noise, "WARM_UP", 1)
    monkeypatch.setattr(gradient_noise, "UNIFORM", 2)
    monkeypatch.setattr(gradient_noise, "EVERY", 3)
    gradient_noise.main(["--sites", "4", "--seed", "3", "--out", str(tmp_path / "rows.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert kinds(rows) == kinds(STORED)
    assert {(row["sites"], row["seed"]) for row in rows} == {(4, 3)}
    assert all(value == value for row in rows for name, value in row.items() if "±" not in name), "no NaN"
    assert {row["noise"] for row in rows if row.get("way") == "t' uniform"} == {1.0}


def test_the_density_measured_is_that_of_contributing(bench):
    schedule, t = bench.objectives["mse"].schedule, torch.tensor([0, 37, 500, 999])
    for index in (0, 36, 37, 700, 999):
        weight = Contributing().weight(schedule, t, torch.full((4,), index))
        torch.testing.assert_close(weight, 1 / (1000 * bench.densities["|κ| + 0.1"][t, index]), rtol=1e-6, atol=0)


def test_the_gradients_are_those_of_the_objective(bench):
    sample, t_prime = bench.draw(), torch.tensor([100, 900])
    found = bench.gradients(sample, t_prime)
    (clean, label), t, noise = sample["picture"], sample["t"], sample["noise"]
    objective = bench.objectives["normalised"]
    for row, time in ((3, 100), (4, 900)):
        torch.manual_seed(sample["dropout"])
        predicted = bench.model(objective.add_noise(clean, noise, t), t, class_labels=label).sample
        cond = {"class_labels": label}
        loss = objective.loss(predicted, clean=clean, noise=noise, t=t, t_prime=torch.tensor([time]), cond=cond)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, bench.parameters)])
        assert float((found[row] - expected).norm() / expected.norm()) < 1e-4


def test_the_formulas_give_what_is_known_of_gradients_independent_of_everything(bench):
    """|g| = 1 whatever t' is, all gradients orthogonal, no mean: every way only spends."""
    sites, times = 64, gradient_noise.UNIFORM + len(gradient_noise.DRAWN)
    drawn = torch.stack([torch.cat([bench.t_prime("uniform", torch.tensor(500), gradient_noise.UNIFORM),
                                    bench.t_prime("κ²", torch.tensor(500)), bench.t_prime("|κ|", torch.tensor(500))])
                         for _ in range(sites)])  # fmt: skip
    found = {
        "t": torch.full((sites, 1), 500),
        "t_prime": drawn,
        "gram": torch.eye(1 + 2 * times).expand(sites, 3, -1, -1),
        "sketch": torch.zeros(sites, 1 + 2 * times, 8),
        "redrawn": torch.zeros(sites // gradient_noise.EVERY, len(gradient_noise.FACTORS), 3, 3),
    }
    noise = gradient_noise.Noise(bench, found, "L_sp, normalised")
    ways = {name: float(trace[0]) for name, trace, _ in noise.ways()}
    expected = {"t' uniform": 1, "random 0.5 of the samples": 2, "every=2": 2, "every=4": 4, "2 t' uniform": 0.5}
    assert {name: ways[name] for name in expected} == pytest.approx(expected)
    weight = 1 / (1000 * bench.densities["|κ| + 0.1"][500, drawn[:, : gradient_noise.UNIFORM]])
    assert ways["t' ∝ |κ| + 0.1"] == pytest.approx(float(weight.mean()))
    assert ways["t' ∝ |κ| + 0.1"] > 1
    assert {name: part for name, part, _ in noise.factors()}["t'"] == pytest.approx(1)
    mixed = gradient_noise.Noise(bench, found, "L_mse + L_sp, normalised")
    assert float(mixed.uniform[0]) == pytest.approx(2)
    assert {name: float(trace[0]) for name, trace, _ in mixed.ways()}["every=4"] == pytest.approx(5)
