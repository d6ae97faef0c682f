"""Stands in for train_network.py of kohya-ss/sd-scripts at 6edbe00: `NetworkTrainer`, its hooks and their order. Own code.

`Job` holds what its data set and model files would bring.
"""

import argparse
import copy

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from library import train_util
from torch import nn


class Job:
    unet = batches = watch = None


class LoRA(nn.Module):
    """In front of a Linear, by taking the place of its forward."""

    def __init__(self, linear):
        super().__init__()
        self.down, self.up = nn.Linear(linear.in_features, 2, bias=False), nn.Linear(2, linear.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.2)
        self.multiplier, self.org_forward = 1.0, linear.forward
        linear.forward = self.forward

    def forward(self, x):
        return self.org_forward(x) + self.multiplier * self.up(self.down(x))


class Network(nn.Module):
    def apply_to(self, unet):
        linears = [m for n, m in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v"))]
        self.loras = nn.ModuleList(LoRA(linear) for linear in linears)


class NetworkTrainer:
    def __init__(self):
        self.vae_scale_factor = 0.18215
        self.is_sdxl = False

    def get_noise_scheduler(self, args, device):
        return DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
            rescale_betas_zero_snr=args.zero_terminal_snr,
        )  # fmt: skip

    def post_process_network(self, args, accelerator, network, text_encoders, unet):
        pass

    def post_process_loss(self, loss, args, timesteps, noise_scheduler):
        return loss

    def call_unet(self, args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype, **kwargs):
        return unet(noisy_latents, timesteps, text_conds[0]).sample

    def get_noise_pred_and_target(
        self, args, accelerator, noise_scheduler, latents, batch, text_encoder_conds, unet, network, weight_dtype, train_unet,
        is_train=True,
    ):  # fmt: skip
        noise, noisy_latents, timesteps = train_util.get_noise_noisy_latents_and_timesteps(
            args, noise_scheduler, latents
        )
        with torch.set_grad_enabled(is_train), accelerator.autocast():
            noise_pred = self.call_unet(
                args, accelerator, unet, noisy_latents.requires_grad_(train_unet), timesteps, text_encoder_conds, batch,
                weight_dtype,
            )  # fmt: skip
        target = noise_scheduler.get_velocity(latents, noise, timesteps) if args.v_parameterization else noise
        self.seen = noise, noisy_latents, timesteps, noise_pred, target
        return noise_pred, target, timesteps, None

    def process_batch(
        self, batch, text_encoders, unet, network, vae, noise_scheduler, vae_dtype, weight_dtype, accelerator, args,
        is_train=True,
    ):  # fmt: skip
        latents = batch["latents"] * self.vae_scale_factor
        noise_pred, target, timesteps, _ = self.get_noise_pred_and_target(
            args,
            accelerator,
            noise_scheduler,
            latents,
            batch,
            [batch["text"]],
            unet,
            network,
            weight_dtype,
            True,
            is_train,
        )
        loss = train_util.conditional_loss(noise_pred.float(), target.float(), args.loss_type, "none", None)
        loss = loss.mean([1, 2, 3])
        loss = loss * batch["loss_weights"]
        loss = self.post_process_loss(loss, args, timesteps, noise_scheduler)
        return loss.mean()

    def train(self, args):
        accelerator, unet, weight_dtype = Accelerator(cpu=True), Job.unet, torch.float32
        network = Network()
        self.post_process_network(args, accelerator, network, [], unet)
        network.apply_to(unet)
        unet.requires_grad_(False)
        unet.to(accelerator.device, dtype=weight_dtype)
        optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate)
        unet, network, optimizer = accelerator.prepare(unet, network, optimizer)
        noise_scheduler = self.get_noise_scheduler(args, accelerator.device)
        for batch in Job.batches:
            given = (
                copy.copy(batch),
                [],
                unet,
                network,
                None,
                noise_scheduler,
                weight_dtype,
                weight_dtype,
                accelerator,
                args,
            )
            loss = self.process_batch(*given)
            Job.watch(self, unet, network, batch, loss)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            Job.validation = float(self.process_batch(*given, is_train=False))


def setup_parser():
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--noise_offset", type=float)
    parser.add_argument("--ip_noise_gamma", type=float)
    parser.add_argument("--loss_type", default="l2")
    parser.add_argument("--v_parameterization", action="store_true")
    parser.add_argument("--zero_terminal_snr", action="store_true")
    return parser
