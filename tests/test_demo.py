"""The command: what it writes, how it resumes, what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import resources

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from perceptual_diffusion.cli import datasets, demo, files, metrics, report, sampling, training
from perceptual_diffusion.cli._app import app
from perceptual_diffusion.cli._errors import UserError

BASE = resources.files("perceptual_diffusion") / "assets/base"
PNGS = {"comparison.png", "loss.png", "trajectory.png"} | {f"samples-{name}.png" for name in demo.LABELS}


@pytest.fixture
def pictures(tmp_path):
    """Forty pictures of two classes in a folder."""
    train = datasets.load("emoji").train
    for index, picture in enumerate(train.images[:40]):
        folder = tmp_path / "pictures" / ("even" if index % 2 == 0 else "odd")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return tmp_path / "pictures"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "BATCH", 4)
    monkeypatch.setattr(demo, "BASE_STEPS", 1)
    monkeypatch.setattr(demo, "SAMPLING_STEPS", 8)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_packaged_base_model_is_small_v_prediction_zero_snr_and_class_conditional():
    model, scheduler = demo.load_base(9)
    assert (BASE / "diffusion_pytorch_model.safetensors").stat().st_size <= 8_000_000
    assert model.config.num_class_embeds == 10
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"
    assert float(scheduler.alphas_cumprod[-1]) == 0
    record = json.loads((BASE / "training.json").read_text())
    assert {"command", "seed", "steps", "hardware", "date"} <= record.keys()


def test_the_packaged_base_model_denoises_pictures_it_never_saw():
    """A held-out v-prediction loss far below that of the best constant, which is about 1."""
    model, scheduler = demo.load_base(9)
    held_out = datasets.load("emoji").held_out
    clean = datasets.to_model(held_out.images[:64])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(clean.shape, generator=generator)
    t = torch.randint(0, 1000, (64,), generator=generator)
    with torch.no_grad():
        output = model.eval()(scheduler.add_noise(clean, noise, t), t, held_out.labels[:64]).sample
    assert float((output - scheduler.get_velocity(clean, noise, t)).square().mean()) < 0.2


def test_the_demo_writes_everything_it_promises(tmp_path, pictures, quick):
    out = tmp_path / "out"
    result = invoke("demo", "--steps", 2, "--samples", 16, "--dataset", pictures, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert {p.name for p in out.iterdir()} == {"report.html", "metrics.json", "model"} | PNGS
    facts = json.loads((out / "metrics.json").read_text())
    assert [row["model"] for row in facts["rows"]] == ["real", "base", "guidance", "mse", "self-perceptual"]
    assert all(row["n"] == 16 for row in facts["rows"])
    assert facts["network"].startswith("EffLite0")
    assert facts["settings"]["steps"] == 2
    assert facts["mse_steps"] >= 2
    assert len(facts["verdict"]) == 2
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert not re.search(r'(src|href)="(?!data:)', page)
    for name in PNGS:
        with Image.open(out / name) as picture:
            picture.verify()

    from diffusers import DDIMScheduler, UNet2DModel

    tuned = UNet2DModel.from_pretrained(out / "model")
    scheduler = DDIMScheduler.from_pretrained(out / "model")
    base, _ = demo.load_base(2)
    changed = (tuned.conv_in.weight - base.conv_in.weight).detach().abs().max()
    assert 0 < float(changed) < 0.1
    made = sampling.sample(tuned, scheduler, torch.randn(2, 12, 16, 16), torch.tensor([0, 1]), steps=2)
    assert bool(made.isfinite().all())


def test_resuming_gives_the_weights_of_an_uninterrupted_run_to_the_bit(tmp_path, quick):
    train = datasets.load("emoji").train

    def tuning():
        model, scheduler = demo.load_base(9)
        return training.FineTuning(model, scheduler, train, loss="self-perceptual", seed=3, batch=4, lr=1e-4)

    key = {"seed": 3}
    whole = tuning()
    expected = whole.run(5, state=tmp_path / "a.safetensors", stop=training.Stop(), key=key).state_dict()

    stop = training.Stop()
    first = tuning()

    def ask(step, row):
        stop.asked = step == 2

    with pytest.raises(training.Interrupted):
        first.run(5, state=tmp_path / "b.safetensors", stop=stop, key=key, progress=ask)
    second = tuning()
    torch.manual_seed(99)  # the saved streams count, not the process'
    resumed = second.run(5, state=tmp_path / "b.safetensors", stop=training.Stop(), key=key).state_dict()
    assert second.history == whole.history
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_state_of_another_run_is_refused(tmp_path, quick):
    train = datasets.load("emoji").train
    model, scheduler = demo.load_base(9)
    tuning = training.FineTuning(model, scheduler, train, loss="mse", seed=0, batch=2)
    tuning.run(1, state=tmp_path / "s.safetensors", stop=training.Stop(), key={"seed": 0})
    with pytest.raises(UserError, match="another seed"):
        tuning.run(2, state=tmp_path / "s.safetensors", stop=training.Stop(), key={"seed": 1})


def test_the_teacher_of_the_demo_holds_0_41_of_the_weights_after_its_first_pass():
    model, scheduler = demo.load_base(9)
    tuning = training.FineTuning(
        model, scheduler, datasets.load("emoji").train, loss="self-perceptual", seed=0, batch=2
    )
    tuning.step()
    total = sum(p.numel() for p in model.parameters())
    assert (tuning.objective.teacher.parameters_held, total) == (1_603_424, 3_903_692)


def test_both_losses_see_the_same_batches_times_and_noise():
    train = datasets.load("emoji").train
    seen = {}
    for loss in ("self-perceptual", "mse"):
        model, scheduler = demo.load_base(9)
        tuning = training.FineTuning(model, scheduler, train, loss=loss, seed=0, batch=2)
        tuning.count_flops()
        rows = seen[loss] = []
        model.register_forward_pre_hook(
            lambda module, args, kwargs, rows=rows: rows.append(
                (
                    (args[0] if args else kwargs["sample"]).detach().clone(),
                    kwargs.get("timestep", args[-1] if args else None),
                )
            ),
            with_kwargs=True,
        )
        for _ in range(3):
            tuning.step()
    assert len(seen["mse"]) == len(seen["self-perceptual"]) == 3
    for (x, t), (y, u) in zip(seen["mse"], seen["self-perceptual"], strict=True):
        assert torch.equal(x, y)
        assert t.tolist() == u.tolist()


def test_mse_training_takes_the_gradient_of_the_mean_squared_error():
    train = datasets.load("emoji").train
    model, scheduler = demo.load_base(9)
    tuning = training.FineTuning(model, scheduler, train, loss="mse", seed=0, batch=4)
    tuning.model.eval()
    clean, cond = tuning._batch(torch.Generator().manual_seed(5))
    tuning._loss(clean, cond, torch.Generator().manual_seed(6)).backward()
    got = model.conv_out.weight.grad.clone()

    generator = torch.Generator().manual_seed(6)
    t = (torch.rand(4, dtype=torch.float64, generator=generator) * 1000).long()
    noise = torch.randn(clean.shape, generator=generator)
    model.zero_grad()
    output = model(scheduler.add_noise(clean, noise, t), t, **cond).sample
    (output - scheduler.get_velocity(clean, noise, t)).square().mean().backward()
    torch.testing.assert_close(got, model.conv_out.weight.grad, rtol=1e-4, atol=1e-7)


def test_a_state_folder_of_another_program_is_never_touched(tmp_path, pictures, quick):
    foreign = tmp_path / "project" / "state" / "terraform.tfstate"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("precious")
    for extra in ([], ["--resume"]):
        result = invoke("demo", "--dataset", pictures, "--out", tmp_path / "project", *extra)
        assert result.exit_code == 2
        assert foreign.read_text() == "precious"


def test_a_folder_called_emoji_is_not_the_packaged_set(tmp_path, pictures, quick):
    folder = pictures.rename(tmp_path / "emoji")
    result = invoke(
        "demo", "--steps", 1, "--samples", 16, "--dataset", folder, "--out", tmp_path / "o", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["base_steps"] == 1


def test_a_state_of_an_earlier_version_is_refused_with_what_it_lacks(tmp_path):
    out, key = tmp_path / "out", {"seed": 3, "data": "0"}
    files.write(out / "state/run.json", json.dumps({"made by": demo.MADE_BY, "saved": [], "seed": 3}))
    with pytest.raises(UserError, match="another version, which did not write down its data: "):
        demo._check(out, True, key)


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 100_000, b"\xff", b'{"made by": "perceptual-diffusion demo", "saved": 5}'])  # fmt: skip
def test_a_damaged_description_of_a_run_is_named(tmp_path, content):
    files.save_state(tmp_path / "state/base.safetensors", {}, {})
    (tmp_path / "state/run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json' is missing or damaged"):
        demo._check(tmp_path, True, {})


@pytest.mark.parametrize("wrong", [{"mse": "x"}, {}, None, {"mse": 1.0, "sp": 1.0}])
def test_a_history_of_something_else_is_refused(tmp_path, wrong):
    train, path = datasets.load("emoji").train, tmp_path / "s.safetensors"

    def tuning():
        return training.FineTuning(*demo.load_base(9), train, loss="mse", seed=0, batch=1)

    tuning().run(2, state=path, stop=training.Stop(), key={})
    tensors, meta = files.load_state(path)
    files.save_state(path, tensors, meta | {"history": [meta["history"][0], wrong]})
    with pytest.raises(UserError, match="does not fit this run"):
        tuning().run(3, state=path, stop=training.Stop(), key={})


@pytest.mark.parametrize("break_it", ["history", "done", "optimizer", "optimizer.3.step", "rng", "list"])
def test_a_state_that_lacks_a_part_is_refused(tmp_path, break_it):
    train = datasets.load("emoji").train
    path = tmp_path / "s.safetensors"

    def tuning():
        model, scheduler = demo.load_base(9)
        return training.FineTuning(model, scheduler, train, loss="self-perceptual", seed=0, batch=2)

    tuning().run(1, state=path, stop=training.Stop(), key={})
    tensors, meta = files.load_state(path)
    if break_it in meta:
        del meta[break_it]
    meta = [] if break_it == "list" else meta
    files.save_state(path, {k: v for k, v in tensors.items() if not k.startswith(break_it)}, meta)
    with pytest.raises(UserError, match="Delete its folder"):
        tuning().run(2, state=path, stop=training.Stop(), key={})


def test_an_interrupted_demo_is_resumed_and_finished(tmp_path, pictures, quick, monkeypatch):
    out = tmp_path / "out"
    arguments = ("demo", "--steps", 3, "--samples", 16, "--dataset", pictures, "--out", out, "--device", "cpu")
    step = training.FineTuning.step

    def ctrl_c(self):
        if self.loss_name == "mse" and self.objective.teacher and self.done == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(training.FineTuning, "step", ctrl_c)
    monkeypatch.setattr(demo, "BASE_STEPS", 1)
    first = invoke(*arguments)
    assert first.exit_code == 130
    assert "--resume" in first.stderr
    assert (out / "state" / "self-perceptual.safetensors").exists()
    assert (out / "state" / "mse.safetensors").exists()
    monkeypatch.setattr(training.FineTuning, "step", step)

    again = invoke(*arguments)
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    other = invoke(*arguments, "--seed", 7, "--resume")
    assert other.exit_code == 2
    assert "another seed" in other.stderr
    picture = next(pictures.rglob("*.png"))
    kept = picture.read_bytes()
    Image.new("RGB", (32, 32), "red").save(picture)
    assert "another data. Use the same" in invoke(*arguments, "--resume").stderr
    picture.write_bytes(kept)
    last = invoke(*arguments, "--resume")
    assert last.exit_code == 0, last.output
    assert (out / "report.html").exists()
    assert not (out / "state").exists()

    straight = tmp_path / "straight"
    assert invoke(*arguments[:-3], straight, "--device", "cpu").exit_code == 0
    mine, theirs = (json.loads((folder / "metrics.json").read_text())["rows"] for folder in (out, straight))
    assert mine == theirs


def test_ctrl_c_in_a_real_process_leaves_a_resumable_state(tmp_path, pictures):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        "from perceptual_diffusion.cli import main; main()",
        "demo",
        "--dataset",
        str(pictures),
    ]
    process = subprocess.Popen([*command, "--out", str(out), "--device", "cpu"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "state").is_dir() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "--resume" in errors
    tensors, meta = files.load_state(out / "state" / "base.safetensors")
    assert meta["done"] >= 1
    assert "model.conv_in.weight" in tensors


def test_earlier_results_are_kept(tmp_path, pictures, quick):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text(json.dumps({"made by": demo.MADE_BY}))
    (out / "mine.txt").write_text("kept")
    result = invoke("demo", "--steps", 1, "--samples", 16, "--dataset", pictures, "--out", out, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.1" / "mine.txt").read_text() == "kept"
    assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--samples", "1"], "--samples is 1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--device", "gpu9"], "--device is 'gpu9'"),
        (["--dataset", "nonesuch"], "unknown dataset 'nonesuch'"),
        (["--dataset", ""], "unknown dataset ''"),
        (["--dataset", "~nosuchuser/x"], "unknown dataset '~nosuchuser/x'"),
        (["--dataset", "x" * 300], "xxx"),
        (["--seed", "99999999999"], "--seed is 99999999999"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_bad_arguments_are_one_clear_sentence(tmp_path, arguments, message):
    result = invoke("demo", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_out_that_no_folder_can_have_is_refused(tmp_path):
    result = invoke("demo", "--out", tmp_path / ("x" * 300))
    assert result.exit_code == 2
    assert "cannot be used" in result.stderr


def test_an_out_in_what_is_no_folder_is_named_once(tmp_path):
    (tmp_path / "file").write_text("mine")
    result = invoke("demo", "--out", tmp_path / "file/out")
    assert result.exit_code == 2
    assert result.stderr.count("file/out") == 1
    assert "Not a directory. Give another folder." in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    result = invoke("demo", "--out", tmp_path)
    assert result.exit_code == 2
    assert "holds other files" in result.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_damaged_base_model_is_named(tmp_path, monkeypatch):
    (tmp_path / "assets" / "base").mkdir(parents=True)
    for file in BASE.iterdir():
        (tmp_path / "assets" / "base" / file.name).write_bytes(file.read_bytes()[:5000])
    monkeypatch.setattr(demo.resources, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match=r"base model .* cannot be read"):
        demo.load_base(9)


def test_write_leaves_the_old_file_when_the_new_one_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    files.write(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_write_folder_leaves_the_old_folder_when_the_new_one_fails(tmp_path):
    path = tmp_path / "model"
    files.write_folder(path, lambda folder: files.write(folder / "a", "old"))

    def fail(folder):
        (folder / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_folder(path, fail)
    assert (path / "a").read_text() == "old"
    files.write_folder(path, lambda folder: files.write(folder / "a", "new"))
    assert (path / "a").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_damaged_state_raises_and_never_starts_anew(tmp_path):
    path = tmp_path / "s.safetensors"
    files.save_state(path, {"x": torch.arange(3)}, {"done": 1})
    tensors, meta = files.load_state(path)
    assert tensors["x"].tolist() == [0, 1, 2]
    assert meta == {"done": 1}
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="cannot be read"):
        files.load_state(path)


def test_guidance_of_one_is_the_plain_sample_and_guidance_moves_it():
    model, scheduler = demo.load_base(9)
    noise, labels = torch.randn(2, 12, 16, 16), torch.tensor([0, 8])
    plain = sampling.sample(model, scheduler, noise, labels, steps=3)
    torch.testing.assert_close(
        plain, sampling.sample(model, scheduler, noise, labels, steps=3, batch=1), atol=1e-4, rtol=1e-4
    )
    guided = sampling.sample(model, scheduler, noise, labels, steps=3, guidance=3.0, null=9)
    assert float((guided - plain).abs().mean()) > 0.01
    with pytest.raises(ValueError, match="null"):
        sampling.sample(model, scheduler, noise, labels, steps=3, guidance=3.0)


def test_the_sampler_starts_at_the_last_timestep_and_the_trajectory_ends_at_the_sample():
    model, scheduler = demo.load_base(9)
    noise, labels = torch.randn(1, 12, 16, 16), torch.tensor([0])
    clean, times = sampling.trajectory(model, scheduler, noise, labels, steps=5, keep=5)
    assert times == [999, 799, 599, 399, 199]
    torch.testing.assert_close(clean[-1], sampling.sample(model, scheduler, noise, labels, steps=5))


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_metrics_grow_with_the_damage_and_vanish_for_the_same_set():
    network = metrics.Network()
    train = datasets.load("emoji").train
    images = train.images[::20]
    known = metrics.features(network, images)
    assert known.shape == (len(images), 1280)
    same = metrics.compare(known, known)
    light = metrics.compare(known, metrics.features(network, _noisy(images, 20)))
    heavy = metrics.compare(known, metrics.features(network, _noisy(images, 80)))
    name = "FD-EffLite0"
    assert same[name] == pytest.approx(0, abs=1e-3)
    assert same[name] < light[name] < heavy[name]
    assert light["KID-EffLite0"] < heavy["KID-EffLite0"]


def _noisy(images, strength):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * strength
    return (images.float() + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_the_frechet_distance_of_a_shifted_set_is_the_squared_shift():
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(1280)
    mean[:3] = torch.tensor([3.0, 4.0, 12.0])
    real = torch.randn(64, 1280, generator=generator)
    assert metrics.compare(real, real + mean)["FD-EffLite0"] == pytest.approx(169.0, rel=1e-4)


def test_nearest_is_zero_for_a_copy_and_the_pixel_distance_otherwise():
    train = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    train[1] = 255
    near = metrics.nearest(train, torch.stack([train[1], torch.full((3, 32, 32), 51, dtype=torch.uint8)]))
    torch.testing.assert_close(near, torch.tensor([0.0, 0.2]), atol=1e-5, rtol=1e-4)


def test_the_paired_kid_difference_equals_leaving_samples_out_one_by_one():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(9, 1280, generator=generator), torch.randn(6, 1280, generator=generator)
    other = fake + 0.3 * torch.randn(6, 1280, generator=generator) + 0.5

    def kid(samples):
        def kernel(x, y):
            return (x.double() @ y.double().T / 1280 + 1) ** 3

        def off_diagonal(k):
            return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

        return 1000 * (
            off_diagonal(kernel(real, real)) + off_diagonal(kernel(samples, samples)) - 2 * kernel(samples, real).mean()
        )

    left_out = torch.stack([kid(fake[torch.arange(6) != i]) - kid(other[torch.arange(6) != i]) for i in range(6)])
    error = (5 / 6 * (left_out - left_out.mean()).square().sum()).sqrt()
    difference = metrics.kid_difference(real, fake, other)
    assert difference == pytest.approx((float(kid(fake) - kid(other)), float(error)), rel=1e-9)
    assert metrics.kid_difference(real, fake, fake) == (0.0, 0.0)


def _rows(ours, control):
    values = {"real": 1.0, "base": 12.0, "guidance": 9.0, "mse": control, "self-perceptual": ours}
    return [{"model": name, "KID": value} for name, value in values.items()]


def test_the_verdict_says_worse_when_it_is_worse():
    assert "WORSE than MSE by 2, 20.0%." in report.verdict(_rows(12.0, 10.0), ["KID"])[0]
    assert "better than MSE by 2, 20.0%." in report.verdict(_rows(8.0, 10.0), ["KID"])[0]
    assert "no clear change" in report.verdict(_rows(9.9, 10.0), ["KID"])[0]
    assert "no clear change" in report.verdict(_rows(8.0, 10.0), ["KID"], {"KID": (-2.0, 1.5)})[0]
    assert (
        "WORSE than MSE by 0.1, 1.0% (standard error 0.01)"
        in report.verdict(_rows(10.1, 10.0), ["KID"], {"KID": (0.1, 0.01)})[0]
    )


def test_the_command_tells_its_version_and_its_options():
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", invoke("--version").output)
    text = invoke("demo", "--help").output
    for option in ("--steps", "--seed", "--out", "--device", "--dataset", "--resume"):
        assert option in text
