"""The patches of examples/trainers give diffusers' scripts Algorithm 1's gradient, on stand-ins with their interfaces."""

import os
import re
import runpy
import socket
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
import trainer_tools
from algorithm1 import freeze
from models import conditional_unet
from peft import LoraConfig
from torch.nn.functional import mse_loss
from trainer_tools import PLUGINS, ROOT, patched, same_gradient, scheduler, sp

plugins, t_primes = trainer_tools.plugins, trainer_tools.t_primes
# diffusers 0.42 turns torch tensors to numpy the old way under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

TEXT = {"latents": (4, 4, 8, 8), "text": (4, 5, 8)}


def batches(shapes=TEXT, n=3):
    return [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(n)]


def diffusers_args(unet, data, watch, **more):
    options = {
        "unet": unet, "noise_scheduler": scheduler(), "batches": data, "watch": watch, "mixed_precision": "no",
        "learning_rate": 1e-2, "noise_offset": 0, "input_perturbation": 0.0, "prediction_type": None, "train_batch_size": 4,
        "train_text_encoder": False, "with_prior_preservation": False, "prior_loss_weight": 0.3,
    }  # fmt: skip
    return Namespace(**options | more)


OPTIONS = {
    "as it is": {}, "v_prediction": {"prediction_type": "v_prediction"}, "offset noise": {"noise_offset": 0.2},
    "input perturbation": {"input_perturbation": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_patched_train_text_to_image_adds_algorithm_1_to_its_loss(tmp_path, t_primes, options):
    unet = conditional_unet()
    frozen, steps = freeze(unet), []
    kind = options.get("prediction_type", "epsilon")

    def watch(now):
        x_t, t, cond = now["noisy_latents"], now["timesteps"], {"encoder_hidden_states": now["encoder_hidden_states"]}
        output = unet(x_t, t, **cond).sample
        perceptual = sp(
            frozen, output, clean=now["latents"], noise=now["noise"], t=t, t_prime=t_primes.t_prime, cond=cond, kind=kind,
            x_t=x_t,
        )  # fmt: skip
        expected = mse_loss(output, now["target"]) + perceptual.mean()
        same_gradient(now["loss"], expected, unet.parameters(), [w.grad for w in unet.parameters()])
        steps.append(float(perceptual.detach().mean()))

    place = "examples/text_to_image/train_text_to_image.py"
    main = patched(tmp_path, "diffusers_text_to_image.patch", "diffusers/train_text_to_image.py", place)
    main(diffusers_args(unet, batches(), watch, **options))
    assert len(steps) == 3
    assert min(steps) > 1e-3


def test_patched_train_text_to_image_runs_in_bfloat16(tmp_path, plugins):
    losses, place = [], "examples/text_to_image/train_text_to_image.py"
    main = patched(tmp_path, "diffusers_text_to_image.patch", "diffusers/train_text_to_image.py", place)
    data = [{name: value.bfloat16() for name, value in batch.items()} for batch in batches()]
    args = diffusers_args(conditional_unet(), data, lambda now: losses.append(now["loss"]), mixed_precision="bf16")
    main(args)
    assert torch.stack(losses).isfinite().all()


def sdxl_unet():
    return conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=4 * 6 + 8
    )


def lora(unet):
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian"))
    return unet


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "LoRA"])
def test_patched_sdxl_scripts_add_algorithm_1_to_their_loss(tmp_path, t_primes, with_lora):
    unet = sdxl_unet()
    frozen, steps = freeze(unet), []
    if with_lora:
        lora(unet)

    def watch(now):
        x_t, t = now["noisy_model_input"], now["timesteps"]
        added = {"time_ids": now["batch"]["time_ids"], "text_embeds": now["batch"]["pooled"]}
        cond = {"encoder_hidden_states": now["batch"]["text"], "added_cond_kwargs": added}
        output = unet(x_t, t, **cond).sample
        clean, noise = now["model_input"], now["noise"]
        perceptual = sp(frozen, output, clean=clean, noise=noise, t=t, t_prime=t_primes.t_prime, cond=cond, x_t=x_t)
        expected = mse_loss(output, noise) + perceptual.mean()
        same_gradient(now["loss"], expected, unet.parameters(), [w.grad for w in unet.parameters()])
        steps.append(now["objective"].teacher)

    name = "text_to_image_lora_sdxl" if with_lora else "text_to_image_sdxl"
    place = f"examples/text_to_image/train_{name}.py"
    main = patched(tmp_path, f"diffusers_{name}.patch", f"diffusers/train_{name}.py", place)
    main(diffusers_args(unet, batches(TEXT | {"time_ids": (4, 6), "pooled": (4, 8)}), watch))
    assert len(steps) == 3
    assert (getattr(steps[0], "parameters_held", None) == 0) == with_lora  # the base's weights are shared


