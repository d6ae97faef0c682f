"""The general rule: the middle of models that nobody registered, from their module tree alone."""

from itertools import pairwise

import pytest
import torch
from models import STREAMS
from research_models import (
    MODELS,
    Attention,
    AttnBlock,
    Block,
    D,
    Downsample,
    Joint,
    Mlp,
    Parts,
    Precond,
    Res,
    Upsample,
    blocks,
    flux_like,
    latent_diffusion,
    lucid,
    nano_dit,
    time_mlp,
    torch_layers,
    tutorial_unet_with_bots,
)  # fmt: skip
from timm_models import Block as TimmBlock
from timm_models import dit, sit
from torch import nn

from perceptual_diffusion import copies, taps
from perceptual_diffusion.adapters.general import middle

# --- trees without a forward pass of their own ------------------------------------------------------------------------

TREES = {}


def tree_of(layer, sure="high"):
    """Keep what builds a tree, with the layer a person who read its forward pass would call the middle."""

    def keep(build):
        TREES[build.__name__] = (build, layer, sure)
        return build

    return keep


class Part(Parts):
    """Is called; what it would do does not matter here."""

    def forward(self, x):
        return x


def maps(*widths):
    return nn.ModuleList(Res(i, o) for i, o in pairwise(widths))


def stages(**others):
    """A stage that is no module with a forward pass, as the encoders of some autoencoders have it."""
    return Parts(block=maps(8, 8), attn=nn.ModuleList(), **others)


def autoencoder():
    inside = {"mid": Parts(block_1=Res(8, 8), attn_1=AttnBlock(8), block_2=Res(8, 8))}
    encoder = Part(down=nn.ModuleList(stages(downsample=Downsample(8)) for _ in range(2)), **inside)
    return Part(
        encoder=encoder, decoder=Part(**inside, up=nn.ModuleList(stages(upsample=Upsample(8)) for _ in range(2)))
    )


def text_encoder():
    return Part(transformer=Part(text_model=Part(encoder=Part(layers=blocks(12)))))


@tree_of("model.diffusion_model.middle_block")
def unet_with_its_autoencoder_and_text_encoder():
    unet = latent_diffusion().diffusion_model
    return Part(model=Part(diffusion_model=unet), first_stage_model=autoencoder(), cond_stage_model=text_encoder())


@tree_of("decoder.estimator.mid_blocks.1.1.0", "medium")
def speech_from_a_text_encoder_and_a_flow_called_decoder():
    def stage(*last):
        return nn.ModuleList([Res(8, 8), nn.ModuleList([Block()]), *last])

    sides = {name: nn.ModuleList([stage(Downsample(8)), stage(Downsample(8))]) for name in ("down_blocks", "up_blocks")}
    estimator = Part(time_mlp=time_mlp(), **sides, mid_blocks=nn.ModuleList([stage(), stage()]))
    return Part(encoder=Part(prenet=Mlp(), attn_layers=blocks(6, Attention)), decoder=Part(estimator=estimator))


@tree_of("denoiser.blocks.2", "medium")
def policy_whose_observation_encoder_is_larger():
    encoder = Part(visual=Part(blocks=nn.Sequential(*blocks(12))), language=text_encoder())
    return Part(encoder=encoder, normalizer=Part(), denoiser=Part(action_in=nn.Linear(D, D), blocks=blocks(4)))


@tree_of("seqTransEncoder.layers.4")
def motion_model_that_holds_a_clip():
    clip = Part(
        visual=Part(resblocks=nn.Sequential(*blocks(12))), transformer=Part(resblocks=nn.Sequential(*blocks(12)))
    )
    return Part(
        input_process=Part(poseEmbedding=nn.Linear(D, D)), seqTransEncoder=torch_layers(False, 8), clip_model=clip
    )


@tree_of("en_outblocks.1", "medium")
def three_lists_in_a_row():
    return Part(en_inblocks=blocks(5), en_outblocks=blocks(5), de_blocks=blocks(2), sideblocks=blocks(1))


@tree_of("bridges.2")
def bridges_at_every_resolution():
    return Part(
        encoders=maps(4, 8, 16, 32),
        bridges=nn.ModuleList(map(Res, (8, 16, 32), (8, 16, 32))),
        decoders=maps(32, 16, 8, 4),
    )


@tree_of("nets.velocity.blocks.2")
def dict_of_networks():
    return Part(nets=nn.ModuleDict({"velocity": Part(blocks=blocks(4)), "text_encoder": Part(blocks=blocks(8))}))


