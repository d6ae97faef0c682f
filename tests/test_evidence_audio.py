"""The audio part of the benchmark: clips to pictures and back, the metric network, and the way from a base to its rows."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torch_fidelity")
soundfile = pytest.importorskip("soundfile")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/evidence"))

import _audio  # noqa: E402
import _bases  # noqa: E402
import _rows  # noqa: E402
import run  # noqa: E402
from _audio import LENGTH, RATE  # noqa: E402
from _plan import COMPARED, RECIPES, TABLES, Recipe, Sampling  # noqa: E402

from perceptual_diffusion import SelfPerceptualObjective  # noqa: E402
from perceptual_diffusion.cli._errors import UserError  # noqa: E402


def chirp(low, high, seconds=0.2, rate=RATE):
    """A decaying sweep."""
    t = torch.arange(int(seconds * rate), dtype=torch.float64) / rate
    return ((2 * math.pi * (low + (high - low) * t / seconds / 2) * t).sin() * (-3 * t / seconds).exp()).float()


def tiny(channels, classes):
    """A UNet of seconds."""
    return _audio.UNet2DModel(
        sample_size=(32, 16), in_channels=channels, out_channels=channels, block_out_channels=(8,), norm_num_groups=4,
        layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
        num_class_embeds=classes + 1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve clips of two classes, low and high, mono and stereo, at two rates."""
    path = tmp_path_factory.mktemp("clips")
    for index in range(6):
        for name, low in (("low", 150), ("high", 2500)):
            rate = (44100, 22050)[index % 2]
            sound = 0.3 * chirp(low * (1 + 0.1 * index), low * 1.5, 0.2 + 0.3 * index, rate).numpy()
            soundfile.write(path / f"{name}_{index}.flac", np.stack([sound, sound], 1) if index % 3 else sound, rate)
    return path


@pytest.fixture(scope="module")
def base(folder):
    """A base of seconds, with a trained metric network."""
    weights = folder / "cnn.safetensors"
    made = replace(_audio.BASE, folder=folder, weights=weights, make=tiny, steps=4, batch=4)
    _audio.train_network(weights, _audio.load(folder), steps=30, batch=16)
    return made


