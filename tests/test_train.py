"""`perceptual-diffusion train`: what it learns from, what it writes, how it goes on, what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys

import accelerate
import pipelines
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DiffusionPipeline
from models import conditional_unet
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from perceptual_diffusion.cli import captions, config, files, folders, train, tuning
from perceptual_diffusion.cli import pipelines as loading
from perceptual_diffusion.cli._app import app
from perceptual_diffusion.cli._errors import UserError
from perceptual_diffusion.cli.runlog import Log

NEEDS = {"ddpm": "bare", "dit": "classes"}
"""The layout of the data that a pipeline needs; others need captions."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that gives the folder of a tiny pipeline, written once."""
    root, done = tmp_path_factory.mktemp("models"), {}

    def give(kind, **options):
        name = "-".join([kind, *options])
        if name not in done:
            done[name] = pipelines.write(kind, root / name, **options)
        return done[name]

    return give


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few samples, and an accelerator of each run's own."""
    monkeypatch.setattr(train, "SAMPLES", 2)
    monkeypatch.setattr(train, "SAMPLING_STEPS", 2)
    AcceleratorState._reset_state(True)


@pytest.fixture
def write_config(tmp_path, made):
    """A function that writes a config and, if there is none, the data, and gives the config's path."""

    def give(kind="ddpm", *, model=None, data=None, out="out", objective=(), **training):
        layout = NEEDS.get(kind, "captions")
        if data is None and not (tmp_path / "data").exists():
            pipelines.pictures(tmp_path / "data", layout=layout)
        facts = {
            "model": str(model or made(kind)), "data": str(data or "data"), "out": out,
            "training": {"steps": 3, "batch": 2, "lr": 1e-3, "log_every": 1, "warmup": 0, **training},
            "objective": dict(objective),
        }  # fmt: skip
        facts["training"].setdefault("resolution", 8 if kind == "ddpm" else 16)
        path = tmp_path / "run.json"
        path.write_text(json.dumps(facts))
        return path

    return give


def invoke(*arguments):
    AcceleratorState._reset_state(True)
    return CliRunner().invoke(app, ["train", *(str(a) for a in arguments)])


