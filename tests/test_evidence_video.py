"""The benchmark's clips: what they are, the model of them, what its samples are measured by, and its rows."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch_fidelity")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/evidence"))

import _bases
import _rows
import _video
import run
from _plan import RECIPES, TABLES, Recipe, Sampling

from perceptual_diffusion import SelfPerceptualObjective
from perceptual_diffusion.cli import datasets

TINY = replace(_video.BASE, make=partial(_video.unet3d, widths=(8, 16, 16)), batch=2)


def some_clips(n, seed=0):
    """Smooth pictures that move to the right by one pixel a frame."""
    start = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    picture = (torch.nn.functional.interpolate(start, _video.SIZE, mode="bicubic").clamp(0, 1) * 255).byte()
    return torch.stack([picture.roll(k, -1) for k in range(_video.FRAMES)], 1)


def split(train, held_out):
    parts = [
        datasets.Pictures(
            name="some", images=images, labels=torch.zeros(len(images), dtype=torch.long), classes=("some",),
            mirror=torch.zeros(len(images), dtype=torch.bool),
        )
        for images in (train, held_out)
    ]  # fmt: skip
    return datasets.Split(train=parts[0], held_out=parts[1])


@pytest.fixture
def clips(monkeypatch):
    """A data set of seconds."""
    data = split(some_clips(6), some_clips(4, seed=1))
    monkeypatch.setattr(_video, "load", lambda: data)
    _video.real.cache_clear()
    yield data
    _video.real.cache_clear()


# --- data -----------------------------------------------------------------------------------------------------------------


def test_clips_are_reproducible_move_and_are_held_out_by_place():
    pytest.importorskip("vizdoom", reason="it renders the clips: pip install vizdoom")
    made = _video.render("E1M1", (12, 5))
    again = _video.render("E1M1", (12, 5))
    (train, begun), (held_out, held_begun) = made
    assert (train.shape, held_out.shape) == ((12, 8, 3, 32, 32), (5, 8, 3, 32, 32))
    assert train.dtype == torch.uint8
    assert all(
        torch.equal(a, b) for part, same in zip(made, again, strict=True) for a, b in zip(part, same, strict=True)
    )
    assert not {tuple(c) for c in begun.tolist()} & {tuple(c) for c in held_begun.tolist()}
    assert len({tuple(c) for c in begun.tolist()}) > 3
    every = torch.cat([train, held_out]).float()
    assert every.diff(dim=1).abs().mean((2, 3, 4)).min() > 1
    assert torch.pdist(every.flatten(1)).min() / every[0].numel() ** 0.5 > 5  # no two are the same
    other = _video.render("E1M1", (2, 1), seed=1)
    assert not torch.equal(other[0][0], train[:2])


def test_a_clip_that_stands_still_or_shows_nothing_is_no_clip():
    clip = some_clips(1)[0]
    assert _video._moves(clip)
    assert not _video._moves(torch.cat([clip[:1], clip[:-1]]))  # one frame stands
    assert not _video._moves(clip // 32)


def test_the_clips_are_rendered_once(tmp_path, monkeypatch):
    part = lambda seed: [(some_clips(2, seed), torch.zeros(2, 2)), (some_clips(1, seed + 1), torch.zeros(1, 2))]  # noqa: E731
    asked = []
    monkeypatch.setattr(_video, "MAPS", ("E1M1", "E1M2"))
    monkeypatch.setattr(_video, "version", lambda name: "0")
    monkeypatch.setattr(_video, "render", lambda name: asked.append(name) or part(10 * len(asked)))
    path = tmp_path / "clips.safetensors"
    first = _video.load(path)
    _video.load.cache_clear()
    second = _video.load(path)
    assert asked == ["E1M1", "E1M2"]
    assert first.train.labels.tolist() == second.train.labels.tolist() == [0, 0, 1, 1]
    assert second.train.classes == ("E1M1", "E1M2")
    assert torch.equal(second.train.images, torch.cat([some_clips(2, 10), some_clips(2, 20)]))
    assert torch.equal(second.held_out.images, torch.cat([some_clips(1, 11), some_clips(1, 21)]))


def test_the_model_sees_each_frame_folded_in_its_place():
    clips = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8)
    seen = _video.to_model(clips)
    assert seen.shape == (2, 12, 8, 16, 16)
    assert torch.equal(seen[:, :, 5], datasets.to_model(clips[:, 5]))
    assert torch.equal(_video.to_clips(seen), clips)


# --- model ----------------------------------------------------------------------------------------------------------------


def test_the_model_looks_across_frames_and_has_no_dropout():
    model = TINY.build()
    x, t = torch.randn(1, 12, 8, 16, 16), torch.tensor([500])
    with torch.no_grad():
        before = model(x, t).sample
        assert torch.equal(model(x, t).sample, before)  # in train mode
        x[:, :, 7] += 1
        assert not torch.allclose(model(x, t).sample[:, :, 0], before[:, :, 0], atol=1e-4)


def test_the_objective_finds_the_middle_of_the_model_by_itself(clips):
    base = TINY
    model = base.build()
    objective = SelfPerceptualObjective.wrap(model, base.scheduler(), distance="normalised", mse_weight=1.0, seed=0)
    assert objective.teacher.layers == ("mid_block",)
    clean = _video.to_model(clips.train.images[:2])
    objective(model, clean).backward()
    assert all(math.isfinite(float(value)) for values in objective.terms.values() for value in values)
    assert all(p.grad is None for p in objective.teacher.module.parameters())
    assert sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None) > 0


def test_the_model_learns_a_clip(monkeypatch):
    data = split(some_clips(1), some_clips(1))
    monkeypatch.setattr(_video, "load", lambda: data)
    training = run.tuning(TINY, TINY.build(), Recipe(loss="mse", lr=1e-2), 0, "cpu", factor=lambda step: 1.0)
    clean = _video.to_model(data.train.images.expand(8, -1, -1, -1, -1))
    losses = []
    for steps in (0, 10):
        for _ in range(steps):
            training.step()
        losses.append(float(training._loss(clean, {}, torch.Generator().manual_seed(7)).detach()))
    assert losses[1] < 0.75 * losses[0]


# --- metrics --------------------------------------------------------------------------------------------------------------


def test_one_frame_of_each_clip_is_seen_and_how_it_changes():
    clips = some_clips(2).repeat(5, 1, 1, 1, 1)  # the same two clips, seen at different frames
    seen = _video.see(clips, "cpu")
    of = _video._measures.network("EffLite0", "cpu")(clips.flatten(0, 1))[0].unflatten(0, (10, 8))
    turn = torch.arange(10)
    assert torch.allclose(seen["EffLite0-frames"], of[turn, turn % 8], atol=1e-4)
    assert torch.allclose(seen["EffLite0-motion"], of[turn, turn % 7 + 1] - of[turn, turn % 7], atol=1e-4)
    still = _video.see(clips[:, :1].expand_as(clips), "cpu")
    assert still["EffLite0-motion"].abs().max() < 1e-4 < 0.1 < seen["EffLite0-motion"].abs().max()


def test_real_clips_are_nearer_to_real_ones_than_noise_and_a_copy_is_found(clips):
    noise = torch.randint(0, 256, (4, 8, 3, 32, 32), dtype=torch.uint8)
    good, bad = _video.measure(clips.held_out.images, "cpu"), _video.measure(noise, "cpu")
    names = {f"{m}-EffLite0-{part}" for m in ("FD", "KID", "precision", "recall") for part in ("frames", "motion")}
    assert set(good) == names | {"nearest"}
    for part in ("frames", "motion"):
        assert good[f"FD-EffLite0-{part}"] < 0.1 < bad[f"FD-EffLite0-{part}"]
    assert _video.nearest(clips.train.images[2:5], "cpu") < 1e-3 < good["nearest"] < bad["nearest"]


def test_a_gif_shows_the_clips_in_their_places(tmp_path):
    from PIL import Image, ImageSequence

    colours = torch.randint(0, 2, (4, 8, 3, 1, 1), generator=torch.Generator().manual_seed(1)) * 255
    clips = colours.expand(4, 8, 3, 32, 32).byte()
    _video.write_gif(clips, tmp_path / "clips.gif", columns=2, scale=2)
    with Image.open(tmp_path / "clips.gif") as file:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
    assert [frame.size for frame in frames] == [(128, 128)] * 8
    for k, frame in enumerate(frames):
        for n in range(4):
            assert frame.getpixel((n % 2 * 64 + 30, n // 2 * 64 + 30)) == tuple(clips[n, k, :, 0, 0].tolist())


# --- from a base to its rows ------------------------------------------------------------------------------------------------


def test_a_base_is_trained_and_compared(monkeypatch, tmp_path, clips, capsys):
    def see(made, device):  # the mean colours of frames in the place of the network's features
        frames = made.float().mean((3, 4))
        return {"EffLite0-frames": frames[:, 0], "EffLite0-motion": frames[:, 1] - frames[:, 0]}

    for module in (run, _bases):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "bases")
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(_video, "see", see)
    monkeypatch.setattr(run, "RECIPES", {name: replace(r, steps=min(r.steps, 1)) for name, r in RECIPES.items()})
    monkeypatch.setattr(_rows, "read", lambda path=tmp_path / "results.json", read=_rows.read: read(path))
    monkeypatch.setattr(_rows, "add", lambda rows, path=tmp_path / "results.json", add=_rows.add: add(rows, path))
    base, stop = replace(TINY, steps=1), run.Budget(1e6)
    run.train_base(base, "cpu", stop, 1, n=4)
    log = json.loads((tmp_path / "bases" / f"{base.name}.json").read_text())
    assert [row["step"] for row in log["log"]] == [1]
    for name in ("base", "recommended"):
        run.make_rows("video", base, name, Sampling(steps=2), 1, 4, "cpu", stop)
    rows = _rows.read()
    assert {row["loss"] for row in rows} < {name for _, name, _ in TABLES["video"]}
    assert {(row["table"], row["nfe"], row["seed"], row["n"]) for row in rows} == {("video", 2, 1, 4)}
    assert len(rows) == 2 * 9
    assert {row["mse_weight"] for row in rows if row["loss"] == "recommended"} == {1.0}
    assert len(list((tmp_path / "runs").glob("*.gif"))) == 2


def test_references_are_clips_of_the_training_set(clips, monkeypatch):
    found = TINY.references("cpu", 0)["training clips"]
    assert found[0] == 6
    assert found[1]["nearest"] > 0.01  # of clips held out, not of those of the training set, which are at 0
    assert set(found[1]) >= {"FD-EffLite0-frames", "FD-EffLite0-motion"}
