"""What a user would take instead of the objective: losses of other networks. Random weights: they cost the same.

x̂_0 comes from the student's prediction; the true image and its latents are at hand, and only what depends on the prediction
carries a gradient.
"""

from collections.abc import Sequence
from functools import partial

import timm
import torch
from _step_count import Step
from _step_models import Batch
from _step_variants import Study, Variant
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vgg16

from perceptual_diffusion import taps

VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
STAGES = (3, 8, 15, 22, 29)
"""The activations of VGG16 that LPIPS compares."""


def vgg_on_pixels(study: Study, given: Batch) -> Step:
    """LPIPS: decode x̂_0 to pixels, and compare VGG16's features with those of the true image."""
    channels, pixels = study.case.latent, _pixels(study, given)
    with study.mode:
        decoder = _decoder(study) if channels else nn.Identity()
        vgg = vgg16(weights=None).features.eval().requires_grad_(False)
        image = torch.randn(len(given.clean), 3, pixels, pixels)

    def stages(x: Tensor) -> list[Tensor]:
        found = []
        for index, module in enumerate(vgg):
            # not in place: the activation before would be lost to the gradient
            x = F.relu(x) if isinstance(module, nn.ReLU) else module(x)
            if index in STAGES:
                found.append(x)
            if index == STAGES[-1]:
                break
        return found

    def run() -> None:
        study.forget()
        decoded = decoder(_maps(study, _clean_hat(study, given)))
        with torch.no_grad():
            true = stages(image)
        _distance(stages(decoded), true).backward()

    return Step(run=run, held=[vgg, decoder])


def decoder_features(study: Study, given: Batch, *, up_blocks: int) -> Step:
    """LPL: features of the VAE's decoder on x̂_0 and x_0, after its middle and the first of its up blocks."""
    with study.mode:
        decoder = _decoder(study)
        del decoder.up_blocks[up_blocks:], decoder.conv_out, decoder.conv_norm_out

    def stages(latents: Tensor) -> list[Tensor]:
        found = [decoder.mid_block(decoder.conv_in(latents))]
        for block in decoder.up_blocks:
            found.append(block(found[-1]))
        return found

    def run() -> None:
        study.forget()
        predicted = stages(_maps(study, _clean_hat(study, given)))
        with torch.no_grad():
            true = stages(_maps(study, given.clean))
        _distance(predicted, true).backward()

    return Step(run=run, held=[decoder])


def alignment(study: Study, given: Batch) -> Step:
    """REPA: MSE, and the student's hidden tokens aligned with DINOv2-B's of the true image by a trained projector."""
    seen: list[Tensor] = []
    with torch.device("meta"):  # it reads numbers while it is built, which fake tensors do not have
        vit = timm.create_model("vit_base_patch14_dinov2", pretrained=False, num_classes=0, img_size=224)
    with study.mode:
        vit = vit.to_empty(device="cpu").eval().requires_grad_(False)
        image = torch.randn(len(given.clean), 3, 224, 224)

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        seen.append(taps.select(output, args, kwargs))

    def tokens() -> Tensor:
        feature = seen.pop()
        return feature.flatten(2).transpose(1, 2) if feature.ndim == 4 else feature

    def predict() -> Tensor:
        handle = study.model.get_submodule(study.layer).register_forward_hook(hook, with_kwargs=True)
        prediction = study.predict(given)[1]
        handle.remove()
        return prediction

    with torch.no_grad():
        predict()
    width = tokens().shape[-1]
    with study.mode:
        layers = (nn.Linear(width, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(), nn.Linear(2048, vit.embed_dim))
        projector = nn.Sequential(*layers)

    def run() -> None:
        study.forget()
        projector.zero_grad()
        loss = study.mse(predict(), given)
        with torch.no_grad():
            true = vit.forward_features(image)[:, vit.num_prefix_tokens :]
        aligned = F.adaptive_avg_pool1d(projector(tokens()).transpose(1, 2), true.shape[1]).transpose(1, 2)
        (loss - 0.5 * F.cosine_similarity(aligned, true, dim=-1).mean()).backward()

    return Step(run=run, trained=[projector], held=[vit])


def _decoder(study: Study) -> nn.Module:
    vae = AutoencoderKL(latent_channels=study.case.latent, **VAE)
    return vae.decoder.eval().requires_grad_(False)


def _pixels(study: Study, given: Batch) -> int:
    side = _maps(study, given.clean).shape[-1]
    return int(side * (8 if study.case.latent else 1))


def _maps(study: Study, x: Tensor) -> Tensor:
    """Flux's packed tokens (B, N, 4 C) as latents (B, C, H, W); others are that already."""
    if x.ndim == 4:
        return x
    side = int(x.shape[1] ** 0.5)
    x = x.unflatten(1, (side, side)).unflatten(3, (study.case.latent, 2, 2))
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _clean_hat(study: Study, given: Batch) -> Tensor:
    x_t, prediction = study.predict(given)
    alpha, sigma = (s.float().view(-1, *[1] * (x_t.ndim - 1)) for s in study.case.schedule(given.t))
    return x_t - sigma * prediction if study.case.flow else alpha * x_t - sigma * prediction


def _distance(predicted: Sequence[Tensor], true: Sequence[Tensor]) -> Tensor:
    """Squared differences of features that are normalised over their channels."""
    pairs = zip(predicted, true, strict=True)
    return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() for a, b in pairs)


def outside(study: Study) -> dict[str, Variant]:
    """What there is to take instead for a model: of pixels, nothing that needs a VAE."""
    found: dict[str, Variant] = {"LPIPS-VGG on pixels": vgg_on_pixels}
    if study.case.latent:
        for blocks, name in ((0, "LPL, decoder's middle"), (2, "LPL, middle and 2 up blocks")):
            found[name] = partial(decoder_features, up_blocks=blocks)
    return found | {"REPA, DINOv2-B": alignment}