@pytest.mark.parametrize("prior", [False, True], ids=["instances", "with priors"])
def test_patched_dreambooth_weighs_the_priors_as_its_own_loss_does(tmp_path, t_primes, prior):
    unet = conditional_unet()
    frozen, steps = freeze(unet), []
    lora(unet)

    def watch(now):
        x_t, t, cond = now["noisy_model_input"], now["timesteps"], {"encoder_hidden_states": now["batch"]["text"]}
        output = unet(x_t, t, **cond).sample
        clean, noise = now["model_input"], now["noise"]
        perceptual = sp(frozen, output, clean=clean, noise=noise, t=t, t_prime=t_primes.t_prime, cond=cond, x_t=x_t)
        each = perceptual + ((output - noise) ** 2).flatten(1).mean(1)
        expected = each[:2].mean() + 0.3 * each[2:].mean() if prior else each.mean()
        same_gradient(now["loss"], expected, unet.parameters(), [w.grad for w in unet.parameters()])
        steps.append(now["objective"].teacher.parameters_held)

    place = "examples/dreambooth/train_dreambooth_lora.py"
    main = patched(tmp_path, "diffusers_dreambooth_lora.patch", "diffusers/train_dreambooth_lora.py", place)
    main(diffusers_args(unet, batches(), watch, with_prior_preservation=prior))
    assert steps == [0, 0, 0]


# --- what docs/trainers.md says -------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "trainers.md").read_text("utf-8")
ROWS = [line for line in PAGE.splitlines() if "](../examples/trainers/" in line and line.startswith("|")]


def changed(patch):
    """Lines that a patch adds and removes."""
    lines = [line for line in (PLUGINS / patch).read_text("utf-8").splitlines() if line[:3] not in ("+++", "---")]
    return sum(line.startswith("+") for line in lines), sum(line.startswith("-") for line in lines)


def test_the_page_counts_the_lines_of_every_patch_and_plug_in():
    counted = set()
    for row in ROWS:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        names = re.findall(r"\.\./examples/trainers/(\w+\.\w+)", row)
        counted.update(names)
        for name in names:
            if name.endswith(".patch"):
                assert "+{} −{}".format(*changed(name)) in cells[1], row
            else:
                assert str(len((PLUGINS / name).read_text("utf-8").splitlines())) == cells[3], row
    assert counted == {path.name for path in PLUGINS.iterdir() if path.is_file()}


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "trainers").rglob("*.py")), ids=lambda path: path.name)
def test_each_stand_in_says_which_version_it_imitates_and_so_does_the_page(path):
    text = path.read_text("utf-8")
    if not text.strip():
        return
    assert '"""Stands in for' in text.splitlines()[0]
    versions = re.findall(r"at ([0-9a-f]{7})\b|SimpleTuner (4\.10\.1)", text)
    assert versions
    assert all("".join(version) in PAGE for version in versions)


# --- the drop-in ----------------------------------------------------------------------------------------------------------


def test_the_drop_in_runs_goes_on_and_is_not_overwritten(tmp_path, capsys):
    drop_in = runpy.run_path(str(ROOT / "examples" / "drop_in.py"))
    out, options = tmp_path / "run", ["--smoke", "--batch=2", "--sampling=1", f"--out={tmp_path / 'run'}"]
    drop_in["main"]([*options, "--steps=1"])
    before, after = (out / "before.png").read_bytes(), (out / "after.png").read_bytes()
    assert before != after
    with pytest.raises(SystemExit) as stopped:
        drop_in["main"](options)
    assert stopped.value.code == 2
    assert "is not empty" in capsys.readouterr().err
    drop_in["main"]([*options, "--steps=2", "--resume"])
    assert (out / "checkpoints" / "step-00000002").is_dir()
    assert (out / "before.png").read_bytes() == before
    assert (out / "after.png").read_bytes() != after
    with pytest.raises(SystemExit) as stopped:
        drop_in["main"](["--smoke", "--data=digits", "--model", str(tmp_path), "--out", str(tmp_path / "other")])
    assert stopped.value.code == 2
    assert not (tmp_path / "other" / "model").exists()


@pytest.mark.slow
def test_the_drop_in_runs_in_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # `--cpu --num_processes 2` is one process without MPI; without a GPU this is two on the CPU
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--main_process_port",
        port,
    ]
    script = [
        str(ROOT / "examples" / "drop_in.py"),
        "--smoke",
        "--steps=2",
        "--sampling=1",
        "--out",
        str(tmp_path / "run"),
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([*launch, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-1500:]
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "objective-1.safetensors").is_file()
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_the_drop_in_marks_three_lines_beside_a_loop_of_mse():
    lines = (ROOT / "examples" / "drop_in.py").read_text("utf-8").splitlines()
    marked = [line for line in lines if re.search(r"  # \(\d\)$", line)]
    assert [line[-2] for line in marked] == ["1", "2", "3"]
    assert "import" in marked[0]
    assert "SelfPerceptualObjective.wrap(" in marked[1]
    assert "objective.loss(model_pred" in marked[2]