@tree_of("net.1.blocks.2")
def sequential_of_unlike_parts():
    return Part(net=nn.Sequential(nn.Linear(D, D), Part(blocks=blocks(4)), Mlp()))


@tree_of("mode_blocks.image.1")
def dict_of_lists():
    lists = {"image": blocks(3, Joint), "image_cond": blocks(3, Joint)}
    return Part(img_in=nn.Linear(D, D), mode_blocks=nn.ModuleDict(lists))


@tree_of("layers.1")
def shorter_than_what_it_reads():
    return Part(text_blocks=blocks(9), layers=nn.ModuleList(Part(blocks=blocks(2)) for _ in range(2)))


@tree_of("text_blocks.2")
def all_is_called_after_the_text_that_it_denoises():
    return Part(text_embed=nn.Embedding(9, D), text_blocks=blocks(4))


@tree_of("block2")
def two_numbered_blocks():
    return Part(conv_in=nn.Conv2d(4, 8, 3), block1=Res(8, 8), block2=Res(8, 8), conv_out=nn.Conv2d(8, 4, 3))


@tree_of("dec.block3_in0")
def autoencoder_blocks_in_dicts():
    enc = {f"block{level}_layer{i}": Res(8, 8) for level in range(4) for i in range(2)}
    dec = {"block3_in0": Res(8, 8)} | {f"block{level}_layer{i}": Res(16, 8) for level in (3, 2, 1, 0) for i in range(3)}
    return Part(enc=nn.ModuleDict(enc), dec=nn.ModuleDict(dec), conv_out=nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize("name", MODELS)
def test_the_middle_is_the_one_a_person_would_name_and_it_sees_the_sample(name):
    build, layer, shape, sure = MODELS[name]
    model = build()
    found = middle(model)
    assert found.layers == (layer,), found
    assert found.confidence == sure, found
    x = torch.randn(shape, requires_grad=True)
    (feature,) = taps.run(model, [layer], lambda: model(x, torch.rand(2)), select=first)
    (gradient,) = torch.autograd.grad(feature.square().sum(), x)
    assert all(sample.any() for sample in gradient)


def first(output, args, kwargs):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", TREES)
def test_what_stands_beside_the_denoiser_is_not_taken_for_it(name):
    build, layer, sure = TREES[name]
    found = middle(build())
    assert found.layers == (layer,), found
    assert found.confidence == sure, found


@pytest.mark.parametrize("mid", [None, nn.ModuleList(), nn.Sequential(), nn.Module(), nn.Identity()])
def test_an_empty_middle_is_none(mid):
    model = Part(down_blocks=maps(4, 8, 16), mid_block=mid, up_blocks=maps(32, 8, 4))
    assert middle(model).layers == ("down_blocks.1",)


def test_the_middle_says_how_it_was_found_and_among_what():
    found = middle(nano_dit())
    assert found.why == "block 2 of 5 in `blocks`"
    assert found.candidates == tuple(f"blocks.{i}" for i in range(5))
    assert middle(flux_like()).why == "block 3 of 6 in `double_blocks` and `single_blocks`"
    assert middle(tutorial_unet_with_bots()).candidates == ("bot1", "bot2", "bot3")


def test_a_model_without_weights_in_memory_is_read_as_well():
    with torch.device("meta"):
        assert middle(nano_dit()).layers == ("blocks.2",)


# --- refusals ---------------------------------------------------------------------------------------------------------


def two_unets():
    return Part(unets=nn.ModuleList([lucid(mid_block=Res(16, 16)), Part(mid_block=Res(16, 16))]))


def two_towers():
    return Part(left=Part(layers=blocks(4)), right=Part(layers=blocks(4)), head=nn.Linear(D, D))


def two_unnamed_lists():
    return Part(left=blocks(4), right=blocks(4), head=nn.Linear(D, D))


def two_denoisers():
    return Part(velocity=Part(layers=blocks(4)), score=Part(layers=blocks(4)), embed=nn.Linear(D, D), rest=Mlp())


def experts():
    return Part(experts=nn.ModuleList([Part(blocks=blocks(3)), Part(blocks=blocks(3))]))


def stem_body_head():
    return Part(stem=nn.Conv2d(4, 8, 3), body=nn.Conv2d(8, 8, 3), head=nn.Conv2d(8, 4, 3))


def recurrent():
    return Part(rnn=nn.GRU(4, 8, 2), out=nn.Linear(8, 4))


def dense_between_convolutions():
    pairs = [(f"conv{i}", nn.Conv2d(8, 8, 3)) for i in range(4)] + [(f"dense{i}", nn.Linear(8, 8)) for i in range(4)]
    return Part(**dict(pairs))


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (two_unets, "candidates: unets.0, unets.1"),
        (two_towers, "candidates: left, right"),
        (two_unnamed_lists, "candidates: left.2, right.2"),
        (two_denoisers, "candidates: velocity, score"),
        (experts, "candidates: experts.0, experts.1"),
        (autoencoder, "candidates: encoder, decoder"),
        (stem_body_head, "candidates: stem, body, head"),
        (recurrent, "candidates: rnn"),
        (dense_between_convolutions, "candidates: conv0, conv1, conv2, conv3, dense0, dense1, dense2, dense3"),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), "candidates: 0, 1, 2"),
        (lambda: nn.Conv2d(4, 4, 3), "it has no submodule"),
        (nn.Module, "it has no submodule"),
    ],
)
def test_an_unclear_middle_is_refused_with_the_candidates(build, names):
    model = build()
    with pytest.raises(ValueError, match=f"the middle of {type(model).__name__} cannot be told") as refusal:
        middle(model)
    assert f"; {names}" in str(refusal.value)
    assert "Pass `layers=[...]`" in str(refusal.value)
    assert "`adapters.register`" in str(refusal.value)


