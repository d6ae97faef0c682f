"""Lightning, sd-scripts and SimpleTuner: the plug-ins of examples/trainers on a real Trainer and on stand-ins."""

import copy
import importlib
import logging
import runpy
import sys
import warnings
from argparse import Namespace

import pytest
import torch
import trainer_tools
from algorithm1 import freeze
from models import conditional_unet
from paper import PaperObjective
from peft import LoraConfig
from torch.nn.functional import mse_loss
from trainer_tools import PLUGINS, STANDINS, same_gradient, scheduler, sp

plugins, t_primes = trainer_tools.plugins, trainer_tools.t_primes
# diffusers 0.42 turns torch tensors to numpy the old way under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

TEXT = {"latents": (4, 4, 8, 8), "text": (4, 5, 8)}


def batches(n=3, **more):
    return [{name: torch.randn(shape) for name, shape in TEXT.items()} | more for _ in range(n)]


# --- sd-scripts ---------------------------------------------------------------------------------------------------------

OPTIONS = {"epsilon": [], "v, zero terminal SNR": ["--v_parameterization", "--zero_terminal_snr"],
           "offset noise, perturbed input": ["--noise_offset=0.1", "--ip_noise_gamma=0.2"]}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sd_scripts_add_algorithm_1_with_each_samples_weight_and_without_the_network(t_primes, monkeypatch, options):
    monkeypatch.syspath_prepend(STANDINS / "kohya")
    script, unet, steps = importlib.import_module("train_network"), conditional_unet(), []
    frozen, weights = freeze(unet), torch.tensor([1.0, 1.0, 0.5, 0.25])
    kind = "v_prediction" if "--v_parameterization" in options else "epsilon"
    bar = scheduler(rescale_betas_zero_snr="--zero_terminal_snr" in options).alphas_cumprod.double()
    monkeypatch.setattr(script.Job, "unet", unet)
    monkeypatch.setattr(script.Job, "batches", batches(loss_weights=weights))

    def watch(trainer, unet, network, batch, loss):
        noise, x_t, t, output, target = trainer.seen
        clean, cond = batch["latents"] * 0.18215, {"encoder_hidden_states": batch["text"]}
        perceptual = sp(
            frozen, output, clean=clean, noise=noise, t=t, t_prime=t_primes.t_prime, cond=cond, kind=kind, x_t=x_t.detach(),
            scales=lambda t: (bar[t].sqrt(), (1 - bar[t]).sqrt()),
        )  # fmt: skip
        each = ((output - target) ** 2).flatten(1).mean(1) + perceptual
        same_gradient(loss, (weights * each).mean(), network.parameters())
        base = dict(trainer.objective.teacher.module.named_parameters())
        assert all(base[name] is weight for name, weight in unet.named_parameters() if name in base)
        steps.append(float(perceptual.detach().mean()))

    monkeypatch.setattr(script.Job, "watch", watch)
    monkeypatch.setattr(sys, "argv", ["kohya_train.py", *options])
    runpy.run_path(str(PLUGINS / "kohya_train.py"), run_name="__main__")
    assert len(steps) == 3
    assert min(steps) > 1e-3
    assert script.Job.validation > 0


def test_a_trainer_of_sd_scripts_that_draws_its_noise_elsewhere_is_refused(plugins, monkeypatch):
    monkeypatch.syspath_prepend(STANDINS / "kohya")
    plugin, script = importlib.import_module("kohya_train"), importlib.import_module("train_network")

    class Flux(plugin.SelfPerceptual, script.NetworkTrainer):
        def get_noise_pred_and_target(self, args, accelerator, noise_scheduler, latents, *rest, **named):
            return latents, latents, torch.zeros(4), None

    monkeypatch.setattr(script.Job, "unet", conditional_unet())
    monkeypatch.setattr(script.Job, "batches", batches(loss_weights=torch.ones(4)))
    with pytest.raises(SystemExit, match="draws its noise elsewhere: the plug-in is for SD 1, SD 2 and SDXL"):
        Flux().train(script.setup_parser().parse_args([]))


# --- SimpleTuner --------------------------------------------------------------------------------------------------------


