"""Stands in for examples/text_to_image/train_text_to_image_lora_sdxl.py of diffusers at 23cf712 (0.32.0.dev0).

Own code with its names, calls and order. `args` brings a tiny UNet with its LoRA, and latents and embeddings, and
`args.watch` sees each step.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator


def main(args):
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=True)
    noise_scheduler, unet, weight_dtype = args.noise_scheduler, args.unet, torch.float32
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=args.learning_rate)
    lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    train_dataloader = torch.utils.data.DataLoader(args.batches, batch_size=None)

    # Prepare everything with our `accelerator`.
    if args.train_text_encoder:
        raise NotImplementedError
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )

    train_loss = 0.0
    for batch in train_dataloader:
        with accelerator.accumulate(unet):
            if True:  # the depth of the script
                model_input = batch["latents"].to(accelerator.device)
                noise = torch.randn_like(model_input)
                timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(model_input),))
                noisy_model_input = noise_scheduler.add_noise(model_input, noise, timesteps).to(dtype=weight_dtype)
                unet_added_conditions = {"time_ids": batch["time_ids"]}
                prompt_embeds = batch["text"].to(accelerator.device, dtype=weight_dtype)
                unet_added_conditions.update({"text_embeds": batch["pooled"].to(accelerator.device)})
                model_pred = unet(
                    noisy_model_input,
                    timesteps,
                    prompt_embeds,
                    added_cond_kwargs=unet_added_conditions,
                    return_dict=False,
                )[0]
                target = noise
                loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")

                # Gather the losses across all processes for logging (if we use distributed training).
                avg_loss = accelerator.gather(loss.repeat(args.train_batch_size)).mean()
                train_loss += avg_loss.item()

                accelerator.backward(loss)
                args.watch(locals())
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
