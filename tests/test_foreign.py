"""The general rule on models of packages that nobody here wrote; the middle of each was read from its source first.

The extra `foreign` brings those that install beside a current torch; this file was written with
    a-unet==0.0.16
    azula==0.11.1
    denoising-diffusion-pytorch==2.3.4
    mmdit==0.3.0
    monai==1.6.1
    rectified-flow-pytorch==0.14.0
    score-models==0.5.11
    smalldiffusion==0.5.0
    x-transformers==2.31.10
Others would bring another torch or pin old versions: `pip install --no-deps` them, and einops-exts, pot, torchdiffeq.
    autoregressive-diffusion-pytorch==0.4.0
    diffwave==0.1.7
    labml-nn==0.5.1
    stable-audio-tools==0.0.19
    torchcfm==1.0.7
    video-diffusion-pytorch==0.7.0
    wavegrad==0.1.5
"""

from types import SimpleNamespace

import pytest
import torch

from perceptual_diffusion import taps
from perceptual_diffusion.adapters.general import middle

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # other people's warnings

T = torch.tensor([0.3, 0.8])
STEPS = torch.tensor([100, 800])
MAPS, SOUND, CLIP = (2, 3, 16, 16), (2, 4, 16), (2, 3, 4, 16, 16)
MODELS = {}


def load(module, name):
    return getattr(pytest.importorskip(module, exc_type=ImportError), name)


def foreign(layer, shape, call=lambda model, x: model(x, STEPS)):
    """Keep what builds a model, with the layer a person would call its middle, the shape of its sample and its call."""

    def keep(build):
        MODELS[build.__name__] = (build, layer, shape, call)
        return build

    return keep


# --- U-Nets that name their middle -------------------------------------------------------------------------------------


@foreign("mid_block2", MAPS)
def denoising_diffusion_unet():
    return load("denoising_diffusion_pytorch", "Unet")(16, dim_mults=(1, 2))


@foreign("model.mid_block2", MAPS, lambda diffusion, x: diffusion.model(x, STEPS))
def denoising_diffusion_gaussian():
    unet = denoising_diffusion_unet()
    return load("denoising_diffusion_pytorch", "GaussianDiffusion")(unet, image_size=16)


@foreign("mid_block2", SOUND)
def denoising_diffusion_unet_1d():
    return load("denoising_diffusion_pytorch", "Unet1D")(16, dim_mults=(1, 2), channels=4)


def karras(module, name, **size):
    options = {"dim": 16, "dim_max": 32, "num_downsamples": 2, "num_blocks_per_stage": 1, "attn_dim_head": 8}
    return load(f"denoising_diffusion_pytorch.{module}", name)(**options, **size)


@foreign("mids.1", (2, 4, 16, 16), lambda model, x: model(x, T))
def denoising_diffusion_karras():
    return karras("karras_unet", "KarrasUnet", image_size=16, attn_res=(8,))


@foreign("mids.1", SOUND, lambda model, x: model(x, T))
def denoising_diffusion_karras_1d():
    return karras("karras_unet_1d", "KarrasUnet1D", seq_len=16, attn_res=(8,))


@foreign("vit", MAPS, lambda model, x: model(x, T))
def denoising_diffusion_simple():
    return load("denoising_diffusion_pytorch.simple_diffusion", "UViT")(16, dim_mults=(1, 2), vit_depth=2)


@foreign("mid_block2", MAPS, lambda model, x: model(x, T))
def rectified_flow_unet():
    return load("rectified_flow_pytorch.rectified_flow", "Unet")(16, dim_mults=(1, 2))


@foreign("model.mid_block2", MAPS, lambda flow, x: flow.model(x, T))
def rectified_flow_wrapper():
    return load("rectified_flow_pytorch.rectified_flow", "RectifiedFlow")(rectified_flow_unet())


@foreign("mid_block2", CLIP, lambda model, x: model(x, T))
def rectified_flow_video():
    return load("rectified_flow_pytorch.video_unet", "VideoUnet")(16, dim_mults=(1, 2))


@foreign("mid_block2", CLIP)
def video_diffusion():
    return load("video_diffusion_pytorch", "Unet3D")(16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8)


def monai_unet(dims):
    return load("monai.networks.nets", "DiffusionModelUNet")(
        spatial_dims=dims, in_channels=1, out_channels=1, channels=(8, 16), attention_levels=(False, True),
        num_head_channels=8, num_res_blocks=1, norm_num_groups=8,
    )  # fmt: skip