@pytest.fixture
def small(base, monkeypatch, tmp_path):
    """The same, with folders of its own to write into, and recipes of two steps."""
    for module in (run, _bases):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "bases")
    monkeypatch.setattr(run, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(run, "RECIPES", {name: replace(r, steps=min(r.steps, 2)) for name, r in RECIPES.items()})
    path = tmp_path / "results.json"
    monkeypatch.setattr(run._rows, "read", lambda path=path, read=_rows.read: read(path))
    monkeypatch.setattr(run._rows, "add", lambda rows, add=_rows.add: add(rows, path))
    return base


# --- sound ----------------------------------------------------------------------------------------------------------------


def test_a_picture_turns_back_into_its_sound():
    sounds = torch.stack([torch.nn.functional.pad(chirp(low, 2 * low, 0.7), (0, 400))[:LENGTH] for low in (100, 2000)])
    pictures = _audio.to_pictures(sounds)
    assert (pictures.shape, pictures.dtype) == ((2, 8, 64, 32), torch.uint8)
    error = (_audio.to_sound(pictures) - sounds).square().mean(1) / sounds.square().mean(1)
    assert error.max() < 1e-3  # 30 dB
    assert _audio.to_sound(_audio.to_pictures(torch.zeros(1, LENGTH))).abs().max() < 1e-4


def test_a_spectrum_has_the_tone_where_it_is_whatever_its_phase():
    t = torch.arange(LENGTH) / RATE
    tones = torch.stack([(2 * math.pi * 1000 * t + phase).sin() for phase in (0.0, 1.0, 2.0)])
    seen = _audio.spectra(_audio.to_pictures(tones)).float()
    assert (seen[:, 0, :, 5:-5].mean(2).argmax(1) == round(1000 / RATE * 256)).all()
    assert (seen[0] - seen[1])[..., 5:-5].abs().max() < 8
    assert 230 < seen[..., 5:-5].max() <= 255


def test_a_clip_is_read_at_one_rate_with_peak_one_and_no_silent_end(folder, tmp_path):
    given = 0.3 * torch.nn.functional.pad(chirp(200, 200, 1.0, 44100), (0, 44100)).numpy()
    soundfile.write(tmp_path / "a_b.flac", np.stack([given, given], 1), 44100)
    sound = _audio.read_clip(tmp_path / "a_b.flac")
    assert sound.abs().max() == pytest.approx(1)
    assert 0.95 * RATE < len(sound) < 1.05 * RATE
    assert (sound[1000:1055] - chirp(200, 200, 1.0)[1000:1055] / chirp(200, 200, 1.0).abs().max()).abs().max() < 0.01


@pytest.mark.parametrize("length", [10, LENGTH, 5 * LENGTH])
def test_crops_reach_from_the_start_of_a_clip_to_its_end(length):
    sound = torch.arange(1, length + 1).float()
    cut = _audio.crops(sound, 8)
    assert cut.shape == (8, LENGTH)
    rest = LENGTH // 4
    assert torch.equal(cut[0, rest:][: min(length, LENGTH - rest)], sound[: LENGTH - rest])
    assert (cut[0, :rest] == 0).all()
    assert length in cut[-1]
    assert len({tuple(row[:3000:100].tolist()) for row in cut}) == 8 or length == 10


def test_every_tenth_clip_is_held_out_with_all_its_crops(folder):
    split = _audio.load(folder)
    assert (len(split.train), len(split.held_out)) == (11 * _audio.CROPS, _audio.CROPS)
    assert split.train.classes == ("high", "low")
    held_out = _audio.to_pictures(_audio.crops(_audio.read_clip(sorted(folder.glob("*.flac"))[9])))
    assert torch.equal(split.held_out.images, held_out)
    assert split.held_out.labels.tolist() == [1] * _audio.CROPS
    assert not (split.train.images[:, None] == held_out[None, ::8]).flatten(2).all(2).any()
    assert not split.train.mirror.any()  # a sound played backwards is another


def test_a_folder_without_clips_names_the_package(tmp_path):
    with pytest.raises(UserError, match="sonic-pi-samples"):
        _audio.load(tmp_path)


def test_samples_become_wav_files(tmp_path):
    sound = torch.nn.functional.pad(chirp(300, 900, 0.5), (0, LENGTH))[None, :LENGTH]
    _audio.write_wav(tmp_path / "new", _audio.to_pictures(sound), ["00 low"])
    read, rate = soundfile.read(tmp_path / "new/00 low.wav")
    assert rate == RATE
    assert np.abs(read - sound[0].numpy()).max() < 0.05


def test_the_sonic_pi_samples_are_what_the_benchmark_says():
    if not _audio.FOLDER.is_dir():
        pytest.skip("Debian's package `sonic-pi-samples` is not installed")
    paths = sorted(_audio.FOLDER.glob("*.flac"))
    assert len(paths) == 165
    assert len({path.stem.partition("_")[0] for path in paths}) == 14
    sound = _audio.crops(_audio.read_clip(_audio.FOLDER / "drum_snare_hard.flac"), 4)
    error = (_audio.to_sound(_audio.to_pictures(sound)) - sound).square().mean() / sound.square().mean()
    assert error < 1e-2


# --- the metric network ---------------------------------------------------------------------------------------------------


def test_the_network_tells_classes_and_the_metrics_tell_sounds(base):
    train = base.train
    half = torch.arange(len(train)) % 2 == 0
    same = base.measure(train.images[half], train.labels[half], "cpu")
    assert same["class-SonicCNN"] > 0.9
    assert same["nearest"] < 1e-3
    noise = torch.randint(0, 256, (64, 8, 64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    far = base.measure(noise, train.labels[:64], "cpu")
    assert far["FD-SonicCNN"] > 10 * same["FD-SonicCNN"]
    assert far["KID-SonicCNN"] > 10 * abs(same["KID-SonicCNN"])
    assert far["nearest"] > 0.1
    assert not any("precision" in name or "recall" in name for name in same)


def test_references_are_halves_and_held_out_clips(base):
    (n, halves), (m, held_out) = base.references("cpu", 0).values()
    assert halves["FD-SonicCNN"] < held_out["FD-SonicCNN"]
    assert held_out["nearest"] > 0
    assert (n, m) == (11 * _audio.CROPS // 2, _audio.CROPS)


# --- training and rows ----------------------------------------------------------------------------------------------------


def test_the_objective_finds_the_middle_of_the_model_by_itself():
    objective = SelfPerceptualObjective.wrap(_audio.audio_unet(32, 3), _bases.ddim())
    assert objective.teacher.layers == ("mid_block",)


def test_a_model_sees_scaled_pictures_and_no_other_clips(base):
    tuning = run.tuning(base, base.build(), RECIPES["recommended"], 0, "cpu")
    clean, cond = tuning._batch(torch.Generator().manual_seed(0))
    assert clean.shape == (4, 32, 32, 16)
    back = base.finish(clean)
    for picture, label in zip(back, cond["class_labels"], strict=True):
        same = (base.train.images == picture).flatten(1).all(1)
        assert same.any()
        assert label in (base.null, *base.train.labels[same])


def test_training_learns(base):
    tuning = run.tuning(base, base.build(), Recipe(loss="mse", lr=2e-3), 0, "cpu", batch=8, factor=lambda step: 1.0)

    def loss():
        tuning.batch, (one, other) = 64, (torch.Generator().manual_seed(seed) for seed in (0, 1))
        with torch.no_grad():
            found = float(tuning._loss(*tuning._batch(one), other))
        tuning.batch = 8
        return found

    before = loss()
    for _ in range(25):
        tuning.step()
    assert loss() < 0.8 * before


def test_a_base_is_trained_and_compared_once(small, monkeypatch, tmp_path, capsys):
    stop = run.Budget(1e6)
    run.train_base(small, "cpu", stop, 4, n=16)
    found = json.loads((_bases.FOLDER / f"{small.name}.json").read_text())["log"][-1]
    assert {"FD-SonicCNN", "KID-SonicCNN", "class-SonicCNN", "nearest"} < set(found)
    for name in COMPARED:
        run.make_rows("audio", small, name, Sampling(steps=2), 0, 16, "cpu", stop)
    rows = run._rows.read()
    assert {row["loss"] for row in rows} == set(COMPARED) == {name for _, name, _ in TABLES["audio"]}
    cost = {row["loss"]: row["compute"] for row in rows}
    steps = {row["loss"]: row["steps"] for row in rows}
    each = cost["mse-equal-compute"] / steps["mse-equal-compute"]
    assert abs(cost["mse-equal-compute"] - cost["recommended"]) <= each / 2
    folders = list((tmp_path / "runs").glob("*, guidance *"))
    assert len(folders) == 4
    assert all(len(list(folder.glob("*.wav"))) == 16 for folder in folders)


def test_the_command_stops_when_its_time_is_up_and_goes_on(small, monkeypatch, capsys):
    monkeypatch.setitem(run.BASES, small.name, small)
    monkeypatch.setattr(run.sys, "argv", ["run.py", "base", small.name, "--minutes", "0", "--every", "4"])
    done = []
    for _ in range(2):
        run.main()
        done.append(run.load_state(run.RUNS / f"{small.name}.safetensors")[1]["done"])
    assert 0 < done[0] < done[1] <= 4
    assert "the same command goes on" in capsys.readouterr().out
