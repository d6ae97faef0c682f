"""`perceptual-diffusion sample`: what a picture depends on, what is written, what is refused."""

import json
import os
import shutil
import signal
import sys
import warnings

import numpy as np
import pipelines
import pytest
import torch
from models import dit
from PIL import Image
from typer.testing import CliRunner

from perceptual_diffusion.cli import sample, samplers
from perceptual_diffusion.cli._app import app
from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.cli.samplers import Sampler, Settings

TOLD = {"ddpm": {}, "dit": {"classes": ("1", "2")}} | {
    kind: {"prompts": ("a red square", "blue"), "guidance": 2.0} for kind in ("sd", "sdxl", "sd3", "flux")
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Gives the folder of a tiny pipeline, written once."""
    root = tmp_path_factory.mktemp("models")

    def get(kind, seed=0):
        folder = root / f"{kind}-{seed}"
        if not folder.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of diffusers, on the scheduler's steps_offset
                pipelines.write(kind, folder, seed)
        return folder

    return get


def change(folder, to, path, **values):
    """Copy a pipeline, and change a JSON file in the copy."""
    shutil.copytree(folder, to)
    file = to / path
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return to


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def draw(folder, **settings):
    """Samples as numbers, (N, H, W, 3), and what the record says of each."""
    options = {"n": 5, "steps": 3, "device": "cpu"} | settings
    if "flux" in folder.name:
        options["size"] = 16
    rows = [pair for batch in Sampler(str(folder), Settings(**options)).pictures() for pair in batch]
    return np.stack([np.asarray(picture) for _, picture in rows]).astype(int), [row for row, _ in rows]


def size(path):
    with Image.open(path) as picture:
        return picture.size


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what a picture depends on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOLD)
def test_a_picture_depends_on_its_seed_and_condition_whatever_the_batch(kind, models):
    alone, rows = draw(models(kind), batch=1, **TOLD[kind])
    for batch in (2, 5):
        assert abs(draw(models(kind), batch=batch, **TOLD[kind])[0] - alone).max() <= 1  # of 255: rounding
    assert [row["seed"] for row in rows] == [0, 1, 2, 3, 4]
    later = draw(models(kind), seed=2, n=3, **TOLD[kind])[0]
    assert abs(later - alone[2:]).max() <= 1
    assert all(abs(one - other).max() > 8 for i, one in enumerate(alone) for other in alone[:i])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_stochastic_sampler_of_classes_has_noise_by_picture_too(guidance, tmp_path, models):
    from diffusers import DDPMScheduler, DiTPipeline

    pipe = DiTPipeline.from_pretrained(models("dit"))
    torch.manual_seed(0)
    DiTPipeline(dit(num_embeds_ada_norm=1000), pipe.vae, DDPMScheduler()).save_pretrained(tmp_path / "dit")
    told = {"classes": ("1", "999"), "guidance": guidance}
    alone = draw(tmp_path / "dit", batch=1, **told)[0]
    assert abs(draw(tmp_path / "dit", batch=3, **told)[0] - alone).max() <= 1


def test_samples_are_those_of_the_pipeline_itself(models):
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pipe = StableDiffusionPipeline.from_pretrained(models("sd"))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    wanted = pipe("blue", num_inference_steps=3, guidance_scale=2.0, guidance_rescale=0.7, generator=generator).images
    made = draw(models("sd"), n=1, seed=7, prompts=("blue",), guidance=2.0, rescale=0.7)[0]
    assert np.array_equal(made[0], np.asarray(wanted[0]))


@pytest.mark.parametrize("option", [{"guidance": 4.0}, {"rescale": 1.0}, {"steps": 2}, {"seed": 9}, {"size": 32}])
def test_every_option_of_the_sampler_changes_the_pictures(option, models):
    plain, other = (draw(models("sd"), **{**TOLD["sd"], **extra})[0] for extra in ({}, option))
    assert plain.shape != other.shape or abs(plain - other).max() > 2


def test_prompts_and_classes_go_around(models):
    assert [row["prompt"] for row in draw(models("sd"), prompts=("a", "b"))[1]] == ["a", "b", "a", "b", "a"]
    assert [row["class"] for row in draw(models("dit"), classes=("3",), n=2)[1]] == [3, 3]
    counted = {len(draw(models("sd"), prompts=prompts, n=None, steps=1)[1]) for prompts in (("a", "b", "c"), ("a",))}
    assert counted == {3, 16}


def test_flux_is_told_its_own_guidance_unless_another_is_asked_for(models):
    folder, told = str(models("flux")), {"prompts": ("a",), "size": 16, "n": 1, "device": "cpu"}
    assert Sampler(folder, Settings(**told)).guidance == 3.5
    assert Sampler(folder, Settings(**told, guidance=1.0)).guidance == 1.0
    assert Sampler(str(models("ddpm")), Settings(device="cpu")).guidance == 1.0


def test_sampling_begins_at_the_last_timestep_where_the_schedule_ends_at_zero_snr(tmp_path, models):
    config = "scheduler/scheduler_config.json"
    given = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "leading"}
    plain = Sampler(str(models("ddpm")), Settings(device="cpu"))
    assert plain.facts()["scheduler"]["spacing"] == "leading"
    zero = Sampler(str(change(models("ddpm"), tmp_path / "zero", config, **given)), Settings(device="cpu"))
    assert zero.facts()["scheduler"]["spacing"] == "trailing instead of leading, because the schedule ends at zero SNR"
    zero.pipe.scheduler.set_timesteps(25)
    assert int(zero.pipe.scheduler.timesteps[0]) == 999
    own = change(models("ddpm"), tmp_path / "own", config, **given | {"timestep_spacing": "trailing"})
    assert Sampler(str(own), Settings(device="cpu")).spacing == "trailing"


def test_what_samples_were_made_with_is_json_that_does_not_vary_whatever_the_scheduler_holds(models):
    sampler = Sampler(str(models("ddpm")), Settings(device="cpu"))
    sampler.pipe.scheduler.register_to_config(quantization_config="int8", trained_betas=np.array([0.1, 0.2]))
    config = json.loads(json.dumps(sampler.facts()))["scheduler"]["config"]
    assert (config["quantization_config"], config["trained_betas"]) == ("int8", [0.1, 0.2])
    assert "_use_default_values" not in config, "its order is that of a set"


def test_half_precision_samples_nearly_the_same(models):
    whole, half = (draw(models("ddpm"), precision=precision)[0] for precision in ("no", "bf16"))
    assert 0 < abs(whole - half).mean() < 12


# --- LoRA -------------------------------------------------------------------------------------------------------------


def lora(model, folder, scale):
    """Write LoRA weights for a tiny Stable Diffusion."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig, get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    weights = {name: scale * torch.randn_like(value) for name, value in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=weights)
    return folder


def test_lora_weights_change_the_pictures_as_far_as_they_are_not_zero(tmp_path, models):
    plain = draw(models("sd"), **TOLD["sd"])[0]
    for scale, changed in ((0.0, False), (1.0, True)):
        folder = lora(models("sd"), tmp_path / str(scale), scale)
        assert (abs(draw(models("sd"), lora=str(folder), **TOLD["sd"])[0] - plain).max() > 2) == changed


def test_lora_weights_are_compared_with_the_model_without_them(tmp_path, models):
    folder = lora(models("sd"), tmp_path / "lora", 1.0)
    arguments = ("--prompt", "blue", "--n", 2, "--steps", 2, "--lora", folder, "--compare", models("sd"))
    assert invoke("sample", models("sd"), "--out", tmp_path / "out", *arguments).exit_code == 0
    made = files(tmp_path / "out")
    plain = draw(models("sd"), n=2, steps=2, prompts=("blue",))[0]
    with Image.open(tmp_path / "out" / "other" / "1.png") as picture:
        assert np.array_equal(np.asarray(picture), plain[1])
    assert made["model/1.png"] != made["other/1.png"]


def test_lora_weights_that_do_not_fit_are_refused(tmp_path, models):
    from safetensors.torch import save_file

    folder = lora(models("sd"), tmp_path / "lora", 1.0)
    with pytest.raises(UserError, match="--lora is given, but DDPMPipeline takes none in diffusers"):
        draw(models("ddpm"), lora=str(folder))
    with pytest.raises(UserError, match=r"holds 0 \.safetensors files, expected one"):
        draw(models("sd"), lora=str(tmp_path), **TOLD["sd"])
    (tmp_path / "strange").mkdir()
    save_file({"unet.nowhere.lora_A.weight": torch.ones(2, 2)}, tmp_path / "strange" / "a.safetensors")
    with pytest.raises(UserError, match=r"--lora .* (fits no layer|cannot be loaded)"):
        draw(models("sd"), lora=str(tmp_path / "strange"), **TOLD["sd"])


# --- what is written --------------------------------------------------------------------------------------------------


def test_sample_writes_numbered_pictures_a_grid_and_what_they_were_made_with(tmp_path, models):
    (tmp_path / "prompts.txt").write_text("a red square\n\n  blue \n")
    out = tmp_path / "out"
    result = invoke(
        "sample", models("sd"), "--out", out, "--n", 12, "--prompts", tmp_path / "prompts.txt", "--steps", 2, "--grid",
        "--seed", 5, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert set(files(out)) == {f"{i:02d}.png" for i in range(12)} | {"grid.png", "samples.json"}
    record = json.loads((out / "samples.json").read_text())
    assert record["pictures"][3] == {"file": "03.png", "seed": 8, "prompt": "blue"}
    assert record["settings"]["n"] == 12
    assert record["scheduler"]["class"] == "DDIMScheduler"
    assert {"torch", "diffusers", "perceptual-diffusion"} <= record["versions"].keys()
    assert size(out / "grid.png") == (4 * 18 - 2, 3 * 18 - 2)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_same_command_writes_the_same_bytes(tmp_path, models):
    one, other = (tmp_path / name for name in ("one", "other"))
    for out in (one, other):
        assert invoke("sample", models("ddpm"), "--out", out, "--n", 3, "--steps", 2, "--device", "cpu").exit_code == 0
    assert files(one) == files(other)


def test_two_models_are_compared_from_the_same_noise(tmp_path, models):
    def compare(other, out):
        result = invoke("sample", models("ddpm"), "--compare", other, "--out", out, "--n", 4, "--steps", 2)
        assert result.exit_code == 0, result.output
        return files(out)

    same, differ = compare(models("ddpm"), tmp_path / "same"), compare(models("ddpm", 1), tmp_path / "differ")
    for name in ("0.png", "3.png"):
        assert same[f"model/{name}"] == same[f"other/{name}"] == differ[f"model/{name}"] != differ[f"other/{name}"]
    assert json.loads(differ["samples.json"])["compared"]["other"] == str(models("ddpm", 1))
    assert size(tmp_path / "same" / "compare.png") == (2 * 18 + 16, 18 + 16)


# --- what is refused --------------------------------------------------------------------------------------------------


REFUSED = {
    "no such model": ("nowhere", [], "there is no folder|no such folder"),
    "an option that is out of range": ("ddpm", ["--steps", 0], "--steps is 0, expected a whole number from 1"),
    "an unknown precision": ("ddpm", ["--precision", "int8"], "--precision is 'int8', expected one of no, bf16, fp16"),
    "a guidance that is none": ("sd", ["--guidance", 0.5, "--prompt", "a"], "--guidance is 0.5, expected a number of at"),
    "a guidance that is no number": ("sd", ["--guidance", "nan", "--prompt", "a"], "--guidance is nan, expected"),
    "guidance without a condition": ("ddpm", ["--guidance", 3], "--guidance is given, but DDPMPipeline has no"),
    "guidance of other classes": ("dit", ["--guidance", 3, "--class", 1], "takes class 1000 for none, and this model has"),
    "rescaling where there is none": ("dit", ["--rescale", 0.7, "--class", 1], "--rescale is given, but DiTPipeline has no"),
    "a prompt for no text": ("ddpm", ["--prompt", "a"], "--prompt is given, but DDPMPipeline takes no condition"),
    "a class for text": ("sd", ["--class", 1, "--prompt", "a"], r"--class is given, but StableDiffusionPipeline takes a prompt"),
    "no prompt": ("sd", [], "StableDiffusionPipeline needs a prompt"),
    "no class": ("dit", [], "DiTPipeline needs a class"),
    "an unknown class": ("dit", ["--class", 10], "--class is '10', expected a number from 0 to 9"),
    "a device that is not there": ("ddpm", ["--device", "nothing"], "--device is 'nothing'"),
    "a file of prompts that is not there": ("sd", ["--prompts", "nowhere.txt"], "--prompts 'nowhere.txt' cannot be read"),
    "more steps than the schedule has": ("ddpm", ["--steps", 5000], "cannot be sampled with these settings: ValueError"),
    "models of two sizes": ("sd", ["--prompt", "a", "--compare", "flux"], "they cannot share their noise"),
    "a second model that is not there": ("ddpm", ["--compare", "/nowhere"], "there is no such folder"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_one_sentence_and_writes_nothing(model, options, message, tmp_path, models):
    options = [models(each) if each == "flux" else each for each in options]
    name = tmp_path / "nowhere" if model == "nowhere" else models(model)
    result = invoke("sample", name, "--out", tmp_path / "out", "--n", 2, *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert any(part in result.stderr for part in message.split("|")), result.stderr
    assert "sampling" not in result.stderr or "cannot be sampled" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_of_sound_is_refused_by_name(tmp_path, models):
    folder = change(models("ddpm"), tmp_path / "audio", "model_index.json", _class_name="StableAudioPipeline")
    with pytest.raises(UserError, match="StableAudioPipeline"):
        draw(folder)


def test_a_package_that_is_missing_is_named(tmp_path, models, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    result = invoke("sample", models("ddpm"), "--out", tmp_path / "out", "--steps", 1)
    assert (result.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "error: this needs 'rich', which is not installed. Run `pip install" in result.stderr


def test_what_is_there_is_not_written_over(tmp_path, models):
    out = tmp_path / "out"
    arguments = ("sample", models("ddpm"), "--out", out, "--steps", 2, "--n")
    assert invoke(*arguments, 3, "--grid").exit_code == 0
    before = files(out)
    result = invoke(*arguments, 2)
    assert (result.exit_code, files(out)) == (2, before)
    assert "is not empty. Give another folder, or --overwrite" in result.stderr
    (out / "notes.txt").write_text("mine")
    result = invoke(*arguments, 2, "--overwrite")
    assert (result.exit_code, (out / "notes.txt").read_text()) == (2, "mine")
    assert "holds what this command did not make (notes.txt)" in result.stderr
    (out / "notes.txt").unlink()
    assert invoke(*arguments, 2, "--overwrite").exit_code == 0
    assert set(files(out)) == {"0.png", "1.png", "samples.json"}


@pytest.mark.parametrize("record", [None, "[]", "{}", '{"made by": "x", "pictures": [{"file": "a.png"}]}', "{"])
def test_overwrite_keeps_a_folder_of_other_pictures(record, tmp_path, models):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(b"mine")
    if record is not None:
        (tmp_path / "out" / "samples.json").write_text(record)
    before = files(tmp_path)
    result = invoke("sample", models("ddpm"), "--out", tmp_path / "out", "--overwrite")
    assert (result.exit_code, files(tmp_path)) == (2, before)


def test_a_comparison_may_be_written_over_too(tmp_path, models):
    arguments = ("sample", models("ddpm"), "--out", tmp_path / "out", "--steps", 1, "--n", 2, "--overwrite")
    for extra in (("--compare", models("ddpm")), ("--compare", models("ddpm")), ()):
        assert invoke(*arguments, *extra).exit_code == 0
    assert set(files(tmp_path / "out")) == {"0.png", "1.png", "samples.json"}


@pytest.mark.parametrize("old", [False, True])
def test_nothing_is_half_written_when_the_second_batch_fails(old, tmp_path, models, monkeypatch):
    arguments = ("sample", models("ddpm"), "--out", tmp_path / "out", "--n", 4, "--batch", 2, "--steps", 1)
    if old:
        assert invoke(*arguments).exit_code == 0
    before, call = files(tmp_path), Sampler._call

    def fail(self, seeds, conditions):
        if seeds[0] == 2:
            raise torch.OutOfMemoryError("no more")
        return call(self, seeds, conditions)

    monkeypatch.setattr(samplers.Sampler, "_call", fail)
    result = invoke(*arguments, "--overwrite")
    assert (result.exit_code, files(tmp_path)) == (2, before)
    assert "out of memory with --batch 2. Use a smaller --batch" in result.stderr


def test_a_signal_stops_it_with_nothing_written(tmp_path, models, monkeypatch):
    call, begun = Sampler._call, []

    def interrupted(self, seeds, conditions):
        begun.append(seeds)
        if len(begun) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, seeds, conditions)

    monkeypatch.setattr(samplers.Sampler, "_call", interrupted)
    result = invoke("sample", models("ddpm"), "--out", tmp_path / "out", "--n", 4, "--batch", 2, "--steps", 1)
    assert (result.exit_code, list(tmp_path.iterdir()), begun) == (130, [], [[0, 1]])


def test_a_grid_is_about_square():
    pictures = [Image.new("RGB", (4, 6), (index, 0, 0)) for index in range(5)]
    sheet = sample.tile(pictures)
    assert sheet.size == (3 * 6 - 2, 2 * 8 - 2)
    assert sheet.getpixel((6, 8)) == (4, 0, 0)
    assert sample.tile(pictures[:1]).size == (4, 6)
    assert sample.tile(pictures[:4]).size == (10, 14)
