"""Stands in for library/train_util.py of kohya-ss/sd-scripts at 6edbe00, the version with `process_batch`. Own code."""

import argparse

import torch


def get_noise_noisy_latents_and_timesteps(args, noise_scheduler, latents):
    noise = torch.randn_like(latents)
    if args.noise_offset:
        noise = noise + args.noise_offset * torch.randn(*latents.shape[:2], 1, 1)
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),))
    given = noise + args.ip_noise_gamma * torch.randn_like(latents) if args.ip_noise_gamma else noise
    return noise, noise_scheduler.add_noise(latents, given, timesteps), timesteps


def conditional_loss(noise_pred, target, loss_type, reduction, huber_c):
    assert (loss_type, reduction) == ("l2", "none")
    return torch.nn.functional.mse_loss(noise_pred, target, reduction="none")


def verify_command_line_training_args(args):
    assert isinstance(args, argparse.Namespace)


def read_config_from_file(args, parser):
    return args