@foreign("middle_block", (2, 1, 16, 16))
def monai_diffusion():
    return monai_unet(2)


@foreign("middle_block", (2, 1, 8, 8, 8))
def monai_diffusion_3d():
    return monai_unet(3)


@foreign("bottleneck", (2, 1, 32, 32), lambda model, x: model(x))
def monai_mednext():
    return load("monai.networks.nets", "MedNeXt")(spatial_dims=2, init_filters=4)


@foreign("bottleneck", (2, 1, 16, 16), lambda model, x: model(x))
def monai_dynunet():
    options = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    return load("monai.networks.nets", "DynUNet")(spatial_dims=2, in_channels=1, out_channels=1, **options)


@foreign("mid", MAPS, lambda model, x: model(x, T))
def smalldiffusion_unet():
    return load("smalldiffusion", "Unet")(16, 3, 3, ch=32, ch_mult=(1, 2))


@foreign("middle_block", MAPS, lambda model, x: model(T, x))
def torchcfm_unet():
    build = load("torchcfm.models.unet.unet", "UNetModelWrapper")
    return build(dim=(3, 16, 16), num_channels=32, num_res_blocks=1, channel_mult=(1, 2), num_heads=1)


@foreign("middle", MAPS)
def labml_unet():
    return load("labml_nn.diffusion.ddpm.unet", "UNet")(n_channels=32, ch_mults=(1, 2), is_attn=(False, True))


@foreign("middle_block", (2, 4, 16, 16), lambda model, x: model(x, STEPS, torch.ones(2, 3, 8)))
def labml_stable_diffusion():
    return load("labml_nn.diffusion.stable_diffusion.model.unet", "UNetModel")(
        in_channels=4, out_channels=4, channels=32, n_res_blocks=1, attention_levels=[1], channel_multipliers=[1, 2],
        n_heads=2, tf_layers=1, d_cond=8,
    )  # fmt: skip


@foreign("bottleneck", (2, 2, 16), lambda model, x: model(x, T))
def stable_audio_unet():
    return load("stable_audio_tools.models.adp", "UNet1d")(
        in_channels=2, channels=16, patch_size=1, resnet_groups=8, kernel_multiplier_downsample=2, multipliers=[1, 2],
        factors=[2], num_blocks=[1], attentions=[0], use_context_time=True,
    )  # fmt: skip


# --- U-Nets that do not -----------------------------------------------------------------------------------------------


@foreign("descent.1.2", MAPS, lambda model, x: model(x, torch.ones(2, 8)))
def azula_unet():
    return load("azula.nn.unet", "UNet")(3, 3, mod_features=8, hid_channels=(8, 16), hid_blocks=(2, 2))


@foreign("down_4", (2, 1, 32, 32), lambda model, x: model(x))
def monai_basic_unet():
    return load("monai.networks.nets", "BasicUNet")(spatial_dims=2, features=(4, 4, 8, 8, 16, 4))


@foreign("down_layers.3", (2, 1, 16, 16), lambda model, x: model(x))
def monai_segresnet():
    return load("monai.networks.nets", "SegResNet")(spatial_dims=2)


@foreign("latent", MAPS, lambda model, x: model(x))
def monai_restormer():
    return load("monai.networks.nets.restormer", "Restormer")(dim=8)


@foreign("model.1.submodule.1.submodule.1.submodule", (2, 1, 16, 16), lambda model, x: model(x))
def monai_nested_unet():
    options = {"in_channels": 1, "out_channels": 1, "channels": (4, 8, 16, 32), "strides": (2, 2, 2)}
    return load("monai.networks.nets", "UNet")(spatial_dims=2, **options)


@foreign("net.block.blocks.3.block.blocks.3", (2, 2, 16), lambda model, x: model(x, features=torch.ones(2, 16)))
def a_unet_of_nested_blocks():
    apex = pytest.importorskip("a_unet.apex")
    shared = {"skip_t": apex.SkipModulate, "resnet_groups": 4, "modulation_features": 16}
    items = [apex.ResnetItem, apex.ModulationItem]
    blocks = [apex.XBlock(channels=c, factor=f, items=items, **shared) for c, f in ((8, 1), (16, 2), (32, 2))]
    return apex.XUNet(dim=1, in_channels=2, blocks=blocks, **shared)


