"""The examples with text: each smoke run writes what it says, resumes exactly, and refuses what it cannot use."""

import functools
import importlib
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from perceptual_diffusion import SelfPerceptualObjective, distances, timesteps

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = {
    "image": ("image", []),
    "lora": ("lora", []),
    "sdxl": ("sdxl", []),
    "sd3": ("sd3_flux", []),
    "flux": ("sd3_flux", ["--model", "flux"]),
    "sd3 full": ("sd3_flux", ["--full"]),
}
SCRIPTS = ("image", "lora", "sdxl", "sd3_flux")
LORA = [name for name in RUNS if name not in ("image", "sd3 full")]
STEPS = ["--steps", "2", "--every", "1"]


@pytest.fixture(scope="module", autouse=True)
def on_the_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield


def start(script, *arguments):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    importlib.import_module(script).main([str(a) for a in arguments])


def refusal(capsys, script, *arguments):
    """What a script says when it ends with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        start(script, *arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return re.search(r"^\S+: error: (.*)", said, re.MULTILINE | re.DOTALL)[1].strip()


class Watch:
    """Keeps the objective of a run, and how its model was called in training and in sampling."""

    def __init__(self, patch):
        self.training, self.sampling = {}, {}
        wrap = SelfPerceptualObjective.wrap

        def kept(model, *rest, **how):
            self.objective, self.model = wrap(model, *rest, **how), model
            cls, forward = type(model), type(model).forward

            @functools.wraps(forward)
            def watched(module, *given, **named):
                call = inspect.signature(forward).bind(module, *given, **named).arguments
                if not module.training:
                    self.sampling = call
                elif torch.is_grad_enabled():
                    self.training = call
                return forward(module, *given, **named)

            patch.setattr(cls, "forward", watched)
            return self.objective

        patch.setattr(SelfPerceptualObjective, "wrap", kept)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One smoke run of each example, made when it is first asked for."""

    @functools.cache
    def run(name):
        script, more = RUNS[name]
        out = tmp_path_factory.mktemp("run") / "out"
        with pytest.MonkeyPatch.context() as patch:
            watch = Watch(patch)
            start(script, "--smoke", "--out", out, *STEPS, *more)
        return SimpleNamespace(out=out, script=script, more=more, watch=watch)

    return run