def test_a_refusal_names_eight_candidates_at_most():
    with pytest.raises(ValueError, match=r"candidates: models\.0, .*models\.7\. Pass"):
        middle(Part(models=nn.ModuleList([Part(blocks=blocks(2)) for _ in range(12)])))


# --- wrappers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def fsdp(each=False, **options):
    def wrap(model):
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        policy = ModuleWrapPolicy({TimmBlock}) if each else None
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)

    return wrap


def fsdp2(model):
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def lora(**options):
    def wrap(model):
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"]), **options)

    return wrap


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for i in (1, 3):
        model.blocks[i] = checkpoint_wrapper(model.blocks[i])
    return model


WRAPPERS = {
    "plain": lambda model: model,
    "DDP": nn.parallel.DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compile in DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
    "FSDP": fsdp(),
    "FSDP of each block": fsdp(each=True),
    "FSDP of each block, parameters kept": fsdp(each=True, use_orig_params=True),
    "FSDP2": fsdp2,
    "LoRA": lora(),
    "LoRA, mixed": lora(mixed=True),
    "LoRA in DDP": lambda model: nn.parallel.DistributedDataParallel(lora()(model)),
    "every second block checkpointed": checkpointed,
}


@pytest.mark.filterwarnings("ignore")  # of the wrappers
@pytest.mark.parametrize("build", [dit, sit])
@pytest.mark.parametrize("wrapper", [pytest.param(w, marks=STREAMS if w == "FSDP2" else ()) for w in WRAPPERS])
def test_a_transformer_of_timm_has_its_middle_in_every_wrapper(group, wrapper, build):
    plain, x, y = build(depth=5), torch.randn(2, 4, 8, 8), torch.tensor([3, 10])
    t = torch.tensor([100, 900]) if build is dit else torch.tensor([0.1, 0.9])
    (expected,) = taps.run(plain, ["blocks.2"], lambda: plain(x, t, y))
    wrapped = WRAPPERS[wrapper](plain)
    found = middle(wrapped)
    assert found.layers == ("blocks.2",)
    assert found.confidence == "high"
    (feature,) = taps.run(taps.unwrap(wrapped), found.layers, lambda: wrapped(x, t, y), stop=False)
    torch.testing.assert_close(feature, expected)


def test_inside_a_wrapped_child_the_name_is_that_of_a_teachers_copy():
    outer = Precond("model", dit())
    outer.model = torch.compile(outer.model, backend="eager")
    (name,) = middle(outer).layers
    assert name == "model.blocks.2"
    copied = copies.frozen_copy(outer)
    assert taps.layer(copied, name) is copied.model.blocks[2]


def test_the_variance_and_the_velocity_have_their_shapes():
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 10])
    assert dit()(x, torch.tensor([0, 999]), y).shape == (2, 8, 8, 8)
    assert sit()(x, torch.tensor([0.0, 1.0]), y).shape == (2, 4, 8, 8)
