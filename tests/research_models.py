"""Small models in the shapes that research code has, each with the layer that a person would call its middle."""

import torch
from torch import nn

D = 8
TOKENS, MAPS, VECTORS = (2, 6, D), (2, 4, 8, 8), (2, D)
MODELS = {}


def model_of(layer, x=TOKENS, sure="high"):
    """Keep what builds a model, with the layer a person would call its middle and the shape of its sample."""

    def keep(build):
        MODELS[build.__name__] = (build, layer, x, sure)
        return build

    return keep


class Attention(nn.Module):
    def __init__(self, d=D):
        super().__init__()
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(torch.softmax(q @ k.mT, -1) @ v)


class Mlp(nn.Sequential):
    def __init__(self, d=D):
        super().__init__(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))


class Block(nn.Module):
    def __init__(self, d=D):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(d), Attention(d), nn.LayerNorm(d), Mlp(d)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MambaMixer(nn.Module):
    def __init__(self, d=D):
        super().__init__()
        self.in_proj, self.conv1d, self.out_proj = nn.Linear(d, d), nn.Conv1d(d, d, 3, padding=1), nn.Linear(d, d)

    def forward(self, x):
        return x + self.out_proj(self.conv1d(self.in_proj(x).mT).mT)


class Joint(nn.Module):
    """A dual-stream block: (image, text) in and out."""

    def __init__(self):
        super().__init__()
        self.img, self.txt = Block(), Block()

    def forward(self, x, c):
        x, c = self.img(torch.cat([x, c], 1)).split([x.shape[1], c.shape[1]], 1)
        return x, self.txt(c)


class Res(nn.Module):
    def __init__(self, i, o, dims=2):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
        self.norm, self.conv1, self.conv2 = nn.GroupNorm(1, i), conv(i, o, 3, padding=1), conv(o, o, 3, padding=1)
        self.skip = conv(i, o, 1) if i != o else nn.Identity()

    def forward(self, x):
        return self.skip(x) + self.conv2(torch.relu(self.conv1(self.norm(x))))


class AttnBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm, self.attn = nn.GroupNorm(1, c), Attention(c)

    def forward(self, x):
        return x + self.attn(self.norm(x).flatten(2).mT).mT.reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(nn.functional.interpolate(x, scale_factor=2))


def blocks(n, make=Block):
    return nn.ModuleList(make() for _ in range(n))


def run(modules, x):
    for module in modules:
        x = module(x)
    return x