@foreign("downsample.4", (2, 300), lambda model, x: model(x, torch.ones(2, 128, 1), T))
def wavegrad():
    return load("wavegrad.model", "WaveGrad")(None)


@foreign("all_modules.10", MAPS, lambda model, x: model(T, x))
def score_models_ncsnpp():
    return load("score_models", "NCSNpp")(channels=3, nf=8, ch_mult=(1, 2), num_res_blocks=1)


@foreign("all_modules.9", MAPS, lambda model, x: model(T, x))
def score_models_ddpm():
    return load("score_models", "DDPM")(channels=3, nf=8, ch_mult=(1, 2), num_res_blocks=1)


# --- blocks in a row --------------------------------------------------------------------------------------------------


@foreign("blocks.2", MAPS, lambda model, x: model(x, torch.ones(2, 8)))
def azula_vit():
    return load("azula.nn.vit", "ViT")(3, 3, mod_features=8, hid_channels=32, hid_blocks=4, patch_size=2)


@foreign("blocks.2", MAPS, lambda model, x: model(x, T))
def smalldiffusion_dit():
    return load("smalldiffusion", "DiT")(in_dim=16, depth=4, head_dim=8, num_heads=2)


@foreign("transformer.layers.2", SOUND, lambda model, x: model(x, T))
def stable_audio_dit():
    build = load("stable_audio_tools.models.dit", "DiffusionTransformer")
    return build(io_channels=4, embed_dim=64, depth=4, num_heads=2)


@foreign("attn_layers.layers.4.2", (2, 6, 8), lambda model, x: model(x))
def x_transformers():
    build, encoder = (load("x_transformers", name) for name in ("ContinuousTransformerWrapper", "Encoder"))
    return build(dim_in=8, dim_out=8, max_seq_len=16, attn_layers=encoder(dim=16, depth=4, heads=2))


@foreign(
    "blocks.2",
    (2, 6, 16),
    lambda model, x: model(modality_tokens=(x, torch.ones(2, 3, 16)), time_cond=x.new_ones(2, 8)),
)
def mmdit():
    build = load("mmdit.mmdit_generalized_pytorch", "MMDiT")
    return build(depth=4, dim_modalities=(16, 16), dim_cond=8, heads=2, dim_head=8)


@foreign("residual_layers.3", (2, 256), lambda model, x: model(x, torch.ones(2, 4, 1), STEPS))
def diffwave():
    config = {"residual_channels": 8, "noise_schedule": [0.1] * 1000, "n_mels": 4, "residual_layers": 6}
    return load("diffwave.model", "DiffWave")(SimpleNamespace(**config, dilation_cycle_length=3))


@foreign("layers.2.1", (2, 8), lambda model, x: model(x, times=T, cond=torch.ones(2, 8)))
def autoregressive_diffusion_head():
    build = load("autoregressive_diffusion_pytorch.autoregressive_diffusion", "MLP")
    return build(8, 8, depth=4, width=16)


@foreign("net.5", (2, 2), lambda model, x: model(x, T))
def smalldiffusion_mlp():
    return load("smalldiffusion", "TimeInputMLP")()


@foreign("net.3", (2, 3), lambda model, x: model(x))
def torchcfm_mlp():
    return load("torchcfm.models.models", "MLP")(2, time_varying=True)


def first(output, args, kwargs):
    """Take the first tensor, however deep: where several streams are given, all of these models give the sample's first."""
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


@pytest.mark.parametrize("name", MODELS)
def test_the_middle_is_the_one_a_person_would_name_and_it_sees_the_sample(name):
    build, layer, shape, call = MODELS[name]
    model = build().eval()
    found = middle(model)
    assert found.layers == (layer,), found
    assert layer in found.candidates or any(layer.startswith(f"{other}.") for other in found.candidates)
    x = torch.randn(shape, requires_grad=True)
    for parameter in model.parameters():  # many start with layers at zero, which no gradient passes
        if parameter.is_floating_point() and not parameter.any():
            torch.nn.init.normal_(parameter.data, std=0.1)
    (feature,) = taps.run(model, [layer], lambda: call(model, x), select=first)
    (gradient,) = torch.autograd.grad(feature.square().sum(), x)
    assert all(sample.any() for sample in gradient)