def finished(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments):
    """The one sentence of a run that is refused."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return next(line for line in result.output.splitlines() if line.startswith("error: "))


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out, part="unet"):
    return load_file(out / "model" / part / "diffusion_pytorch_model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- what a run writes ------------------------------------------------------------------------------------------------


def test_a_run_writes_what_it_promises(tmp_path, write_config, made):
    finished(write_config("sd", sample_every=2))
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"config.json", "log.jsonl", "tensorboard", "samples", "state", "model"}
    assert {p.name for p in (out / "samples").iterdir()} == {"before.png", "step-2.png", "after.png"}
    assert [p.name for p in (out / "state").iterdir()] == ["latest.safetensors"]
    assert not [p for p in out.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt", ".tmp")]
    with Image.open(out / "samples/after.png") as sheet:
        assert sheet.size == (32, 16)
    log = rows(out)
    assert [row["step"] for row in log] == [1, 2, 3]
    assert {"sp", "mse", "features/mid_block", "lr", "seconds"} <= log[0].keys()
    assert any(name.startswith("sp/t ") for name in log[0])
    card = (out / "model/README.md").read_text()
    for fact in (
        "1 L_mse + L_sp, distance normalised",
        "6 pictures with captions",
        "3 of 2 samples",
        "torch 2",
        "| seed | 0 |",
        "train",
    ):
        assert fact in card
    assert not same(weights(out), load_file(made("sd") / "unet/diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("kind", ["ddpm", "dit", "sd", "sdxl"])
def test_the_model_of_each_kind_of_pipeline_loads_and_samples(tmp_path, write_config, kind):
    finished(write_config(kind, steps=1))
    check_samples(tmp_path / "out/model", kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_the_model_of_flow_pipelines_loads_and_samples(tmp_path, write_config, kind):
    finished(write_config(kind, steps=1))
    check_samples(tmp_path / "out/model", kind)


def check_samples(folder, kind):
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    given = {"ddpm": {"batch_size": 1}, "dit": {"class_labels": [1], "guidance_scale": 1.0}}.get(
        kind, {"prompt": "a red square", "height": 16, "width": 16}
    )
    drawn = pipeline(**given, num_inference_steps=2, output_type="np").images
    assert drawn.shape[0] == 1
    assert drawn.std() > 0


def test_without_learning_the_samples_before_and_after_are_the_same(tmp_path, write_config):
    finished(write_config(lr=0))
    samples = tmp_path / "out/samples"
    assert (samples / "before.png").read_bytes() == (samples / "after.png").read_bytes()


def test_the_averaged_weights_are_what_is_saved(tmp_path, write_config):
    finished(write_config(ema=0.5))
    state = load_file(tmp_path / "out/state/latest.safetensors")
    last = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    saved = weights(tmp_path / "out")
    assert not same(saved, last)
    assert torch.equal(saved["conv_in.weight"], state["average.module.0"])


# --- what it learns from ----------------------------------------------------------------------------------------------


def tuned(path):
    read = config.load(path)
    loaded = loading.load(read.model)
    return tuning.Tuning(read, loaded, folders.read(tuning.Path(read.data), loaded.wanted), train._accelerator(read))


@pytest.mark.parametrize("kept", [True, False])
def test_the_mse_is_that_of_a_loss_made_by_hand_with_diffusers(tmp_path, write_config, made, monkeypatch, kept):
    if not kept:
        monkeypatch.setattr(captions, "CACHE", 0)
    run = tuned(write_config("sd", drop=0))
    assert bool(run.captions.kept) == kept
    draws = torch.Generator()
    draws.set_state(run.draws.get_state())
    batch = next(run.batches())
    t, noise = torch.tensor([100, 700]), torch.randn(2, 4, 8, 8)
    run.objective(run.model.eval(), *[(inputs := run.inputs(batch))[0]], cond=inputs[1], t=t, noise=noise)

    pipeline = DiffusionPipeline.from_pretrained(made("sd"))
    pictures, texts = [], []
    lines = [json.loads(line) for line in (tmp_path / "data/metadata.jsonl").read_text().splitlines()]
    for index in batch.index.tolist():
        picture = Image.open(tmp_path / "data" / lines[index]["file_name"])  # 20 x 16: two columns off at each side
        pictures.append(picture.crop((2, 0, 18, 16)))
        texts.append(lines[index]["text"])
    torch.rand(2, generator=draws)  # which captions are left out
    with torch.no_grad():
        pixels = pipeline.image_processor.preprocess(pictures)
        clean = pipeline.vae.encode(pixels).latent_dist.sample(draws) * pipeline.vae.config.scaling_factor
        tokens = pipeline.tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
        text = pipeline.text_encoder(tokens)[0]
        x_t = DDIMScheduler.from_config(pipeline.scheduler.config).add_noise(clean, noise, t)
        expected = (pipeline.unet(x_t, t, text).sample - noise).square().mean((1, 2, 3))
    assert torch.allclose(run.objective.terms["mse"], expected, rtol=1e-4)
    assert batch.frames.tolist() == [[16, 20, 0, 2]] * 2


def test_a_condition_left_out_is_what_the_pipeline_guides_away_from(write_config, made):
    run = tuned(write_config("sd", drop=1))
    pipeline = DiffusionPipeline.from_pretrained(made("sd"))
    nothing = pipeline.encode_prompt(["a"], "cpu", 1, True, negative_prompt=[""])[1]
    assert torch.allclose(run.example()[1]["encoder_hidden_states"], nothing.expand(2, -1, -1), atol=1e-6)


def test_sdxl_is_told_the_frame_of_each_picture(write_config):
    run = tuned(write_config("sdxl", drop=1))
    added = run.example()[1]["added_cond_kwargs"]
    assert added["time_ids"].tolist() == [[16, 20, 0, 2, 16, 16]] * 2
    assert not added["text_embeds"].any()


def test_classes_left_out_are_the_models_null_class_in_all_blocks(write_config):
    run = tuned(write_config("dit", drop=1))
    assert run.example()[1]["class_labels"].tolist() == [10, 10]
    assert {module.dropout_prob for module in run.model.modules() if hasattr(module, "dropout_prob")} == {0.0}
    assert run.loaded.labels(("3", "7")) == [3, 7]
    assert run.loaded.labels(("cat", "dog")) == [0, 1]
    with pytest.raises(UserError, match="has a class 10, and those of the model end at 9"):
        run.loaded.labels(("9", "10"))


def test_a_run_lowers_its_loss_and_every_weight_moves(tmp_path, write_config, made):
    finished(write_config(steps=60, lr=3e-3, ema=0, log_every=10, batch=4))
    log = rows(tmp_path / "out")
    assert log[-1]["mse"] < 0.7 * log[0]["mse"]
    before = load_file(made("ddpm") / "unet/diffusion_pytorch_model.safetensors")
    assert not [name for name, value in weights(tmp_path / "out").items() if torch.equal(value, before[name])]


def test_the_order_shares_each_round_out_among_the_processes():
    orders = [iter(tuning.Order(12, 2, seed=3, rank=rank, processes=2, start=0)) for rank in (0, 1)]
    first = [next(order) for _ in range(3) for order in orders]
    assert sorted(index for batch in first for index in batch) == list(range(12))
    later = iter(tuning.Order(12, 2, seed=3, rank=1, processes=2, start=2))
    assert next(later) == first[5]


# --- LoRA, precision, memory ------------------------------------------------------------------------------------------


def test_a_lora_is_trained_beside_a_base_that_stays_and_is_saved_alone(tmp_path, write_config, made):
    path = write_config(
        "sd", lora_rank=2, ema=0, objective={"teacher": "lora"}, gradient_checkpointing=True, precision="bf16"
    )
    output = finished(path, "--dry-run")
    assert "holds 0 weights" in output
    assert "(LoRA, rank 2)" in output
    finished(path)
    model = tmp_path / "out/model"
    assert {p.name for p in model.iterdir()} == {"pytorch_lora_weights.safetensors", "README.md"}
    assert (model / "pytorch_lora_weights.safetensors").stat().st_size < 100_000
    pipeline = DiffusionPipeline.from_pretrained(made("sd"))
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 8)
    with torch.no_grad():
        before = pipeline.unet(x, t, text).sample
        pipeline.load_lora_weights(model)
        after = pipeline.unet(x, t, text).sample
    assert 0 < float((after - before).norm() / before.norm()) < 0.5


def test_out_of_memory_names_the_switches(tmp_path, write_config, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning.Tuning, "step", fail)
    message = refused(write_config())
    for switch in (
        "batch",
        "accumulate",
        "gradient_checkpointing",
        "micro_batch",
        "teacher",
        "teacher_dtype",
        "precision",
    ):
        assert f"`{switch}`" in message
    assert not (tmp_path / "out/model").exists()
    monkeypatch.undo()
    monkeypatch.setattr(train, "SAMPLES", 1)
    finished(write_config(batch=1), "--resume")


# --- going on ---------------------------------------------------------------------------------------------------------


def stop_at(monkeypatch, step):
    """Send the process a signal after a step, as Ctrl-C does."""
    whole = Log.write

    def write(self, done, row):
        whole(self, done, row)
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Log, "write", write)


def test_an_interrupted_run_goes_on_to_the_bit(tmp_path, write_config, made, monkeypatch):
    options = {"steps": 4, "accumulate": 2, "drop": 0.5, "model": made("sd", dropout=0.2), "workers": 0}
    finished(write_config("sd", out="whole", **options))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        result = invoke(write_config("sd", out="parts", **options))
    assert result.exit_code == 130
    assert "--resume" in result.output
    assert not (tmp_path / "parts/model").exists()
    with (tmp_path / "parts/log.jsonl").open("a") as file:
        file.write('{"step": 3, "sp": 9}\n{"st')  # of a process killed after its last state
    finished(write_config("sd", out="parts", **options), "--resume")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    first, second = (rows(tmp_path / name) for name in ("whole", "parts"))
    assert [row | {"seconds": 0} for row in first] == [row | {"seconds": 0} for row in second]


def test_a_finished_run_goes_on_when_it_is_given_more_steps(tmp_path, write_config):
    finished(write_config(steps=2))
    assert "is finished, at step 2. To go on, raise `steps`" in refused(write_config(steps=2), "--resume")
    finished(write_config(steps=3), "--resume")
    finished(write_config(steps=3, out="whole"))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))


def test_a_state_of_another_run_or_a_damaged_one_is_refused(tmp_path, write_config):
    finished(write_config(steps=1))
    assert "is of a run with another lr, mse_weight." in refused(
        write_config(steps=2, lr=1e-2, objective={"mse_weight": 2.0}), "--resume"
    )
    (tmp_path / "data/0.png").unlink()
    assert "with another data" in refused(write_config(steps=2), "--resume")
    state = tmp_path / "out/state/latest.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    assert "cannot be read" in refused(write_config(steps=2), "--resume")


def test_a_run_does_not_go_on_with_another_teacher_or_other_captions(tmp_path, write_config):
    first, second = (pipelines.write("sd", tmp_path / name / "model", seed) for seed, name in enumerate("ab"))
    finished(write_config("sd", model=first, steps=1))
    assert "is of a run with another model" in refused(write_config("sd", model=second, steps=2), "--resume")
    captions = tmp_path / "data/metadata.jsonl"
    kept = captions.read_text()
    captions.write_text(kept.replace("red", "rose"))
    assert "is of a run with another data" in refused(write_config("sd", model=first, steps=2), "--resume")
    captions.write_text(kept)
    moved = first.parent.rename(tmp_path / "moved") / "model"
    finished(write_config("sd", model=moved, steps=2), "--resume")


def changed(path, **facts):
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def one_value(path):
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[-1] += 1
    save_file(tensors, path, {"format": "pt"})


def another_word(path):
    facts = json.loads(path.read_text())
    words = facts["model"]["vocab"]
    last, before = sorted(words, key=words.get)[-1:-3:-1]
    words[last], words[before] = words[before], words[last]
    path.write_text(json.dumps(facts))


CHANGES = {
    "prediction": ("model/scheduler/scheduler_config.json", lambda path: changed(path, prediction_type="v_prediction")),
    "schedule": ("model/scheduler/scheduler_config.json", lambda path: changed(path, beta_end=0.03)),
    "model": ("model/unet/diffusion_pytorch_model.safetensors", one_value),
    "vae": ("model/vae/diffusion_pytorch_model.safetensors", one_value),
    "vae ": ("model/vae/config.json", lambda path: changed(path, scaling_factor=0.7)),
    "text encoders": ("model/text_encoder/model.safetensors", one_value),
    "text encoders ": ("model/tokenizer/tokenizer.json", another_word),
    "data": ("data/0.png", lambda path: Image.new("RGB", (20, 16), "red").save(path)),
}


def test_a_run_does_not_go_on_with_anything_else_that_its_numbers_depend_on(tmp_path, write_config):
    model = pipelines.write("sd", tmp_path / "model")
    finished(write_config("sd", model=model, steps=1))
    for name, (file, change) in CHANGES.items():
        kept = (tmp_path / file).read_bytes()
        change(tmp_path / file)
        result = invoke(write_config("sd", model=model, steps=2), "--resume")
        assert result.exit_code == 2, name
        assert f"is of a run with another {name.strip()}. Use the same" in result.output, name
        (tmp_path / file).write_bytes(kept)
    state = tmp_path / "out/state/latest.safetensors"
    tensors, meta = files.load_state(state)
    assert "0x" not in json.dumps(meta["key"]), "an address, which is another one in the next run"
    older = {name: value for name, value in meta["key"].items() if name not in ("schedule", "vae")}
    files.save_state(state, tensors, meta | {"key": older})
    told = "was saved by another version, which did not write down its schedule, vae: "
    assert told in refused(write_config("sd", model=model, steps=2), "--resume")
    files.save_state(state, tensors, meta)
    finished(write_config("sd", model=model, steps=2), "--resume")


def test_a_digest_is_of_every_value_whatever_its_size():
    one = torch.nn.Linear(512, 512).requires_grad_(False)
    before = files.digest(one.state_dict())
    one.weight.view(-1)[1::2] = 0
    assert files.digest(one.state_dict()) != before
    half = {"a": torch.tensor(1.0).bfloat16(), "b": torch.zeros(0)}
    assert files.digest(half) != files.digest({"a": torch.tensor(1.0), "b": torch.zeros(0)})


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 200_000, b'{"step": 1e400}\n{"step": "9"}\n3'])
def test_a_damaged_log_loses_no_more_than_its_damaged_lines(tmp_path, content):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + content + b'\n{"step": 2}\n')
    with Log(tmp_path, 2, True):
        pass
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_an_out_where_nothing_can_be_written_is_refused_at_once(tmp_path, write_config, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *given: pytest.fail("the model was loaded"))
    assert "the folder '/proc/none' cannot be used: " in refused(write_config(out="/proc/none"))
    assert "--resume" not in refused(write_config(out="/proc/none"))


def test_a_launchers_environment_does_not_change_the_accumulation(tmp_path, write_config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    finished(write_config(steps=2))
    tensors = load_file(tmp_path / "out/state/latest.safetensors")
    assert float(tensors["optimizer.0.step"]) == 2


def test_a_run_in_float16_whose_steps_are_all_skipped_is_stopped(tmp_path, write_config, monkeypatch):
    monkeypatch.setattr(tuning, "SKIPS", 2)
    monkeypatch.setattr(tuning.Tuning, "check", lambda self: [])
    monkeypatch.setattr(accelerate.Accelerator, "optimizer_step_was_skipped", True)
    assert "the gradients of 2 steps were not finite" in refused(write_config(steps=3))


def test_a_picture_that_breaks_during_a_run_ends_it_with_a_sentence(tmp_path, write_config, monkeypatch):
    whole = tuning.Tuning.batches

    def batches(self):
        for path in (tmp_path / "data").rglob("*.png"):
            path.write_bytes(b"no picture")
        return whole(self)

    monkeypatch.setattr(tuning.Tuning, "batches", batches)
    for workers in (0, 1):
        message = refused(write_config(workers=workers, out=f"out{workers}"))
        assert message.startswith("error: the picture ")
        assert "cannot be read any more" in message
        shutil.rmtree(tmp_path / "data")


def test_a_vae_decodes_in_float32_where_the_rest_is_in_half_precision(tmp_path, made):
    loaded = loading.load(str(made("sd")))
    seen = []
    loaded.vae.decoder.conv_in.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loaded.vae.decode(torch.zeros(1, 4, 4, 4, dtype=torch.bfloat16))
    assert seen == [torch.float32]


@pytest.mark.slow
def test_two_processes_train_one_model_and_go_on(tmp_path, write_config):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    # accelerate's own launcher starts one process on a CPU, whatever --num_processes says, unless there is MPI
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]

    def run(*arguments):
        command = [*launch, "perceptual_diffusion", "train", *map(str, arguments)]
        subprocess.run(command, env=environment, check=True)

    run(write_config(steps=4, out="whole", checkpoint_every=2))
    run(write_config(steps=2, out="parts"))
    run(write_config(steps=4, out="parts"), "--resume")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert [row["step"] for row in rows(tmp_path / "parts")] == [1, 2, 3, 4]
    with safe_open(tmp_path / "parts/state/latest.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["state"])["key"]["processes"] == 2
        streams = file.get_tensor("streams")
    assert len(streams) == 2
    assert not torch.equal(*streams)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_says_what_will_happen_and_nothing_is_written(tmp_path, write_config):
    path = write_config("sd", accumulate=3)
    (tmp_path / "data/1.png").write_bytes(b"no picture")
    before = sorted(tmp_path.rglob("*"))
    output = finished(path, "--dry-run")
    for fact in (
        "StableDiffusionPipeline, UNet2DConditionModel", "Discrete(1000 steps)", "epsilon", "mid_block", "1.png: ", "5 pictures with captions",
        "1 left out", "3 of 6 samples (2 x 3 accumulated x 1 processes)", "with MSE alone", "(1.38 times)", "holds 29,784 weights", str(tmp_path / "out"),
    ):  # fmt: skip
        assert fact in output
    assert sorted(tmp_path.rglob("*")) == before


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_broken_pictures_are_left_out_counted_and_named_at_both_ends(tmp_path, write_config):
    path = write_config()
    broken = tmp_path / "data/2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    output = finished(path)
    assert output.count("1 files are left out:") == 2
    assert output.count("2.png: ") == 2
    assert "5 pictures" in (tmp_path / "out/model/README.md").read_text()


def index_of(folder, **changes):
    """A folder with a model_index.json alone."""
    folder.mkdir()
    facts = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"], **changes}
    (folder / "model_index.json").write_text(json.dumps(facts))
    return folder


def test_a_model_that_cannot_be_trained_is_refused(tmp_path, write_config):
    (tmp_path / "empty").mkdir()
    assert "there is no such folder" in refused(write_config(model=tmp_path / "none"))
    assert "holds no model_index.json" in refused(write_config(model=tmp_path / "empty"))
    other = index_of(tmp_path / "other", _class_name="AudioLDMPipeline")
    assert "names the pipeline 'AudioLDMPipeline', expected one of DDPMPipeline" in refused(write_config(model=other))
    assert "names the pipeline \"['a', 'b']\"" in refused(
        write_config(model=index_of(tmp_path / "list", _class_name=["a", "b"]))
    )
    for number, given in enumerate(
        (["os", "system"], ["diffusers", "DiffusionPipeline"], [["a"], ["b"]], ["x", "y", "z"])
    ):
        assert "is not among the known classes" in refused(
            write_config(model=index_of(tmp_path / f"{number}", unet=given))
        )
    (tmp_path / "captioned").mkdir()
    pipelines.pictures(tmp_path / "captioned/data")
    bare = write_config(model=index_of(tmp_path / "bare"), data=tmp_path / "captioned/data")
    assert "cannot be loaded" in refused(bare)
    assert not (tmp_path / "out").exists()


def test_weights_in_a_pickle_are_refused(tmp_path, write_config):
    folder = pipelines.write("ddpm", tmp_path / "pickled")
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
    assert "cannot be loaded" in refused(write_config(model=folder))


def test_an_out_that_holds_something_is_refused(tmp_path, write_config):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    assert "which holds other files" in refused(write_config())
    assert "there is nothing to resume" in refused(write_config(), "--resume")
    assert "which is a file" in refused(write_config(out="out/thesis.txt"))
    assert "which lies in `data`" in refused(write_config(out="data/out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sd", {"resolution": 9}, "`resolution` is 9, expected a multiple of"),
        ("ddpm", {"resolution": 10}, "`resolution` is 10, and this pipeline draws 8 pixels"),
        ("ddpm", {"objective": {"layers": ["middle"]}}, "no module 'middle' in UNet2DModel"),
        ("ddpm", {"objective": {"t_range": [5, 2000]}}, "`t_range` is"),
        ("ddpm", {"lora_rank": 2}, "diffusers adds no LoRA layers to UNet2DModel"),
        ("sd", {"lora_rank": 2, "objective": {"teacher": "lora", "teacher_dtype": "bfloat16"}}, "`teacher_dtype` is given"),
        ("ddpm", {"data": "none"}, "there is no folder"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_refused(tmp_path, write_config, kind, options, message):
    assert message in refused(write_config(kind, **options))
    assert not (tmp_path / "out/model").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights_are_lost(tmp_path, write_config, monkeypatch):
    monkeypatch.setattr(tuning.Tuning, "check", lambda self: [])
    monkeypatch.setattr(loading.Pixels, "clean", lambda self, pixels, generator: pixels * float("nan"))
    assert "the gradient of step 1 is not finite. Use a smaller `lr`" in refused(write_config())
    assert not (tmp_path / "out/state").exists()


def test_a_model_of_captions_is_not_given_bare_pictures(tmp_path, write_config):
    pipelines.pictures(tmp_path / "data", layout="bare")
    assert "have no captions, and this model needs them" in refused(write_config("sd"))
    assert "holds no subfolders with pictures" in refused(write_config("dit"))


def test_an_inpainting_unet_is_refused(tmp_path, write_config):
    folder = pipelines.write("sd", tmp_path / "inpainting")
    conditional_unet(in_channels=9).save_pretrained(folder / "unet")
    assert "the unet takes 9 channels, and the latents have 4" in refused(write_config("sd", model=folder))


def test_the_data_are_looked_at_before_the_model_is_loaded(tmp_path, write_config, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *given: pytest.fail("the model was loaded"))
    assert "there is no folder" in refused(write_config("sd", data="none"))
