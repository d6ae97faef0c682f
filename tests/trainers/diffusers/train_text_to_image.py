"""Stands in for examples/text_to_image/train_text_to_image.py of diffusers at 000280f (0.22.0.dev0).

Own code with its names, calls and order. The VAE and the text encoder are left out, `args` brings a tiny UNet and
batches, and `args.watch` sees each step.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator


def main(args):
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=True)
    noise_scheduler, unet = args.noise_scheduler, args.unet
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate)
    lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    train_dataloader = torch.utils.data.DataLoader(args.batches, batch_size=None)

    # Prepare everything with our `accelerator`.
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )

    train_loss = 0.0
    for batch in train_dataloader:
        with accelerator.accumulate(unet):
            if True:  # the depth of the script
                latents, encoder_hidden_states = batch["latents"], batch["text"]
                noise = torch.randn_like(latents)
                if args.noise_offset:
                    noise += args.noise_offset * torch.randn((latents.shape[0], latents.shape[1], 1, 1))
                new_noise = noise + args.input_perturbation * torch.randn_like(noise)
                timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),)).long()
                noisy_latents = noise_scheduler.add_noise(latents, new_noise, timesteps)

                if args.prediction_type is not None:
                    noise_scheduler.register_to_config(prediction_type=args.prediction_type)
                target = noise
                if noise_scheduler.config.prediction_type == "v_prediction":
                    target = noise_scheduler.get_velocity(latents, noise, timesteps)
                model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
                loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")

                # Gather the losses across all processes for logging (if we use distributed training).
                avg_loss = accelerator.gather(loss.repeat(args.train_batch_size)).mean()
                train_loss += avg_loss.item()

                accelerator.backward(loss)
                args.watch(locals())
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