@pytest.fixture
def simpletuner(t_primes, monkeypatch):
    """The plug-in, installed in the stand-in."""
    monkeypatch.syspath_prepend(STANDINS / "simpletuner")
    standin = importlib.import_module("foundation")
    importlib.import_module("simpletuner_train").install(standin.ModelFoundation)
    return standin


def linear(t):
    return 1 - t / 1000, t / 1000


@pytest.mark.parametrize("kind", ["StableDiffusion1", "Flow"])
@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "LoRA"])
def test_simpletuner_adds_algorithm_1_to_the_loss_of_its_families(simpletuner, t_primes, kind, with_lora):
    unet, flow, steps = conditional_unet(), kind == "Flow", []
    frozen = freeze(unet)
    if with_lora:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian"))
    config = Namespace(input_perturbation=0.0 if flow else 0.2, model_type="lora" if with_lora else "full")
    foundation = getattr(simpletuner, kind)(config, unet, None if flow else scheduler())
    t_primes.t_prime = t_primes.t_prime.float() if flow else t_primes.t_prime

    def watch(batch, output, loss):
        cond = {"encoder_hidden_states": batch["encoder_hidden_states"]}
        drawn = {name: batch[name] for name in ("noise", "x_t") if name in batch}
        more = {"kind": "flow_prediction", "scales": linear} if flow else {"x_t": batch["noisy_latents"]}
        perceptual = sp(
            frozen, output, clean=batch["latents"], **drawn, t=batch["timesteps"], t_prime=t_primes.t_prime, cond=cond, **more
        )  # fmt: skip
        target = batch["noise"] - batch["latents"] if flow else batch["noise"]
        same_gradient(loss, mse_loss(output, target) + perceptual.mean(), unet.parameters())
        steps.append(float(perceptual.detach().mean()))

    data = [{"latents": b["latents"], "encoder_hidden_states": b["text"], "captions": list("abcd")} for b in batches()]
    simpletuner.train(foundation, data, watch)
    assert len(steps) == 3
    assert min(steps) > 1e-3
    prepared = foundation.prepare_batch(data[0])
    prepared["target"] = torch.zeros(4, 4, 8, 8)  # a sample that keeps the base's prediction
    output = foundation.model_predict(prepared)
    assert torch.equal(foundation.loss(prepared, output), mse_loss(output["model_prediction"], prepared["target"]))


def test_a_family_of_simpletuner_with_a_loss_of_its_own_is_named(simpletuner, caplog):
    foundation = simpletuner.OwnLoss(Namespace(model_type="full"), conditional_unet(), scheduler())
    with caplog.at_level(logging.WARNING, "perceptual_diffusion"):
        foundation.before_accelerator_prepare()
    assert "OwnLoss has a loss of its own" in caplog.text


# --- Lightning ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning(plugins):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pl = importlib.import_module("lightning.pytorch")
    return pl, importlib.import_module("lightning_callback").SelfPerceptualCallback


def lit_module(pl, unet):
    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.unet, self.losses = unet, []
            self.objective = PaperObjective.wrap(unet, scheduler(), distance="normalised", mse_weight=1.0, seed=7)

        def training_step(self, batch, index):
            loss = self.objective(self.unet, batch["latents"], cond={"encoder_hidden_states": batch["text"]})
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.unet.parameters(), lr=1e-2)

    return Model()


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers, devices and loggers
def test_a_lightning_run_that_goes_on_draws_and_learns_as_one_that_was_not_stopped(lightning, tmp_path):
    pl, callback = lightning
    unet, data = conditional_unet(), torch.utils.data.DataLoader(batches(1), batch_size=None)

    def fit(steps, name, resume=None):
        model = lit_module(pl, copy.deepcopy(unet))
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", devices=1, callbacks=[callback()], logger=pl.loggers.CSVLogger(tmp_path / name),
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        return model, trainer

    whole, trainer = fit(4, "whole")
    first, _ = fit(2, "first")
    second, _ = fit(4, "second", resume=tmp_path / "first.ckpt")
    assert first.losses + second.losses == pytest.approx(whole.losses, rel=1e-6)
    assert torch.equal(second.objective.rng_state(), whole.objective.rng_state())
    assert {"train/sp", "train/mse"} <= set(trainer.logged_metrics)
    saved = torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"unet.{name}" for name in unet.state_dict()}