def scalars(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_samples_of_before_during_and_after(runs, name):
    run = runs(name)
    pictures = [np.array(Image.open(path)) for path in sorted(run.out.glob("samples-*.png"))]
    assert len(pictures) == (2 if name == "lora" else 3)
    assert {p.shape for p in pictures} == {(32, 32 * (8 if name in ("image", "lora") else 4), 3)}
    assert (pictures[0] != pictures[-1]).any()
    assert (
        np.abs(pictures[0].astype(float) - pictures[-1]).mean() < 40
    )  # the same noise: two random pictures are farther
    assert not [path for path in run.out.rglob("*") if path.suffix == ".tmp"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_logs_both_terms_their_bands_and_the_features(runs, name):
    found = scalars(runs(name).out)
    layer = runs(name).watch.objective.teacher.layers[0]
    assert {"sp", "mse", f"features/{layer}"} <= set(found)
    assert any(tag.startswith("sp/t ") for tag in found)
    assert any(tag.startswith("mse/t ") for tag in found)
    for values in found.values():
        assert [v.step for v in values] == [2]
        assert np.isfinite(values[0].value)
        assert values[0].value > 0


@pytest.mark.parametrize("name", RUNS)
def test_resume_continues_to_the_weights_of_an_uninterrupted_run(runs, name, tmp_path):
    run, out = runs(name), tmp_path / "out"
    shutil.copytree(run.out, out)
    shutil.rmtree(out / "checkpoints/step-00000002")
    for result in (*out.glob("samples-000002.png"), *out.glob("model"), *out.glob("lora")):
        shutil.rmtree(result) if result.is_dir() else result.unlink()
    start(run.script, "--smoke", "--out", out, *STEPS, *run.more, "--resume")
    assert (out / "samples-000002.png").read_bytes() == (run.out / "samples-000002.png").read_bytes()
    compared = [path for path in run.out.rglob("*.safetensors") if "tiny" not in path.parts]
    assert len(compared) >= 4
    for path in compared:
        before, after = load_file(path), load_file(out / path.relative_to(run.out))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), path
    one, two = (load_file(out / f"checkpoints/step-0000000{step}/average.safetensors") for step in (1, 2))
    assert any(not torch.equal(one[key], two[key]) for key in one)


HOW = {
    "image": {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 1.0},
    "sdxl": {"height": 32, "width": 32, "num_inference_steps": 3},
    "sd3": {"height": 32, "width": 32, "num_inference_steps": 3, "max_sequence_length": 64, "guidance_scale": 3.5},
}
HOW |= {"lora": HOW["image"], "flux": HOW["sd3"], "sd3 full": HOW["sd3"]}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_saved_loads_in_diffusers_and_draws_the_last_samples(runs, name):
    out = runs(name).out
    if name in LORA:
        pipe = DiffusionPipeline.from_pretrained(out / "tiny/model")
        pipe.load_lora_weights(out / "lora")
    else:
        pipe = DiffusionPipeline.from_pretrained(out / "model", use_safetensors=True)
    rows = [json.loads(line) for line in (out / "tiny/pictures/metadata.jsonl").read_text().splitlines()]
    last = Image.open(out / "samples-000002.png")
    prompts = [row["text"] for row in rows[: last.width // 32]]
    images = pipe(prompts, generator=torch.Generator().manual_seed(0), **HOW[name]).images
    np.testing.assert_allclose(np.hstack(images).astype(float), np.array(last), atol=1)


@pytest.mark.parametrize("name", RUNS)
def test_training_calls_the_model_as_its_pipeline_does(runs, name):
    watch = runs(name).watch

    def tensors(call):
        flat = {**call, **call.get("added_cond_kwargs", {})} if call.get("added_cond_kwargs") else dict(call)
        return {key: value for key, value in flat.items() if isinstance(value, torch.Tensor) and key != "timestep"}

    training, sampling = tensors(watch.training), tensors(watch.sampling)
    assert training.keys() == sampling.keys()
    assert len(training) == {"image": 2, "lora": 2, "sdxl": 4, "flux": 6}.get(name, 3)
    for key in training:
        assert training[key].shape[1:] == sampling[key].shape[1:], key
    for key in {"txt_ids", "img_ids"} & training.keys():
        assert torch.equal(training[key], sampling[key])
    if name == "flux":
        assert training["guidance"].unique().tolist() == sampling["guidance"].unique().tolist() == [3.5]


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_is_the_recipe_and_flows_draw_logit_normal_times(runs, name):
    objective = runs(name).watch.objective
    assert objective.distance is distances.get("normalised")
    assert objective.mse_weight == 1
    if runs(name).script == "sd3_flux":
        assert isinstance(objective.t, timesteps.LogitNormal)
        assert callable(objective.t.shift) if name == "flux" else objective.t.shift == 3


def test_lora_holds_no_second_copy_of_the_base_and_says_so(tmp_path, monkeypatch, capsys):
    watch = Watch(monkeypatch)
    start("lora", "--smoke", "--out", tmp_path / "out", "--steps", "1")
    weights = load_file(tmp_path / "out/tiny/model/unet/diffusion_pytorch_model.safetensors")
    held = sum(w.numel() * w.element_size() for w in weights.values())
    assert f"the base holds {held:,} bytes of weights; beside them the teacher holds 0\n" in capsys.readouterr().out
    own = {p.data_ptr() for p in watch.model.parameters()}
    shared = list(watch.objective.teacher.module.parameters())
    assert shared
    assert {p.data_ptr() for p in shared} <= own


def test_pictures_that_cannot_be_used_are_counted_and_named(tmp_path, capsys):
    import _tiny
    from image import captioned

    _tiny.pictures(tmp_path, 4)
    whole = (tmp_path / "0001.png").read_bytes()
    (tmp_path / "0001.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bare.png").write_bytes(whole)
    rows = captioned(str(tmp_path), str(tmp_path))
    assert [Path(path).name for path, _ in rows] == ["0000.png", "0002.png", "0003.png"]
    assert rows[0][1] == "grinning face"
    said = capsys.readouterr().out
    assert "3 pictures; left out: 3" in said
    assert all(name in said for name in ("0001.png", "broken.png", "bare.png: no caption"))


def test_wrong_captions_and_a_missing_model_are_named_before_anything_is_loaded(tmp_path):
    import _tiny
    from image import captioned

    with pytest.raises(ValueError, match="there is no folder"):
        captioned(str(tmp_path), "nodir")
    _tiny.pictures(tmp_path, 4)
    file = tmp_path / "metadata.jsonl"
    lines = file.read_text().splitlines()
    for wrong, message in ((lines[1].replace('"text"', '"caption"'), ":2: `text` is missing"), ("{", ":2: ")):
        file.write_text("\n".join([lines[0], wrong, *lines[2:]]))
        with pytest.raises(ValueError, match=re.escape(f"metadata.jsonl{message}")):
            captioned(str(tmp_path), str(tmp_path))


def test_an_epoch_shows_each_picture_once_and_a_tenth_of_captions_is_left_out(tmp_path):
    import _tiny
    from image import load

    _tiny.pictures(tmp_path, 10)
    rows = [(str(tmp_path / f"{i:04d}.png"), str(i)) for i in range(10)]
    pixels, captions = load(rows, 16, 0, range(1500))
    assert pixels.shape == (1500, 3, 16, 16)
    assert -1 <= pixels.min() < -0.9
    assert pixels.max() == 1
    assert 0.07 < captions.count("") / 1500 < 0.13
    epochs = [captions[i : i + 10] for i in range(0, 1500, 10)]
    whole = [tuple(epoch) for epoch in epochs if "" not in epoch]
    assert all(sorted(epoch) == [str(i) for i in range(10)] for epoch in whole)
    assert len(set(whole)) > 25
    assert load(rows, 16, 0, range(7, 9))[1] == captions[7:9]


def test_sdxl_is_told_the_size_of_a_picture_and_its_crop(tmp_path):
    from sdxl import load

    columns = np.tile(np.arange(128, dtype=np.uint8), (64, 1))
    Image.fromarray(np.stack([columns] * 3, -1)).save(tmp_path / "wide.png")
    pixels, _, ids = load([(str(tmp_path / "wide.png"), "wide")], 32, 0, range(20))
    lefts = ids[:, 3].tolist()
    assert ids[:, [0, 1, 2, 4, 5]].unique(dim=0).tolist() == [[64, 128, 0, 32, 32]]
    assert len(set(lefts)) > 5
    first = ((pixels[:, 0, 0, 2] + 1) * 127.5).tolist()  # the third column seen is about column 2 (left + 2) + 0.5
    assert first == pytest.approx([2 * (left + 2) + 0.5 for left in lefts], abs=1)


def test_what_cannot_be_used_is_refused_in_one_sentence_and_nothing_is_written(runs, tmp_path, capsys):
    pictures, model = runs("image").out / "tiny/pictures", runs("image").out / "tiny/model"
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(pictures / "0000.png", bare)
    damaged = tmp_path / "damaged"
    shutil.copytree(pictures, damaged)
    (damaged / "metadata.jsonl").write_text('{"file_name": "0000.png", "text"')
    for script in SCRIPTS:
        wrong = runs("sdxl" if script != "sdxl" else "image").out / "tiny/model"
        for given, data, part in (
            (tmp_path / "none", pictures, "none"),
            (model, tmp_path / "none", "there is no folder"),
            (model, bare, "have no captions, and this model needs them. Add a metadata.jsonl"),
            (model, damaged, "metadata.jsonl:1: "),
            (wrong, pictures, "StableDiffusion"),
        ):
            said = refusal(capsys, script, "--model", given, "--data", data, "--out", tmp_path / "out")
            assert part in said
            assert said.startswith(f"cannot train {str(given)!r} on {str(data)!r}: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_earlier_run_is_not_overwritten(script, tmp_path, capsys):
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    said = refusal(capsys, script, "--model", "m", "--data", "d", "--out", tmp_path / "out")
    assert said == f"{tmp_path / 'out'} holds a run. Add --resume to go on with it, or choose another --out."
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("name", RUNS)
def test_in_mixed_precision_the_vae_stays_in_float32_and_the_model_does_not(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    watch, seen, vaes, built = Watch(monkeypatch), {}, [], DiffusionPipeline.from_pretrained

    def kept(*given, **named):
        vaes.append((pipe := built(*given, **named)).vae)
        return pipe

    def saw(module, given, output):
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            seen.setdefault(module, set()).add(output.dtype)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", kept)
    hook = torch.nn.modules.module.register_module_forward_hook(saw)
    try:
        script, more = RUNS[name]
        start(script, "--smoke", "--out", tmp_path / "out", "--steps", "1", *more)
    finally:
        hook.remove()
        AcceleratorState._reset_state(True)
    for half in (vaes[0].encoder, vaes[0].decoder):
        assert {dtype for module in {*half.modules()} & seen.keys() for dtype in seen[module]} == {torch.float32}
    student = {*watch.model.modules()} & seen.keys()
    teacher = {*watch.objective.teacher.module.modules()} & seen.keys()
    assert torch.bfloat16 in {dtype for module in student for dtype in seen[module]}
    assert torch.bfloat16 in {dtype for module in teacher for dtype in seen[module]}


def test_another_model_data_batch_or_seed_is_refused_on_resume(runs, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(runs("lora").out / "tiny", tmp_path / "one")
    shutil.copytree(runs("lora").out / "tiny", tmp_path / "other")
    given = {"--model": tmp_path / "one/model", "--data": tmp_path / "one/pictures", "--batch": 2, "--seed": 0}

    def run(**changed):
        return [
            word for pair in (given | {f"--{key}": value for key, value in changed.items()}).items() for word in pair
        ]

    start("lora", "--out", out, "--steps", "1", *run())
    for key, value in {"model": "other/model", "data": "other/pictures", "batch": 3, "seed": 1}.items():
        changed = tmp_path / value if isinstance(value, str) else value
        said = refusal(capsys, "lora", "--out", out, "--steps", "2", "--resume", *run(**{key: changed}))
        assert "and this run of" in said
        assert str(changed) in said.split("and this run of")[1]
    start("lora", "--out", out, "--steps", "2", "--resume", *run())
    assert (out / "checkpoints/step-00000002").is_dir()


@pytest.mark.parametrize("name", RUNS)
def test_another_batch_or_seed_of_a_smoke_run_is_refused_on_resume(runs, name, tmp_path, capsys):
    run = runs(name)
    for option, value in (("--batch", 3), ("--seed", 1)):
        said = refusal(capsys, run.script, "--smoke", "--out", run.out, *STEPS, *run.more, "--resume", option, value)
        assert f"{option[2:]} {value}" in said.split("and this run of")[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_out_of_memory_names_the_switches_that_help(script, tmp_path, capsys, monkeypatch):
    def full(*given, **named):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(SelfPerceptualObjective, "__call__", full)
    said = refusal(capsys, script, "--smoke", "--out", tmp_path / "out", *STEPS)
    assert said.startswith("out of memory")
    switches = [word.strip("`.,") for word in said.split() if word.strip("`").startswith("--")]
    assert "--batch" in switches
    with pytest.raises(SystemExit):
        start(script, "--help")
    known = capsys.readouterr().out
    assert all(switch in known or switch == "--mixed_precision" for switch in switches)
    assert not any((tmp_path / "out" / name).exists() for name in ("model", "lora", "checkpoints"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_at_most_150_lines(script):
    lines = (EXAMPLES / f"{script}.py").read_text("utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 130


PROCESS = """
import os, sys
sys.path.insert(0, {examples!r})
import image
from safetensors.torch import save_file

class Average(image.AveragedModel):
    def update_parameters(self, model):
        seen["model"] = model
        super().update_parameters(model)

class Monitor(image.Monitor):
    def update(self):
        times.append(self.objective.times["t"].clone())
        super().update()

seen, times = dict(), []
image.AveragedModel, image.Monitor = Average, Monitor
image.main(sys.argv[1:])
save_file({{"t": image.torch.cat(times), **seen["model"].state_dict()}}, {out!r} + f"/rank-{{os.environ['RANK']}}.safetensors")
"""


def test_two_processes_draw_different_times_and_end_with_the_same_weights(tmp_path):
    (tmp_path / "process.py").write_text(PROCESS.format(examples=str(EXAMPLES), out=str(tmp_path)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `--cpu --num_processes 2` is one process without MPI; without a GPU this is two on the CPU
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", port, tmp_path / "process.py", "--smoke", "--out", tmp_path / "out"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [str(word) for word in [*command, *STEPS]], capture_output=True, text=True, timeout=300, env=environment
    )
    assert ended.returncode == 0, ended.stderr[-1500:]
    first, second = (load_file(tmp_path / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert first["t"].shape == second["t"].shape == (8,)
    assert not torch.equal(first.pop("t"), second.pop("t"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    base = load_file(tmp_path / "out/tiny/model/unet/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(first[key], base[key]) for key in base)
    assert (tmp_path / "out/model/model_index.json").is_file()