class Parts(nn.Module):
    """Declares its modules from keywords, in that order; a module of it that has no forward is never called."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def time_mlp(d=D):
    return nn.Sequential(nn.Linear(1, d), nn.SiLU(), nn.Linear(d, d))


@model_of("blocks.2")
def nano_dit():
    class NanoDiT(Parts):
        def forward(self, x, t):
            x = self.x_embedder(x) + self.t_embedder(t[:, None])[:, None]
            return self.final_layer(run(self.blocks, x))

    return NanoDiT(
        x_embedder=nn.Linear(D, D),
        t_embedder=time_mlp(),
        blocks=blocks(5),
        final_layer=nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)),
    )


@model_of("joint_blocks.2")
def mmdit():
    class MMDiT(Parts):
        def forward(self, x, t):
            c = self.context_embedder(t[:, None, None].expand(-1, 3, 1))
            x = self.x_embedder(x)
            for block in self.joint_blocks:
                x, c = block(x, c)
            return self.final_layer(x)

    return MMDiT(
        x_embedder=nn.Linear(D, D),
        context_embedder=nn.Linear(1, D),
        joint_blocks=blocks(4, Joint),
        final_layer=nn.Linear(D, D),
    )


@model_of("single_blocks.1")
def flux_like():
    class Flux(Parts):
        def forward(self, x, t):
            c = self.txt_in(t[:, None, None].expand(-1, 3, 1))
            x = self.img_in(x)
            for block in self.double_blocks:
                x, c = block(x, c)
            return self.final_layer(run(self.single_blocks, torch.cat([c, x], 1))[:, 3:])

    return Flux(
        img_in=nn.Linear(D, D),
        time_in=time_mlp(),
        txt_in=nn.Linear(1, D),
        double_blocks=blocks(2, Joint),
        single_blocks=blocks(4),
        final_layer=nn.Linear(D, D),
    )


@model_of("mid_block")
def u_vit():
    class UViT(Parts):
        def forward(self, x, t):
            x, skips = self.embed(x), []
            for block in self.in_blocks:
                x = block(x)
                skips.append(x)
            x = self.mid_block(x)
            for block in self.out_blocks:
                x = block(x) + skips.pop()
            return self.decoder_pred(x)

    return UViT(
        embed=nn.Linear(D, D),
        time_embed=time_mlp(),
        in_blocks=blocks(3),
        mid_block=Block(),
        out_blocks=blocks(3),
        norm=nn.LayerNorm(D),
        decoder_pred=nn.Linear(D, D),
    )


class EmbedSequential(nn.Sequential):
    pass


@model_of("diffusion_model.middle_block", MAPS)
def latent_diffusion():
    class UNetModel(Parts):
        def forward(self, x, t):
            skips = []
            for block in self.input_blocks:
                x = block(x)
                skips.append(x)
            x = self.middle_block(x)
            for block in self.output_blocks:
                x = block(torch.cat([x, skips.pop()], 1))
            return self.out(x)

    class DiffusionWrapper(Parts):
        def forward(self, x, t):
            return self.diffusion_model(x, t)

    S = EmbedSequential
    return DiffusionWrapper(
        diffusion_model=UNetModel(
            time_embed=time_mlp(),
            input_blocks=nn.ModuleList(
                [S(nn.Conv2d(4, 8, 3, padding=1)), S(Res(8, 8)), S(Downsample(8)), S(Res(8, 16), AttnBlock(16))]
            ),
            middle_block=S(Res(16, 16), AttnBlock(16), Res(16, 16)),
            output_blocks=nn.ModuleList([S(Res(32, 16)), S(Res(24, 16), Upsample(16)), S(Res(24, 8)), S(Res(16, 8))]),
            out=nn.Sequential(nn.GroupNorm(1, 8), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1)),
        )
    )


def song_unet():
    class SongUNet(Parts):
        def forward(self, x, t):
            skips = []
            for block in self.enc.values():
                x = block(x)
                skips.append(x)
            for name, block in self.dec.items():
                x = block(torch.cat([x, skips.pop()], 1) if "block" in name else x)
            return self.out(x)

    enc = {
        "8x8_conv": nn.Conv2d(4, 8, 3, padding=1),
        "8x8_block0": Res(8, 8),
        "4x4_down": Downsample(8),
        "4x4_block0": Res(8, 8),
    }
    dec = {
        "4x4_in0": Res(8, 8),
        "4x4_in1": Res(8, 8),
        "4x4_block0": Res(16, 8),
        "4x4_block1": Res(16, 8),
        "8x8_up": Upsample(8),
        "8x8_block0": Res(16, 8),
        "8x8_block1": Res(16, 8),
    }
    return SongUNet(
        map_noise=nn.Identity(),
        map_layer0=nn.Linear(1, D),
        map_layer1=nn.Linear(D, D),
        enc=nn.ModuleDict(enc),
        dec=nn.ModuleDict(dec),
        out=nn.Conv2d(8, 4, 1),
    )


class Precond(nn.Module):
    def __init__(self, name, net, **others):
        super().__init__()
        self.name = name
        setattr(self, name, net)
        for other, module in others.items():
            setattr(self, other, module)

    def forward(self, x, t):
        return x + getattr(self, self.name)(x, t)


@model_of("model.dec.4x4_in1", MAPS)
def edm_precond():
    return Precond("model", song_unet())


@model_of("all_modules.8", MAPS, "medium")
def ddpm_pp():
    class NCSNpp(Parts):
        def forward(self, x, t):
            m = iter(self.all_modules)
            emb = next(m)(t[:, None])
            next(m)(emb)
            skips = [next(m)(x)]
            skips.append(next(m)(skips[-1]))
            skips.append(next(m)(skips[-1]))
            skips.append(next(m)(skips[-1]))
            h = next(m)(skips[-1])
            h = next(m)(h)
            h = next(m)(h)
            h = next(m)(torch.cat([h, skips.pop()], 1))
            h = next(m)(torch.cat([h, skips.pop()], 1))
            h = next(m)(h)
            h = next(m)(torch.cat([h, skips.pop()], 1))
            h = next(m)(torch.cat([h, skips.pop()], 1))
            h = next(m)(h)
            return next(m)(h)

    return NCSNpp(
        all_modules=nn.ModuleList(
            [
                nn.Linear(1, D),
                nn.Linear(D, D),
                nn.Conv2d(4, 8, 3, padding=1),
                Res(8, 8),
                Downsample(8),
                Res(8, 16),
                Res(16, 16),
                AttnBlock(16),
                Res(16, 16),
                Res(32, 16),
                Res(24, 16),
                Upsample(16),
                Res(24, 8),
                Res(16, 8),
                nn.GroupNorm(1, 8),
                nn.Conv2d(8, 4, 3, padding=1),
            ]
        )
    )


def lucid(**mids):
    class Unet(Parts):
        def forward(self, x, t):
            x, skips = self.init_conv(x), []
            for block1, block2, attn, down in self.downs:
                x = attn(block2(block1(x)))
                skips.append(x)
                x = down(x)
            for name in mids:
                x = getattr(self, name)(x)
            for block1, block2, attn, up in self.ups:
                x = up(attn(block2(block1(torch.cat([x, skips.pop()], 1)))))
            return self.final_conv(x)

    L = nn.ModuleList
    return Unet(
        init_conv=nn.Conv2d(4, 8, 7, padding=3),
        time_mlp=time_mlp(),
        downs=L(
            [
                L([Res(8, 8), Res(8, 8), AttnBlock(8), nn.Conv2d(8, 16, 4, 2, 1)]),
                L([Res(16, 16), Res(16, 16), AttnBlock(16), nn.Conv2d(16, 16, 3, padding=1)]),
            ]
        ),
        ups=L(
            [
                L(
                    [
                        Res(32, 16),
                        Res(16, 16),
                        AttnBlock(16),
                        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(16, 8, 3, padding=1)),
                    ]
                ),
                L([Res(16, 8), Res(8, 8), AttnBlock(8), nn.Conv2d(8, 8, 3, padding=1)]),
            ]
        ),
        **mids,
        final_res_block=Res(8, 8),
        final_conv=nn.Conv2d(8, 4, 1),
    )


@model_of("model.mid_block2", MAPS)
def gaussian_diffusion_of_a_lucid_unet():
    return Precond("model", lucid(mid_block1=Res(16, 16), mid_attn=AttnBlock(16), mid_block2=Res(16, 16)))


@model_of("vit", MAPS, "medium")
def simple_diffusion():
    class Transformer(Parts):
        def forward(self, x):
            shape, x = x.shape, x.flatten(2).mT
            for attn, ff in self.layers:
                x = attn(x) + x
                x = ff(x) + x
            return self.norm(x).mT.reshape(shape)

    return lucid(
        vit=Transformer(
            layers=nn.ModuleList(nn.ModuleList([Attention(16), Mlp(16)]) for _ in range(4)), norm=nn.LayerNorm(16)
        )
    )


@model_of("transformer.layers.2.1")
def lucid_transformer():
    class Transformer(Parts):
        def forward(self, x):
            for attn, ff in self.layers:
                x = attn(x) + x
                x = ff(x) + x
            return self.norm(x)

    class Net(Parts):
        def forward(self, x, t):
            return self.to_pred(self.transformer(self.to_tokens(x)))

    return Net(
        to_tokens=nn.Linear(D, D),
        to_time_cond=time_mlp(),
        transformer=Transformer(
            layers=nn.ModuleList(nn.ModuleList([Attention(), Mlp()]) for _ in range(4)), norm=nn.LayerNorm(D)
        ),
        to_pred=nn.Linear(D, D),
    )


@model_of("inner_model.u_net.d_blocks.2", MAPS)
def k_diffusion():
    class UNet(Parts):
        def forward(self, x, t):
            skips = []
            for block in self.d_blocks:
                x = block(x)
                skips.append(x)
            for i, (block, skip) in enumerate(zip(self.u_blocks, reversed(skips), strict=True)):
                x = block(x if i == 0 else torch.cat([x, skip], 1))
            return x

    class ImageDenoiser(Parts):
        def forward(self, x, t):
            return self.proj_out(self.u_net(self.proj_in(x), t))

    net = UNet(
        d_blocks=nn.ModuleList(
            [
                nn.Sequential(Res(8, 8)),
                nn.Sequential(Downsample(8), Res(8, 16)),
                nn.Sequential(Downsample(16), Res(16, 16), AttnBlock(16)),
            ]
        ),
        u_blocks=nn.ModuleList(
            [
                nn.Sequential(Res(16, 16), Upsample(16)),
                nn.Sequential(Res(32, 8), Upsample(8)),
                nn.Sequential(Res(16, 8)),
            ]
        ),
    )
    return Precond(
        "inner_model",
        ImageDenoiser(
            timestep_embed=nn.Linear(1, D),
            mapping=time_mlp(),
            proj_in=nn.Conv2d(4, 8, 1),
            proj_out=nn.Conv2d(8, 4, 1),
            u_net=net,
        ),
    )


@model_of("mid_level")
def hdit():
    class Level(nn.ModuleList):
        def forward(self, x):
            return run(self, x)

    class ImageTransformer(Parts):
        def forward(self, x, t):
            x, skips = self.patch_in(x), []
            for level, merge in zip(self.down_levels, self.merges, strict=True):
                x = level(x)
                skips.append(x)
                x = merge(x)
            x = self.mid_level(x)
            for level, split in zip(self.up_levels, self.splits, strict=True):
                x = level(split(x) + skips.pop())
            return self.patch_out(x)

    return ImageTransformer(
        patch_in=nn.Linear(D, D),
        mapping=Parts(in_norm=nn.LayerNorm(D), blocks=blocks(2)),
        down_levels=nn.ModuleList([Level(blocks(2))]),
        up_levels=nn.ModuleList([Level(blocks(2))]),
        mid_level=Level(blocks(4)),
        merges=nn.ModuleList([nn.Linear(D, D)]),
        splits=nn.ModuleList([nn.Linear(D, D)]),
        out_norm=nn.LayerNorm(D),
        patch_out=nn.Linear(D, D),
    )


@model_of("mid.block_2", MAPS)
def ddpm_with_bare_modules():
    class DDPM(Parts):
        def forward(self, x, t):
            x, skips = self.conv_in(x), []
            for level in self.down:
                x = run(level.block, x)
                skips.append(x)
                x = level.downsample(x) if hasattr(level, "downsample") else x
            x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
            for level in self.up:
                x = run(level.block, torch.cat([x, skips.pop()], 1))
                x = level.upsample(x) if hasattr(level, "upsample") else x
            return self.conv_out(x)

    def bare(**modules):
        module = nn.Module()
        for name, child in modules.items():
            setattr(module, name, child)
        return module

    L = nn.ModuleList
    return DDPM(
        temb=bare(dense=L([nn.Linear(1, D), nn.Linear(D, D)])),
        conv_in=nn.Conv2d(4, 8, 3, padding=1),
        down=L(
            [
                bare(block=L([Res(8, 8), Res(8, 8)]), attn=L([]), downsample=Downsample(8)),
                bare(block=L([Res(8, 16), Res(16, 16)]), attn=L([])),
            ]
        ),
        mid=bare(block_1=Res(16, 16), attn_1=AttnBlock(16), block_2=Res(16, 16)),
        up=L(
            [
                bare(block=L([Res(32, 16), Res(16, 16)]), attn=L([]), upsample=Upsample(16)),
                bare(block=L([Res(24, 8), Res(8, 8)]), attn=L([])),
            ]
        ),
        norm_out=nn.GroupNorm(1, 8),
        conv_out=nn.Conv2d(8, 4, 3, padding=1),
    )


@model_of("model.transformer.layers.2")
def audio_dit_with_its_conditioner():
    class ContinuousTransformer(Parts):
        def forward(self, x):
            return self.project_out(run(self.layers, self.project_in(x)))

    class DiT(Parts):
        def forward(self, x, t):
            return self.transformer(x + self.to_timestep_embed(t[:, None])[:, None])

    class Generator(Parts):
        def forward(self, x, t):
            return self.model(x, t)

    dit = DiT(
        to_timestep_embed=time_mlp(),
        to_cond_embed=nn.Linear(D, D),
        transformer=ContinuousTransformer(project_in=nn.Linear(D, D), project_out=nn.Linear(D, D), layers=blocks(4)),
    )
    return Generator(conditioner=Parts(text_model=Parts(encoder=Parts(layers=blocks(12)))), model=dit)


@model_of("mid_modules.1", (2, 8, 8))
def diffusion_policy_unet():
    class ConditionalUnet1D(Parts):
        def forward(self, x, t):
            skips = []
            for res, res2, down in self.down_modules:
                x = res2(res(x))
                skips.append(x)
                x = down(x)
            x = run(self.mid_modules, x)
            for res, res2, up in self.up_modules:
                x = up(res2(res(torch.cat([x, skips.pop()], 1))))
            return self.final_conv(x)

    L = nn.ModuleList
    return ConditionalUnet1D(
        diffusion_step_encoder=time_mlp(),
        mid_modules=L([Res(16, 16, 1), Res(16, 16, 1)]),
        up_modules=L(
            [
                L([Res(32, 8, 1), Res(8, 8, 1), nn.ConvTranspose1d(8, 8, 4, 2, 1)]),
                L([Res(16, 8, 1), Res(8, 8, 1), nn.Identity()]),
            ]
        ),
        down_modules=L(
            [
                L([Res(8, 8, 1), Res(8, 8, 1), nn.Conv1d(8, 8, 3, 2, 1)]),
                L([Res(8, 16, 1), Res(16, 16, 1), nn.Identity()]),
            ]
        ),
        final_conv=nn.Conv1d(8, 8, 1),
    )


def torch_layers(decoder, n):
    kind, stack = (
        (nn.TransformerDecoderLayer, nn.TransformerDecoder)
        if decoder
        else (nn.TransformerEncoderLayer, nn.TransformerEncoder)
    )
    options = {} if decoder else {"enable_nested_tensor": False}
    return stack(kind(D, 2, 16, batch_first=True, dropout=0.0), n, **options)


@model_of("decoder.layers.2", sure="medium")
def diffusion_policy_transformer():
    class TransformerForDiffusion(Parts):
        def forward(self, x, t):
            memory = self.encoder(self.cond_obs_emb(t[:, None, None].expand(-1, 3, 1)))
            return self.head(self.ln_f(self.decoder(self.input_emb(x), memory)))

    return TransformerForDiffusion(
        input_emb=nn.Linear(D, D),
        drop=nn.Dropout(0.0),
        cond_obs_emb=nn.Linear(1, D),
        encoder=torch_layers(False, 4),
        decoder=torch_layers(True, 4),
        ln_f=nn.LayerNorm(D),
        head=nn.Linear(D, D),
    )


@model_of("temporal_blocks.1", sure="medium")
def st_dit():
    class STDiT(Parts):
        def forward(self, x, t):
            x = self.x_embedder(x)
            for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
                x = temporal(spatial(x))
            return self.final_layer(x)

    return STDiT(
        x_embedder=nn.Linear(D, D),
        t_embedder=time_mlp(),
        spatial_blocks=blocks(3),
        temporal_blocks=blocks(3),
        final_layer=nn.Linear(D, D),
    )


@model_of("backbone.layers.4")
def hybrid_mamba():
    class Backbone(Parts):
        def forward(self, x):
            return self.norm_f(run(self.layers, x))

    class DiM(Parts):
        def forward(self, x, t):
            return self.head(self.backbone(self.patch_embed(x)))

    layers = nn.ModuleList(Block() if i in (3, 6) else MambaMixer() for i in range(8))
    return DiM(
        patch_embed=nn.Linear(D, D), backbone=Backbone(layers=layers, norm_f=nn.LayerNorm(D)), head=nn.Linear(D, D)
    )


@model_of("stages.1.1", MAPS)
def convnext():
    class ConvNeXtDenoiser(Parts):
        def forward(self, x, t):
            x = self.stem(x)
            for stage in self.stages:
                x = stage(x)
            return self.head(x)

    return ConvNeXtDenoiser(
        stem=nn.Conv2d(4, 8, 3, padding=1),
        time=time_mlp(),
        stages=nn.ModuleList(nn.Sequential(Res(8, 8), Res(8, 8)) for _ in range(3)),
        head=nn.Conv2d(8, 4, 1),
    )


class Timeless(nn.Sequential):
    def forward(self, x, t):
        return super().forward(x)


@model_of("3", VECTORS, "medium")
def mlp_as_a_sequential():
    return Timeless(
        nn.Linear(D, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, D)
    )


@model_of("dncnn.7", MAPS, "medium")
def dncnn():
    class DnCNN(Parts):
        def forward(self, x, t):
            return x - self.dncnn(x)

    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return DnCNN(dncnn=nn.Sequential(*layers, nn.Conv2d(8, 4, 3, padding=1)))


@model_of("3")
def transformer_as_a_sequential():
    return Timeless(nn.Linear(D, D), *blocks(4), nn.LayerNorm(D), nn.Linear(D, D))


@model_of("transformer.h.2")
def nano_gpt():
    class GPT(Parts):
        def forward(self, x, t):
            return self.lm_head(self.transformer.ln_f(run(self.transformer.h, self.transformer.drop(x))))

    return GPT(
        transformer=nn.ModuleDict(
            {
                "wte": nn.Embedding(5000, D),
                "wpe": nn.Embedding(64, D),
                "drop": nn.Dropout(0.0),
                "h": blocks(4),
                "ln_f": nn.LayerNorm(D),
            }
        ),
        lm_head=nn.Linear(D, D),
    )


@model_of("model.layers.3")
def llama_with_a_vision_tower():
    class Llama(Parts):
        def forward(self, x):
            return self.norm(run(self.layers, x))

    class ForDiffusion(Parts):
        def forward(self, x, t):
            return self.out(self.model(self.vae2llm(x) + self.time_embedder(t[:, None])[:, None]))

    return ForDiffusion(
        vision_tower=Parts(encoder=Parts(layers=blocks(3))),
        model=Llama(embed_tokens=nn.Embedding(100, D), layers=blocks(6), norm=nn.LayerNorm(D)),
        vae2llm=nn.Linear(D, D),
        time_embedder=time_mlp(),
        out=nn.Linear(D, D),
    )


class DoubleConv(nn.Sequential):
    def __init__(self, i, o):
        super().__init__(
            nn.Conv2d(i, o, 3, padding=1),
            nn.BatchNorm2d(o),
            nn.ReLU(),
            nn.Conv2d(o, o, 3, padding=1),
            nn.BatchNorm2d(o),
            nn.ReLU(),
        )


class PoolConv(nn.Sequential):
    def __init__(self, i, o):
        super().__init__(nn.MaxPool2d(2), DoubleConv(i, o))


class UpConv(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.up, self.conv = nn.Upsample(scale_factor=2), DoubleConv(i, o)

    def forward(self, x, skip):
        return self.conv(torch.cat([self.up(x), skip], 1))


@model_of("down2", MAPS)
def tutorial_unet():
    class UNet(Parts):
        def forward(self, x, t):
            a = self.inc(x)
            b = self.down1(a)
            return self.outc(self.up2(self.up1(self.down2(b), b), a))

    return UNet(
        inc=DoubleConv(4, 8),
        down1=PoolConv(8, 16),
        down2=PoolConv(16, 16),
        up1=UpConv(32, 8),
        up2=UpConv(16, 8),
        outc=nn.Conv2d(8, 4, 1),
    )


@model_of("bot3", MAPS)
def tutorial_unet_with_bots():
    class UNet(Parts):
        def forward(self, x, t):
            a = self.inc(x)
            b = self.sa1(self.down1(a))
            c = self.sa2(self.down2(b))
            c = self.bot3(self.bot2(self.bot1(c)))
            return self.outc(self.sa4(self.up2(self.sa3(self.up1(c, b)), a)))

    return UNet(
        inc=DoubleConv(4, 8),
        down1=PoolConv(8, 16),
        sa1=AttnBlock(16),
        down2=PoolConv(16, 16),
        sa2=AttnBlock(16),
        bot1=DoubleConv(16, 32),
        bot2=DoubleConv(32, 32),
        bot3=DoubleConv(32, 16),
        up1=UpConv(32, 8),
        sa3=AttnBlock(8),
        up2=UpConv(16, 8),
        sa4=AttnBlock(8),
        outc=nn.Conv2d(8, 4, 1),
    )


@model_of("fc3", VECTORS, "medium")
def mlp_of_numbered_layers():
    class Net(Parts):
        def forward(self, x, t):
            for layer in (self.fc1, self.fc2, self.fc3, self.fc4):
                x = torch.tanh(layer(x))
            return self.fc5(x)

    return Net(
        fc1=nn.Linear(D, 16), fc2=nn.Linear(16, 16), fc3=nn.Linear(16, 16), fc4=nn.Linear(16, 16), fc5=nn.Linear(16, D)
    )


@model_of("blocks.4", sure="medium")
def mask_dit():
    class MaskDiT(Parts):
        def forward(self, x, t):
            return self.final_layer(run(self.decoder_blocks, self.decoder_layer(run(self.blocks, self.x_embedder(x)))))

    return MaskDiT(
        x_embedder=nn.Linear(D, D),
        blocks=blocks(6),
        decoder_layer=nn.Linear(D, D),
        decoder_blocks=blocks(2),
        final_layer=nn.Linear(D, D),
    )


@model_of("layers.3")
def refined_dit():
    class NextDiT(Parts):
        def forward(self, x, t):
            c = run(self.context_refiner, self.cap_embedder(t[:, None, None].expand(-1, 3, 1)))
            x = run(self.noise_refiner, self.x_embedder(x))
            return self.final_layer(run(self.layers, torch.cat([c, x], 1))[:, 3:])

    return NextDiT(
        x_embedder=nn.Linear(D, D),
        noise_refiner=blocks(2),
        context_refiner=blocks(2),
        t_embedder=time_mlp(),
        cap_embedder=nn.Linear(1, D),
        layers=blocks(6),
        final_layer=nn.Linear(D, D),
    )


@model_of("mlp.blocks.2", VECTORS)
def tabular():
    class Dense(Parts):
        def forward(self, x):
            return torch.relu(self.linear(x))

    class Stack(Parts):
        def forward(self, x):
            return self.head(run(self.blocks, x))

    class MLPDiffusion(Parts):
        def forward(self, x, t):
            return self.mlp(self.proj(x) + self.time_embed(t[:, None]))

    return MLPDiffusion(
        mlp=Stack(
            blocks=nn.ModuleList(Dense(linear=nn.Linear(16, 16), dropout=nn.Dropout(0.0)) for _ in range(4)),
            head=nn.Linear(16, D),
        ),
        proj=nn.Linear(D, 16),
        time_embed=time_mlp(16),
    )


@model_of("residual_layers.3", (2, 1, 16))
def diff_wave():
    class Layer(Parts):
        def forward(self, x, c):
            a, b = self.output_projection(
                torch.tanh(self.dilated_conv(x) + self.diffusion_projection(c)[..., None])
            ).chunk(2, 1)
            return x + a, b

    class DiffWave(Parts):
        def forward(self, x, t):
            x, c, total = self.input_projection(x), self.diffusion_embedding(t[:, None]), 0
            for layer in self.residual_layers:
                x, skip = layer(x, c)
                total = total + skip
            return self.output_projection(self.skip_projection(total))

    layers = nn.ModuleList(
        Layer(
            dilated_conv=nn.Conv1d(D, D, 3, padding=1),
            diffusion_projection=nn.Linear(D, D),
            output_projection=nn.Conv1d(D, 2 * D, 1),
        )
        for _ in range(6)
    )
    return DiffWave(
        input_projection=nn.Conv1d(1, D, 1),
        diffusion_embedding=time_mlp(),
        residual_layers=layers,
        skip_projection=nn.Conv1d(D, D, 1),
        output_projection=nn.Conv1d(D, 1, 1),
    )


@model_of("latent", MAPS, "medium")
def restormer():
    class Restormer(Parts):
        def forward(self, x, t):
            a = self.encoder_level1(self.patch_embed(x))
            b = self.encoder_level2(self.down1_2(a))
            z = self.latent(self.down2_3(b))
            b = self.decoder_level2(self.up3_2(z) + b)
            return self.output(self.refinement(self.decoder_level1(self.up2_1(b) + a)))

    def level(n):
        return nn.Sequential(*(Res(8, 8) for _ in range(n)))

    return Restormer(
        patch_embed=nn.Conv2d(4, 8, 3, padding=1),
        encoder_level1=level(2),
        down1_2=Downsample(8),
        encoder_level2=level(2),
        down2_3=Downsample(8),
        latent=level(3),
        up3_2=Upsample(8),
        decoder_level2=level(2),
        up2_1=Upsample(8),
        decoder_level1=level(2),
        refinement=level(2),
        output=nn.Conv2d(8, 4, 1),
    )


@model_of("dynamics.egnn.e_block_2")
def equivariant():
    class EGNN(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.embedding_out = nn.Linear(D, D), nn.Linear(D, D)
            for i in range(4):
                self.add_module(f"e_block_{i}", Block())

        def forward(self, x):
            x = self.embedding(x)
            for i in range(4):
                x = self._modules[f"e_block_{i}"](x)
            return self.embedding_out(x)

    class Dynamics(Parts):
        def forward(self, x, t):
            return self.egnn(x)

    class EnVariationalDiffusion(Parts):
        def forward(self, x, t):
            return self.dynamics(x, t)

    return EnVariationalDiffusion(gamma=time_mlp(), dynamics=Dynamics(egnn=EGNN()))


@model_of("res3.1", MAPS, "medium")
def refine_net():
    class NCSNv2(Parts):
        def forward(self, x, t):
            a = run(self.res1, self.begin_conv(x))
            b = run(self.res2, a)
            c = run(self.res3, b)
            return self.end_conv(self.refine3(self.refine2(self.refine1(c) + b) + a))

    L = nn.ModuleList
    return NCSNv2(
        begin_conv=nn.Conv2d(4, 8, 3, padding=1),
        normalizer=nn.GroupNorm(1, 8),
        end_conv=nn.Conv2d(8, 4, 3, padding=1),
        res1=L([Res(8, 8), Res(8, 8)]),
        res2=L([Res(8, 8), Res(8, 8)]),
        res3=L([Res(8, 8), Res(8, 8)]),
        refine1=Res(8, 8),
        refine2=Res(8, 8),
        refine3=Res(8, 8),
    )


@model_of("net.inner.inner.inner", MAPS, "medium")
def recursive_unet():
    class Skip(nn.Module):
        def __init__(self, inner=None):
            super().__init__()
            self.down, self.inner, self.up = Res(8, 8), inner, Res(8, 8)

        def forward(self, x):
            y = self.down(x)
            return x + self.up(y if self.inner is None else self.inner(y))

    class Net(Parts):
        def forward(self, x, t):
            return self.conv_out(self.net(self.conv_in(x)))

    return Net(conv_in=nn.Conv2d(4, 8, 1), net=Skip(Skip(Skip(Skip()))), conv_out=nn.Conv2d(8, 4, 1))


@model_of("encoder.blocks.2", MAPS)
def encoder_and_decoder_modules():
    class Encoder(Parts):
        def forward(self, x):
            skips = []
            for block in self.blocks:
                x = block(x)
                skips.append(x)
            return x, skips

    class Decoder(Parts):
        def forward(self, x, skips):
            for block in self.blocks:
                x = block(torch.cat([x, skips.pop()], 1))
            return x

    class Net(Parts):
        def forward(self, x, t):
            return self.head(self.decoder(*self.encoder(x)))

    return Net(
        time_embed=time_mlp(),
        encoder=Encoder(blocks=nn.ModuleList([Res(4, 8), Res(8, 16), Res(16, 32)])),
        decoder=Decoder(blocks=nn.ModuleList([Res(64, 16), Res(32, 8), Res(16, 8)])),
        head=nn.Conv2d(8, 4, 1),
    )
