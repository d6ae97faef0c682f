"""The examples without text: each runs tiny and offline, writes what it says, and goes on exactly where it was stopped."""

import contextlib
import importlib.util
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("tensorboard")

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

from perceptual_diffusion import SelfPerceptualObjective

FOLDER = Path(__file__).parents[1] / "examples"
NEEDS = {
    "unconditional": (),
    "dit": ("timm",),
    "edm": (),
    "video": ("av",),
    "audio": ("soundfile", "matplotlib", "scipy"),
}
SAMPLES = {"video": "gif", "audio": "wav"}
LOADED = {}


def load(name):
    """The example as a module."""
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    if name not in LOADED:
        spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
        LOADED[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(LOADED[name])
    return LOADED[name]


def run(name, out, *arguments):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        load(name).main(["--smoke", "--out", str(out), *arguments])
    return said.getvalue()


def refused(capsys, name, out, *arguments):
    """Run an example that must refuse, and give the sentence it says."""
    with pytest.raises(SystemExit) as error:
        load(name).main(["--smoke", "--out", str(out), *arguments])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def weights(folder):
    return load_file(next(folder.rglob("diffusion_pytorch_model.safetensors")))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module", params=NEEDS)
def finished(request, tmp_path_factory):
    """An example that has run, where, and the weights that each objective was built on."""
    out, wrapped = tmp_path_factory.mktemp(request.param) / "out", []
    original = SelfPerceptualObjective.wrap.__func__

    def wrap(cls, model, *arguments, **options):
        wrapped.append({key: value.clone() for key, value in model.state_dict().items()})
        return original(cls, model, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelfPerceptualObjective, "wrap", classmethod(wrap))
        run(request.param, out)
    return request.param, out, wrapped


def test_samples_of_base_and_model_are_written_and_differ(finished):
    name, out, _ = finished
    suffix = SAMPLES.get(name, "png")
    base, model = (out / f"{stage}.{suffix}" for stage in ("base", "model"))
    assert base.read_bytes() != model.read_bytes()
    if suffix == "wav":
        import soundfile

        sound, rate = soundfile.read(model)
        assert rate == 11025
        assert len(sound) == 4 * 8064
        assert 0 < abs(sound).max() <= 1
    else:
        with Image.open(model) as image:
            image.load()
            assert getattr(image, "n_frames", 1) == (8 if suffix == "gif" else 1)
            assert np.array(image.convert("RGB")).std() > 1
    if name == "audio":
        assert np.array(Image.open(out / "model.png")).std() > 1


def test_the_saved_model_loads_by_its_class_and_has_moved_from_the_base(finished):
    name, out, _ = finished
    import diffusers

    kind = {
        "unconditional": diffusers.DDIMPipeline, "video": diffusers.UNet3DConditionModel, "audio": diffusers.UNet2DModel,
        "dit": getattr(load(name), "DiT", None), "edm": getattr(load(name), "Denoiser", None),
    }[name]  # fmt: skip
    loaded = kind.from_pretrained(out / "model")
    loaded = loaded.unet if name == "unconditional" else loaded
    assert same(loaded.state_dict(), weights(out / "model"))
    assert not same(weights(out / "base"), weights(out / "model"))


def test_the_teacher_is_a_copy_of_the_trained_base(finished):
    _, out, wrapped = finished
    untrained, base = wrapped
    assert same(base, weights(out / "base"))
    assert not same(untrained, base)


def test_the_base_is_trained_without_a_perceptual_term_and_the_model_with_one(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, out, _ = finished
    logged = {}
    for stage in ("base", "model"):
        events = EventAccumulator(str(out / "logs" / stage)).Reload()
        logged[stage] = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
        assert logged[stage]["mse"] > 0
        assert any(tag.startswith("mse/t ") for tag in logged[stage])
    assert logged["base"]["sp"] == 0 < logged["model"]["sp"]
    assert any(tag.startswith("features/") and value > 0 for tag, value in logged["model"].items())


def test_a_run_that_is_stopped_in_either_training_ends_with_the_same_weights(finished, tmp_path, monkeypatch):
    name, out, _ = finished
    clip = Accelerator.clip_grad_norm_
    for steps in (3, 4):  # of a state every 2 of 4 steps: stopped in the base's third, then in the model's third
        left = iter(range(steps))

        def stop(self, *arguments, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return clip(self, *arguments)

        monkeypatch.setattr(Accelerator, "clip_grad_norm_", stop)
        with pytest.raises(KeyboardInterrupt):
            run(name, tmp_path / "out", *(["--resume"] if steps == 4 else []))
        assert not (tmp_path / "out/model").exists()
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    assert [x.name for x in (tmp_path / "out/state/model").iterdir()] == ["step-00000002"]
    run(name, tmp_path / "out", "--resume")
    for stage in ("base", "model"):
        assert same(weights(tmp_path / "out" / stage), weights(out / stage))


def test_a_folder_with_something_in_it_is_not_touched_without_resume(finished, capsys):
    name, out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "is not empty" in refused(capsys, name, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_another_model_batch_or_seed_is_refused_on_resume(finished, capsys):
    name, out, _ = finished
    for option, value in (("--model", "other"), ("--batch", "3"), ("--seed", "5")):
        said = refused(capsys, name, out, "--resume", option, value)
        assert re.search(rf"is of .* and this run of .*{option[2:]} '?{value}", said), said


@pytest.mark.parametrize("name", ["unconditional", "drop_in"])
def test_other_data_is_refused_on_resume(name, tmp_path, capsys):
    for number in range(8):
        (tmp_path / f"data/{number % 4}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (30 * number, 0, 90)).save(tmp_path / f"data/{number % 4}/{number}.png")
    run(name, tmp_path / "out")
    assert "is of " in refused(capsys, name, tmp_path / "out", "--resume", "--data", str(tmp_path / "data"))
    run(name, tmp_path / "out", "--resume")


@pytest.fixture
def in_bf16(monkeypatch):
    """What `accelerate launch --mixed_precision bf16` sets, and nothing of it afterwards."""

    def forget():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    forget()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    yield
    forget()


@pytest.mark.parametrize("name", [*NEEDS, "drop_in"])
def test_in_mixed_precision_student_and_teacher_run_in_half_and_the_loss_in_float32(
    name, tmp_path, in_bf16, monkeypatch
):
    seen, losses, last = {}, [], {}
    kinds = torch.nn.Conv2d | torch.nn.Conv3d | torch.nn.Linear
    wrap, backward = SelfPerceptualObjective.wrap.__func__, Accelerator.backward

    def wrapped(cls, model, *arguments, **options):
        seen.clear()  # what came before: the samples of the base, and its training
        last.update(model=model, objective=wrap(cls, model, *arguments, **options))
        return last["objective"]

    def watched(self, loss, **options):
        losses.append(loss.dtype)
        return backward(self, loss, **options)

    def saw(module, given, output):
        if isinstance(module, kinds):
            seen.setdefault(module, set()).add(output.dtype)

    monkeypatch.setattr(SelfPerceptualObjective, "wrap", classmethod(wrapped))
    monkeypatch.setattr(Accelerator, "backward", watched)
    hook = torch.nn.modules.module.register_module_forward_hook(saw)
    try:
        run(name, tmp_path / "out")
    finally:
        hook.remove()
    student, teacher = ({*part.modules()} & seen.keys() for part in (last["model"], last["objective"].teacher.module))
    assert student
    assert teacher
    assert not student & teacher
    for part in (student, teacher):
        assert {dtype for layer in part for dtype in seen[layer]} == {torch.bfloat16}
    assert {*losses} == {torch.float32}


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")  # of diffusers' own call of the hub
@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.parametrize("options", [("--data", "missing"), ("--model", "missing"), ("--batch", "0")])
def test_bad_input_ends_with_a_sentence_and_nothing_written(name, options, tmp_path, capsys):
    said = refused(capsys, name, tmp_path / "out", *options)
    assert "missing" in said.splitlines()[-1] or "--batch" in said.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["unconditional", "edm"])
def test_broken_pictures_are_counted_and_named(name, tmp_path, capsys):
    Image.new("RGB", (40, 50), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    module = load(name)
    pictures = module.read(str(tmp_path), 32) if name == "unconditional" else module.read(str(tmp_path))
    assert pictures.shape == (1, 3, 32, 32)
    said = capsys.readouterr().err
    assert "1 pictures are left out" in said
    assert "bad.png" in said


def test_broken_pictures_of_classes_are_counted_and_named(tmp_path):
    for label in ("one", "two"):
        (tmp_path / label).mkdir()
        for number in range(4):
            Image.new("RGB", (32, 32), (60 * number, 0, 90)).save(tmp_path / label / f"{number}.png")
    (tmp_path / "two/bad.png").write_bytes(b"no picture")
    said = run("dit", tmp_path / "out", "--data", str(tmp_path), "--base-steps", "1", "--steps", "1")
    assert "1 broken" in said
    assert "bad.png" in said
    assert load("dit").DiT.from_pretrained(tmp_path / "out/model").config.classes == 2


def film(path, frames):
    pictures = [Image.new("RGB", (48, 36), (9 * frame, 90, 200 - 9 * frame)) for frame in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40)


def test_films_that_are_broken_or_too_short_are_named_and_the_others_cut_into_clips(tmp_path, capsys):
    module = load("video")
    film(tmp_path / "good.gif", 20)
    film(tmp_path / "short.gif", 5)
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    clips = module.read(str(tmp_path))
    assert clips.shape == (2, 8, 3, 32, 32)
    assert clips.dtype == torch.uint8
    red = clips[0, :, 0].float().mean((1, 2))
    assert (red.diff() - 18).abs().max() < 6, "every second frame, in order"
    said = capsys.readouterr().err
    assert "2 files are left out" in said
    assert "short.gif" in said
    assert "bad.mp4" in said


def test_a_folder_of_films_that_are_all_too_short_is_refused(tmp_path, capsys):
    (tmp_path / "films").mkdir()
    film(tmp_path / "films/short.gif", 5)
    assert "no film of 16 frames" in refused(capsys, "video", tmp_path / "out", "--data", str(tmp_path / "films"))
    assert not (tmp_path / "out").exists()


def test_sounds_that_are_broken_too_short_or_silent_are_named(tmp_path, capsys):
    module = load("audio")
    import soundfile

    time = np.arange(44100) / 44100
    for name, sound in {"good": 0.1 * np.sin(880 * np.pi * time), "short": time[:99], "silent": 0 * time}.items():
        soundfile.write(tmp_path / f"{name}.wav", sound, 44100)
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    crops = module.read(str(tmp_path))
    assert crops.shape == (3, 8064)
    assert float(crops.abs().max()) == pytest.approx(1, abs=0.02)
    said = capsys.readouterr().err
    assert "3 files are left out" in said
    assert all(name in said for name in ("short.wav", "silent.wav", "bad.wav"))


def test_what_the_audio_model_sees_turns_back_into_the_sound():
    module = load("audio")
    sound = module.read("")[:8]
    assert torch.allclose(module.to_sound(module.to_model(sound)), sound, atol=2e-3)


def test_the_edm_denoiser_of_a_network_that_gives_nothing_is_the_best_linear_one():
    module = load("edm")
    model = module.Denoiser((16, 32, 32), 0.5)
    torch.nn.init.zeros_(model.unet.conv_out.weight)
    torch.nn.init.zeros_(model.unet.conv_out.bias)
    x, sigma = torch.randn(2, 3, 32, 32), torch.tensor([0.5, 2.0])
    assert torch.allclose(model(x, sigma), x * (0.25 / (0.25 + sigma**2)).view(-1, 1, 1, 1))


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_is_short_and_clean(name):
    path = FOLDER / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 150
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", str(path)]
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    load("dit")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # accelerate 1.15 starts one process alone for `--cpu --num_processes 2`; this is how it starts two without a GPU
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", port, str(FOLDER / "dit.py"), "--smoke", "--out", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    state = tmp_path / "out/state/model/step-00000004"
    streams = [load_file(state / f"objective-{rank}.safetensors")["generator"] for rank in range(2)]
    assert not torch.equal(*streams)
    assert not same(weights(tmp_path / "out/base"), weights(tmp_path / "out/model"))
    one = tmp_path / "one"
    run("dit", one)
    assert not same(weights(one / "model"), weights(tmp_path / "out/model")), "the second process's samples count too"
