"""Stands in for examples/dreambooth/train_dreambooth_lora.py of diffusers at 8062870 (0.31.0.dev0).

Own code with its names, calls and order. The VAE and the text encoder are left out, `args` brings a tiny UNet with
its LoRA and batches (instances first, then as many priors), and `args.watch` sees each step.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator


def main(args):
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=True)
    noise_scheduler, unet = args.noise_scheduler, args.unet
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=args.learning_rate)
    lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    train_dataloader = torch.utils.data.DataLoader(args.batches, batch_size=None)

    # Prepare everything with our `accelerator`.
    if args.train_text_encoder:
        raise NotImplementedError
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )

    for batch in train_dataloader:
        with accelerator.accumulate(unet):
            if True:  # the depth of the script
                model_input, encoder_hidden_states = batch["latents"], batch["text"]
                noise = torch.randn_like(model_input)
                timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(model_input),)).long()
                noisy_model_input = noise_scheduler.add_noise(model_input, noise, timesteps)
                model_pred = unet(
                    noisy_model_input, timesteps, encoder_hidden_states, class_labels=None, return_dict=False
                )[0]
                prediction, target = model_pred, noise

                if args.with_prior_preservation:
                    # Chunk the noise and model_pred into two parts and compute the loss on each part separately.
                    model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
                    target, target_prior = torch.chunk(target, 2, dim=0)
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
                    prior_loss = F.mse_loss(model_pred_prior.float(), target_prior.float(), reduction="mean")
                    loss = loss + args.prior_loss_weight * prior_loss
                else:
                    loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")

                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    args.watch(locals())
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
