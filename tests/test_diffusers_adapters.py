"""What the families of diffusers say beyond the zoo: joined conditions, second times, outputs, pipelines, predictions, units.

Each is compared with the same model called by hand: its arguments are seen by a hook, its output is cut here.
"""

import diffusers
import pytest
import torch
from algorithm1 import freeze
from diffusers.models.attention_dispatch import attention_backend
from models import conditional_unet, dit, unet
from paper import PaperObjective
from torch import nn
from zoo import B, build, normal

from perceptual_diffusion import adapters, schedules
from perceptual_diffusion.adapters import Concat
from perceptual_diffusion.parameterizations import edm

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

T = torch.tensor([120.0, 480.0, 870.0])

FAULTS = {
    "Wan, frames in front, counted from behind": "a negative dimension is not taken for that of the frames: they get the time of the noisy ones",
    "LTX, tokens in front, counted from behind": "likewise of tokens",
    "twice as long": "(B, C, L) is taken for tokens (B, N, C): a longer prediction is cut",
    "one channel more": "likewise, and more channels are cut off",
}
"""Known limits: the reason by case."""


def marked(table):
    return [
        pytest.param(
            *(row if isinstance(row, tuple) else (row,)), id=name,
            marks=pytest.mark.xfail(reason=FAULTS[name], strict=True) if name in FAULTS else (),
        )
        for name, row in table.items()
    ]  # fmt: skip


class Called:
    """A model of the zoo, its family, and what the model was last given."""

    def __init__(self, name, **config):
        self.model, self.tiny = build(name)
        if config:
            torch.manual_seed(0)
            self.model = type(self.model)(**{**self.tiny.config, **config}).eval()
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.normal_(0, 0.2)
        self.family = adapters.find(self.model)
        self.cond = {key: value for key, value in self.tiny.cond.items() if key != "concat"}
        self.given, self.raw = {}, None
        self.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model, args, kwargs):
        assert not args
        self.given = kwargs

    def __call__(self, x=None, t=T, **cond):
        x = self.tiny.clean if x is None else x
        self.raw = self.family.call(self.model, x, t, {**self.cond, **cond})
        return self.family.output(self.raw, x)


# --- a clean condition joined to the sample ---------------------------------------------------------------------------

TOKENS, WORDS = normal(B, 16, 4), normal(B, 16, 4, seed=1)
CLIP, FRAMES, PAGES = normal(B, 4, 3, 8, 8), normal(B, 4, 1, 8, 8, seed=1), normal(B, 2, 3, 8, 8, seed=2)
LATENTS, MASKED = normal(B, 4, 8, 8), normal(B, 5, 8, 8, seed=1)
WIDE = {"in_channels": 6, "out_channels": 4}
LTX = "LTXVideoTransformer3DModel"


def held(t, total, clean):
    return torch.cat([torch.zeros(B, clean), t[:, None].expand(B, total - clean)], 1)


# name, config; x; concat; what is given; the time; the prediction out of the whole output
JOINED = {
    "UNet by default": ("UNet2DConditionModel", {"in_channels": 9}, LATENTS, MASKED, torch.cat([LATENTS, MASKED], 1), T, ...),
    "UNet, channels in front": (
        "UNet2DConditionModel", {"in_channels": 9}, LATENTS, Concat(MASKED, first=True), torch.cat([MASKED, LATENTS], 1), T, ...,
    ),
    "LTX by default": (f"{LTX}.i2v", {}, TOKENS, WORDS, torch.cat([WORDS, TOKENS], 1), held(T, 32, 16), (1, 16, 32)),
    "LTX, tokens in front": (
        f"{LTX}.i2v", {}, TOKENS, Concat(WORDS, first=True), torch.cat([WORDS, TOKENS], 1), held(T, 32, 16), (1, 16, 32),
    ),
    "LTX, tokens behind": (f"{LTX}.i2v", {}, TOKENS, Concat(WORDS, first=False), torch.cat([TOKENS, WORDS], 1), T, (1, 0, 16)),
    "LTX by default, channels": (
        LTX, WIDE, normal(B, 32, 4), Concat(normal(B, 32, 2, seed=3), dim=2),
        torch.cat([normal(B, 32, 2, seed=3), normal(B, 32, 4)], 2), T, ...,
    ),
    "LTX, channels behind": (
        LTX, WIDE, normal(B, 32, 4), Concat(normal(B, 32, 2, seed=3), dim=2, first=False),
        torch.cat([normal(B, 32, 4), normal(B, 32, 2, seed=3)], 2), T, ...,
    ),
    "Wan by default": ("WanTransformer3DModel", WIDE, CLIP, PAGES, torch.cat([CLIP, PAGES], 1), T, ...),
    "Wan, channels in front": (
        "WanTransformer3DModel", WIDE, CLIP, Concat(PAGES, first=True), torch.cat([PAGES, CLIP], 1), T, ...,
    ),
    "Wan, frames in front": (
        "WanTransformer3DModel", {}, CLIP, Concat(FRAMES, dim=2, first=True), torch.cat([FRAMES, CLIP], 2),
        held(T, 4, 1).repeat_interleave(16, 1), (2, 1, 4),
    ),
    "Wan, frames in front, counted from behind": (
        "WanTransformer3DModel", {}, CLIP, Concat(FRAMES, dim=-3, first=True), torch.cat([FRAMES, CLIP], 2),
        held(T, 4, 1).repeat_interleave(16, 1), (2, 1, 4),
    ),
    "LTX, tokens in front, counted from behind": (
        f"{LTX}.i2v", {}, TOKENS, Concat(WORDS, dim=-2), torch.cat([WORDS, TOKENS], 1), held(T, 32, 16), (1, 16, 32),
    ),
    "Wan, frames behind": (
        "WanTransformer3DModel", {}, CLIP, Concat(FRAMES, dim=2), torch.cat([CLIP, FRAMES], 2), T, (2, 0, 3)
    ),
    "SanaVideo by default": (
        "SanaVideoTransformer3DModel", {}, normal(B, 4, 2, 8, 8), FRAMES, torch.cat([FRAMES, normal(B, 4, 2, 8, 8)], 2),
        held(T, 3, 1)[:, None, :, None, None].expand(B, 1, 3, 4, 4), (2, 1, 3),
    ),
    "Flux by default": (
        "FluxTransformer2DModel.kontext", {}, normal(B, 16, 4), normal(B, 4, 4, seed=4),
        torch.cat([normal(B, 16, 4), normal(B, 4, 4, seed=4)], 1), T, (1, 0, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "config", "x", "clean", "given", "time", "part"), marked(JOINED))
def test_a_clean_condition_is_joined_timed_and_cut_off_again(name, config, x, clean, given, time, part):
    case = Called(name, **config)
    if name.endswith("kontext"):
        case.cond["img_ids"] = case.cond["img_ids"][:20]
    found = case(x, concat=clean)
    (noisy,) = {"sample", "hidden_states"} & case.given.keys()
    assert torch.equal(case.given[noisy], given)
    torch.testing.assert_close(case.given["timestep"].float(), time, rtol=0, atol=0)
    whole = getattr(case.raw, "sample", case.raw)
    assert found.shape == x.shape
    if part is ...:
        assert torch.equal(found, whole)
    else:
        dim, start, stop = part
        by_hand = case.model(**case.given).sample
        assert torch.equal(found, by_hand.narrow(dim, start, stop - start))


def test_a_clean_condition_takes_the_dtype_of_the_sample():
    case = Called("UNet2DConditionModel", in_channels=9)
    case(LATENTS, concat=MASKED.double())
    assert case.given["sample"].dtype == torch.float32


K6 = "Kandinsky6Transformer3DModel"


@pytest.mark.parametrize(
    "before", marked({"Kandinsky6, channels behind, a dict": False, "Kandinsky6, channels in front, a dict": True})
)
def test_of_several_noisy_arguments_those_named_are_joined(before):
    case = Called(K6)
    x, clean = case.tiny.clean, case.tiny.cond["concat"]["hidden_states"]
    found = case(x, concat=Concat({"hidden_states": clean}, first=before))
    wanted = [clean, x["hidden_states"]] if before else [x["hidden_states"], clean]
    assert torch.equal(case.given["hidden_states"], torch.cat(wanted, -1))
    assert torch.equal(case.given["audio_hidden_states"], x["audio_hidden_states"])
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in x.items()}


@pytest.mark.parametrize(
    "before", marked({"Z-Image, channels behind, a list": False, "Z-Image, channels in front, a list": True})
)
def test_of_a_list_each_sample_is_joined_along_its_own_dimension(before):
    case = Called("ZImageTransformer2DModel")
    x = case.tiny.clean
    clean = [normal(4, 1, 16, 16, seed=10 + i) for i in range(B)]
    found = case(x, concat=Concat(clean, dim=-2, first=before))
    pairs = [(c, v) if before else (v, c) for c, v in zip(clean, x, strict=True)]
    assert all(torch.equal(a, torch.cat(pair, -2)) for a, pair in zip(case.given["x"], pairs, strict=True))
    assert [f.shape for f in found] == [v.shape for v in x]


BAD_CONCAT = {
    "fewer dimensions": ("UNet2DConditionModel", LATENTS[0], ValueError, r"`cond\['concat'\]` is \(4, 8, 8\), expected a tensor that is joined to the sample \(3, 4, 8, 8\) along dimension 1"),
    "no tensor": ("UNet2DConditionModel", "mask", ValueError, r"`cond\['concat'\]` is str, expected a tensor"),
    "a dict for one noisy argument": ("UNet2DConditionModel", {"sample": LATENTS}, ValueError, r"`cond\['concat'\]` is \{'sample'.*expected a tensor"),
    "a name that the sample does not have": (K6, {"hidden_state": normal(B, 2, 4, 4, 5)}, ValueError, "hidden_state"),
    "a tensor for several noisy arguments": (K6, normal(B, 2, 4, 4, 5), (TypeError, ValueError), r"`cond\['concat'\]`"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "clean", "error", "message"), marked(BAD_CONCAT))
def test_a_clean_condition_that_cannot_be_joined_is_refused(name, clean, error, message):
    case = Called(name)
    with pytest.raises(error, match=message):
        case(concat=clean)


def test_the_loss_with_a_joined_condition_is_that_of_the_model_called_by_hand():
    case = Called("UNet2DConditionModel", in_channels=9)
    scheduler = diffusers.DDPMScheduler()
    hand = PaperObjective.wrap(
        case.model, scheduler, layers="mid_block",
        call=lambda m, x, t, cond: m(sample=torch.cat([x, MASKED], 1), timestep=t.float(), **cond),
    )  # fmt: skip
    ours = PaperObjective.wrap(case.model, scheduler)
    given = {
        "noise": normal(B, 4, 8, 8, seed=7),
        "t": torch.tensor([120, 480, 870]),
        "t_prime": torch.tensor([500, 20, 900]),
    }
    losses = [
        objective(case.model, LATENTS, cond=cond, reduction="none", **given)
        for objective, cond in ((hand, case.cond), (ours, {**case.cond, "concat": MASKED}))
    ]
    assert torch.equal(*losses)


# --- the second time of a flow map ------------------------------------------------------------------------------------

MAPS = {
    "AnyFlowTransformer3DModel": ("r_timestep", "AnyFlowTransformer3DModel"),
    "Flux3Transformer2DModel.flow_map": ("target_timestep", "Flux3Transformer2DModel"),
    "HunyuanImageTransformer2DModel.meanflow": ("timestep_r", "HunyuanImageTransformer2DModel"),
    "HunyuanVideo15Transformer3DModel.meanflow": ("timestep_r", "HunyuanVideo15Transformer3DModel"),
}


@pytest.mark.parametrize("missing", [{}, {"given as": None}], ids=["missing", "none"])
@pytest.mark.parametrize("name", MAPS)
def test_a_flow_map_without_its_second_time_is_refused_by_name(name, missing):
    argument, cls = MAPS[name]
    case = Called(name)
    case.cond.pop(argument)
    message = f"`cond` lacks '{argument}': {cls} is a flow map from one time to a second. Pass 0 there.*`lambda t: t`"
    with pytest.raises(ValueError, match=message):
        case(**(dict.fromkeys([argument], None) if missing else {}))


@pytest.mark.parametrize("name", MAPS)
def test_the_loss_of_a_flow_map_without_its_second_time_is_refused_by_name(name):
    argument, cls = MAPS[name]
    case = Called(name)
    case.cond.pop(argument)
    objective = PaperObjective.wrap(case.model, case.tiny.scheduler())
    with pytest.raises(ValueError, match=f"`cond` lacks '{argument}': {cls} is a flow map"):
        objective(case.model, case.tiny.clean, cond=case.cond)


@pytest.mark.parametrize("name", MAPS)
def test_a_second_time_is_given_as_it_is_or_made_of_the_models_time(name):
    argument, _ = MAPS[name]
    case = Called(name)
    case.cond = case.tiny.cond
    time = T / 1000 if name.startswith("Flux3") else T
    case(t=time)
    usual = case.given["timestep"]
    second = torch.full_like(usual, 0.25)
    case(t=time, **{argument: second})
    assert case.given[argument] is second
    asked = []
    case(t=time, **{argument: lambda t: asked.append(t) or t / 2})
    assert torch.equal(asked[0], usual)
    assert torch.equal(case.given[argument], usual / 2)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("Flux3Transformer2DModel", "target_timestep"),
        ("HunyuanImageTransformer2DModel", "timestep_r"),
        ("HunyuanVideo15Transformer3DModel", "timestep_r"),
    ],
)
def test_a_model_that_is_no_flow_map_needs_no_second_time(name, argument):
    case = Called(name)
    case.cond = case.tiny.cond
    case()
    assert argument not in case.given


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["an object", "a tuple", "a tensor", "cut already"])
def test_a_learned_variance_is_cut_off_in_every_form_of_the_output(form):
    model = dit().eval()
    objective = PaperObjective.wrap(model, diffusers.DDPMScheduler())
    clean, noise, cond = normal(B, 4, 8, 8), normal(B, 4, 8, 8, seed=1), {"class_labels": torch.tensor([1, 2, 3])}
    t, t_prime = torch.tensor([120, 480, 870]), torch.tensor([500, 20, 900])
    output = model(objective.add_noise(clean, noise, t), timestep=t, **cond, return_dict=form == "an object")
    mean, variance = (output.sample if form == "an object" else output[0]).chunk(2, 1)
    assert variance.any()
    given = {
        "an object": output, "a tuple": output, "a tensor": torch.cat([mean, variance], 1), "cut already": mean,
    }[form]  # fmt: skip
    rest = {"clean": clean, "noise": noise, "t": t, "t_prime": t_prime, "cond": cond, "reduction": "none"}
    told = PaperObjective.wrap(
        model, diffusers.DDPMScheduler(), output=lambda output, x_t: output, teacher=objective.teacher
    ).loss(mean, **rest)
    assert torch.equal(objective.loss(given, **rest), told)


OTHER_SIZES = {
    "twice the batch": normal(2 * B, 3, 8, 8),
    "half of the batch": normal(B - 1, 3, 8, 8),
    "twice the height": normal(B, 3, 16, 8),
    "twice the width": normal(B, 3, 8, 16),
    "more channels": normal(B, 5, 8, 8),
    "fewer channels": normal(B, 2, 8, 8),
    "another rank": normal(B, 3, 64),
}


@pytest.mark.parametrize("output", marked(OTHER_SIZES))
def test_a_prediction_of_another_size_is_refused(output):
    objective = PaperObjective.wrap(unet().eval(), diffusers.DDPMScheduler())
    clean, cond = normal(B, 3, 8, 8), {"class_labels": torch.tensor([1, 2, 3])}
    with pytest.raises(ValueError, match=r"`model_pred` has shape .*, expected \(3, 3, 8, 8\), that of `clean`"):
        objective.loss(output, clean=clean, noise=clean, t=torch.tensor([1, 2, 3]), cond=cond)


SOUNDS = {
    "twice as long": lambda b, c, n: normal(b, c, 2 * n),
    "half as long": lambda b, c, n: normal(b, c, n // 2),
    "one channel more": lambda b, c, n: normal(b, c + 1, n),
    "channels in the last dimension": lambda b, c, n: normal(b, n, c),
}


@pytest.mark.parametrize("output", marked(SOUNDS))
def test_a_prediction_of_sound_of_another_size_is_refused(output):
    model, tiny = build("UNet1DModel")
    objective = PaperObjective.wrap(model, tiny.scheduler())
    given = {"clean": tiny.clean, "noise": tiny.clean, "t": torch.tensor([0.1, 0.5, 0.9]), "cond": tiny.cond}
    assert objective.loss(tiny.clean, **given).isfinite()
    with pytest.raises(ValueError, match=r"`model_pred` has shape .*, expected .*, that of `clean`"):
        objective.loss(output(*tiny.clean.shape), **given)


def test_a_part_that_the_model_needs_is_named_and_may_be_clean():
    case = Called("LTX2VideoTransformer3DModel")
    x = case.tiny.clean
    message = "the sample lacks the part 'audio_hidden_states', expected 'hidden_states' and 'audio_hidden_states'"
    with pytest.raises(ValueError, match=message):
        case(x["hidden_states"])
    found = case(x["hidden_states"], audio_hidden_states=x["audio_hidden_states"])
    assert torch.equal(found, case.raw.sample)


@pytest.mark.parametrize("parts", [{"audio": 9}, {"hidden_states": 32, "audio": 9}])
def test_a_part_that_the_model_does_not_denoise_is_named(parts):
    case = Called("LTX2VideoTransformer3DModel")
    x = {name: normal(B, n, 4) for name, n in parts.items()}
    message = "the sample has the part 'audio', expected 'hidden_states' and 'audio_hidden_states', .* of LTX2VideoTransformer3DModel"
    with pytest.raises(ValueError, match=message):
        case(x)


@pytest.mark.parametrize("form", ["an object", "a tuple", "a dict"])
def test_the_predictions_of_several_arguments_are_found_in_every_form_of_the_output(form):
    case = Called("LTX2VideoTransformer3DModel")
    x = case.tiny.clean
    case(t=T)
    found = case.raw
    given = {
        "an object": found, "a tuple": (found.sample, found.audio_sample),
        "a dict": {"hidden_states": found.sample, "audio_hidden_states": found.audio_sample},
    }[form]  # fmt: skip
    taken = case.family.output(given, x)
    assert list(taken) == list(x)
    assert torch.equal(taken["hidden_states"], found.sample)
    assert torch.equal(taken["audio_hidden_states"], found.audio_sample)


def test_a_dict_of_one_noisy_argument_is_as_good_as_the_tensor():
    case = Called("SD3Transformer2DModel")
    plain = case()
    (named,) = case({"hidden_states": case.tiny.clean}).values()
    assert torch.equal(plain, named)


# --- pipelines --------------------------------------------------------------------------------------------------------


def vae(channels=4):
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=channels)


def no_text(*numbers):
    return {f"{part}{n}": None for n in numbers for part in ("text_encoder", "tokenizer")}


class Bare(diffusers.DiffusionPipeline):
    """Holds what it is given."""

    def __init__(self, **parts):
        super().__init__()
        self.register_modules(**parts)

    @property
    def components(self):
        return {name: getattr(self, name) for name in self.config if not name.startswith("_")}


def stable_diffusion():
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", steps_offset=1, clip_sample=False, prediction_type="v_prediction"
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae(), unet=conditional_unet(sample_size=64), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **no_text(""),
    )  # fmt: skip
    return pipeline, pipeline.unet, normal(B, 4, 8, 8), {"encoder_hidden_states": normal(B, 5, 8)}


def ddpm():
    pipeline = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())
    return pipeline, pipeline.unet, normal(B, 3, 8, 8), {"class_labels": torch.tensor([1, 2, 3])}


def of_the_zoo(cls, name, numbers, channels=4, **more):
    model, tiny = build(name)
    more = {key: value() for key, value in more.items()}
    pipeline = cls(
        transformer=model, scheduler=tiny.scheduler(), **no_text(*numbers), **({"vae": vae(channels)} | more)
    )
    return pipeline, pipeline.transformer, tiny.clean, tiny.cond


def wan_vae():
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
    )


PIPELINES = {
    "DDPM": ddpm,
    "StableDiffusion": stable_diffusion,
    "StableDiffusion3": lambda: of_the_zoo(
        diffusers.StableDiffusion3Pipeline, "SD3Transformer2DModel", ("", "_2", "_3")
    ),
    "Flux": lambda: of_the_zoo(diffusers.FluxPipeline, "FluxTransformer2DModel", ("", "_2")),
    "Lumina2": lambda: of_the_zoo(diffusers.Lumina2Pipeline, "Lumina2Transformer2DModel", ("",)),
    "Wan": lambda: of_the_zoo(diffusers.WanPipeline, "WanTransformer3DModel", ("",), vae=wan_vae),
    "ControlNet beside": lambda: control(),
}


def control():
    model = conditional_unet()
    pipeline = Bare(
        unet=model,
        controlnet=diffusers.ControlNetModel.from_unet(model),
        vae=vae(),
        scheduler=diffusers.DDPMScheduler(),
    )
    return pipeline, model, normal(B, 4, 8, 8), {"encoder_hidden_states": normal(B, 5, 8)}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_its_denoiser_and_its_scheduler(name):
    pipeline, model, clean, cond = PIPELINES[name]()
    model.eval()
    pair = [
        PaperObjective.wrap(pipeline, seed=3),
        PaperObjective.wrap(model, pipeline.scheduler, seed=3),
    ]
    assert pair[0].teacher.layers == pair[1].teacher.layers
    assert pair[0].prediction == pair[1].prediction
    assert repr(pair[0].schedule) == repr(pair[1].schedule)
    frozen = freeze(model).state_dict()
    assert all(torch.equal(value, frozen[key]) for key, value in pair[0].teacher.module.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    found = []
    for objective in pair:
        model.zero_grad()
        loss = objective(model, clean, cond=cond)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 5
    assert all(map(torch.equal, *found))
    assert any(gradient.any() for gradient in found[0][1:])


def test_a_pipeline_may_have_another_schedule():
    pipeline, *_ = ddpm()
    own = schedules.Discrete.scaled_linear()
    objective = PaperObjective.wrap(pipeline, own, prediction="v_prediction")
    assert objective.schedule is own
    assert objective.prediction.name == "v_prediction"
    assert PaperObjective.wrap(pipeline, diffusers.DDIMScheduler(prediction_type="sample")).prediction.name == "sample"


def test_a_compiled_denoiser_in_a_pipeline_is_found():
    pipeline, *_ = ddpm()
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    assert PaperObjective.wrap(pipeline).teacher.layers == ("mid_block",)


def test_a_pipeline_of_two_denoisers_names_both():
    expert = build("WanTransformer3DModel")
    other = build("WanTransformer3DModel")[0]
    pipeline = diffusers.WanPipeline(
        transformer=expert[0], transformer_2=other, vae=wan_vae(), scheduler=expert[1].scheduler(), boundary_ratio=0.9,
        **no_text(""),
    )  # fmt: skip
    message = "WanPipeline has 2 denoisers.* Pass one of `pipeline.transformer`, `pipeline.transformer_2`,? and `pipeline.scheduler`"
    with pytest.raises(ValueError, match=message):
        PaperObjective.wrap(pipeline)
    assert PaperObjective.wrap(pipeline.transformer_2, pipeline.scheduler).prediction.name == "flow_prediction"


@pytest.mark.parametrize(
    "says",
    marked(
        {
            "a pipeline of no known denoiser": "Bare has no known denoiser",
            "a pipeline without a denoiser": r"^((?!pipeline\.vae).)*$",
        }
    ),
)
def test_a_pipeline_without_a_known_denoiser_says_so(says):
    with pytest.raises(ValueError, match=says):
        PaperObjective.wrap(Bare(vae=vae(), scheduler=diffusers.DDPMScheduler()))


def test_a_pipeline_of_a_refused_class_says_why():
    model = diffusers.Transformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=8, norm_num_groups=4)
    with pytest.raises(
        ValueError, match="Transformer2DModel cannot be trained with this objective: it is a building block"
    ):
        PaperObjective.wrap(Bare(transformer=model, scheduler=diffusers.DDPMScheduler()))


def test_a_pipeline_without_a_scheduler_asks_for_a_schedule():
    with pytest.raises(
        (TypeError, ValueError), match=r"`schedule` is .*expected a diffusers scheduler|`schedule` is missing"
    ):
        PaperObjective.wrap(Bare(unet=unet(), scheduler=None))


def test_a_module_that_has_components_is_a_module():
    class Model(nn.Module):
        components = {"unet": "no model"}

    with pytest.raises(ValueError, match="`schedule` is missing"):
        PaperObjective.wrap(Model())


# --- what is predicted ------------------------------------------------------------------------------------------------


def flow(**settings):
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def solver(kind):
    return diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type=kind, flow_shift=3.0)


# the model, the scheduler, what is predicted: a clean + b noise at alpha_t = 0.7, sigma_t = 0.3 of the straight path
SAID = {
    "a UNet and a table": (unet, lambda: diffusers.DDPMScheduler(), "epsilon"),
    "a UNet and a table of v": (unet, lambda: diffusers.DDPMScheduler(prediction_type="v_prediction"), "v_prediction"),
    "a UNet and a flow": (unet, flow, "flow_prediction"),
    "a UNet and an inverted flow": (unet, lambda: flow(invert_sigmas=True), "-flow_prediction"),
    "Flux and a flow": ("FluxTransformer2DModel", flow, "flow_prediction"),
    "Flux and a solver": ("FluxTransformer2DModel", lambda: solver("flow_prediction"), "flow_prediction"),
    "Lumina2 and a flow": ("Lumina2Transformer2DModel", flow, "-flow_prediction"),
    "Lumina2 and a solver": ("Lumina2Transformer2DModel", lambda: solver("flow_prediction"), "-flow_prediction"),
    "Lumina2 and a solver of x_0": ("Lumina2Transformer2DModel", lambda: solver("sample"), "sample"),
    "Mochi and an inverted flow": ("MochiTransformer3DModel", lambda: flow(invert_sigmas=True), "-flow_prediction"),
    "Mochi and a flow": ("MochiTransformer3DModel", flow, "-flow_prediction"),
    "HiDream and a flow": ("HiDreamImageTransformer2DModel", flow, "-flow_prediction"),
    "SD3 and a table": ("SD3Transformer2DModel", lambda: diffusers.DDPMScheduler(), "epsilon"),
    "PixArt and a flow": ("PixArtTransformer2DModel", flow, "flow_prediction"),
}


def model_of(make):
    return build(make)[0] if isinstance(make, str) else make()


@pytest.mark.parametrize(("make", "scheduler", "kind"), SAID.values(), ids=SAID)
def test_the_scheduler_says_what_is_predicted_and_of_a_flow_the_class_says_the_sign(make, scheduler, kind):
    model, regular = model_of(make), {"t_range": (1, 1000)} if kind == "sample" else {}
    assert PaperObjective.wrap(model, scheduler(), **regular).prediction.name == kind
    for explicit in ("v_prediction", "flow_prediction", "-flow_prediction"):
        if explicit == "v_prediction" or not hasattr(scheduler(), "alphas_cumprod"):
            assert PaperObjective.wrap(model, scheduler(), prediction=explicit).prediction.name == explicit


def test_a_class_of_several_predictions_lists_them_unless_the_scheduler_or_the_user_says():
    model = build("PRXTransformer2DModel")[0]
    message = "released models of the family PRXTransformer2DModel differ .* Pass `prediction='flow_prediction'` or `prediction='sample'`"
    for schedule in (flow(), schedules.Linear(scale=1000)):
        with pytest.raises(ValueError, match=message):
            PaperObjective.wrap(model, schedule)
    assert PaperObjective.wrap(model, flow(), prediction="flow_prediction").prediction.name == "flow_prediction"
    at_noise = PaperObjective.wrap(model, flow(), prediction="sample", t_range=(1, 1000))
    assert at_noise.prediction.name == "sample"
    assert PaperObjective.wrap(model, diffusers.DDPMScheduler()).prediction.name == "epsilon"


def test_a_schedule_of_ours_says_nothing_so_the_class_or_the_user_does():
    message = "`prediction` is missing, and the schedule does not say it. Pass `prediction='v_prediction'`"
    with pytest.raises(ValueError, match=message):
        PaperObjective.wrap(unet(), schedules.Linear())
    assert (
        PaperObjective.wrap(unet(), schedules.Linear(), prediction="sample", t_range=(0.1, 1)).prediction.name
        == "sample"
    )
    for name, kind in (
        ("FluxTransformer2DModel", "flow_prediction"),
        ("Lumina2Transformer2DModel", "-flow_prediction"),
    ):
        assert PaperObjective.wrap(build(name)[0], schedules.Linear()).prediction.name == kind


PATHS = {  # the sign and size of a velocity in t, where a class's own is noise − clean over t from 0 to 1
    "data last": (schedules.Interpolant(lambda t: t, lambda t: 1 - t), 0.25, -1.0),
    "of 0 to 4": (schedules.Interpolant(lambda t: 1 - t / 4, lambda t: t / 4, low=0, high=4), 3.0, 0.25),
}


@pytest.mark.parametrize(("path", "t", "size"), marked(PATHS))
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Lumina2Transformer2DModel"])
def test_the_sign_of_a_class_is_not_taken_for_a_path_with_another(name, path, t, size):
    """A velocity is the derivative in the path's own t: not noise − clean, so a class does not say what it is there."""
    clean, noise = path.velocity(torch.tensor([t]))
    assert (clean.item(), noise.item()) == (-size, size)
    model = build(name)[0]
    with pytest.raises(
        ValueError, match=r"`prediction` is missing: models of the family .* Pass `prediction='flow_pre"
    ):
        PaperObjective.wrap(model, path)
    assert PaperObjective.wrap(model, path, prediction="-flow_prediction").prediction.name == "-flow_prediction"
    forward = schedules.Interpolant(lambda t: 1 - t, lambda t: t)
    assert PaperObjective.wrap(model, forward).prediction.name.endswith("flow_prediction")


# --- the time that the model is given ---------------------------------------------------------------------------------

UNITS = {  # the class: its time of a noise level between 0 (clean) and 1
    "SD3Transformer2DModel": ("timestep", lambda u: 1000 * u),
    "FluxTransformer2DModel": ("timestep", lambda u: u),
    "Lumina2Transformer2DModel": ("timestep", lambda u: 1 - u),
    "MochiTransformer3DModel": ("timestep", lambda u: 1000 * (1 - u)),
    "StableCascadeUNet": ("timestep_ratio", lambda u: u),
}
LEVEL = torch.tensor([0.125, 0.5, 0.875])
OURS = {  # times, and the level of each
    "Linear()": (schedules.Linear(), LEVEL),
    "Linear(scale=1000)": (schedules.Linear(scale=1000), 1000 * LEVEL),
    "Linear(reverse)": (schedules.Linear(reverse=True), 1 - LEVEL),
    "Linear(scale=1000, reverse)": (schedules.Linear(scale=1000, reverse=True), 1000 * (1 - LEVEL)),
    "Interpolant, data last": (
        schedules.Interpolant(lambda t: t, lambda t: 1 - t), 1 - LEVEL,
    ),
    "Interpolant of -1 to 3": (
        schedules.Interpolant(lambda t: (3 - t) / 4, lambda t: (t + 1) / 4, low=-1, high=3), 4 * LEVEL - 1,
    ),
    "Linear(3)": (schedules.Linear(3.0), LEVEL / (3 - 2 * LEVEL)),
}  # fmt: skip


@pytest.mark.parametrize(("schedule", "t"), marked(OURS))
@pytest.mark.parametrize("name", UNITS)
def test_a_schedule_of_ours_gives_each_class_its_own_unit(name, schedule, t):
    """On the straight path that flow models are trained on, the time says sigma."""
    argument, unit = UNITS[name]
    case = Called(name)
    _, sigma = schedule(t)
    torch.testing.assert_close(sigma.float(), LEVEL)
    unsaid = case.family.prediction is None or isinstance(schedule, schedules.Interpolant)
    prediction = "v_prediction" if unsaid else None
    objective = PaperObjective.wrap(case.model, schedule, prediction=prediction)
    objective.call(case.model, case.tiny.clean, t, case.cond)
    torch.testing.assert_close(case.given[argument], unit(LEVEL), rtol=1e-5, atol=1e-5)
    assert case.given[argument].dtype == torch.float32


def test_on_a_table_the_model_is_given_the_index_or_its_place():
    table = schedules.Discrete.scaled_linear()
    index = torch.tensor([0, 500, 999])
    for name, (argument, unit) in UNITS.items():
        case = Called(name)
        objective = PaperObjective.wrap(case.model, table, prediction="v_prediction")
        objective.call(case.model, case.tiny.clean, index, case.cond)
        torch.testing.assert_close(case.given[argument], unit(index / 1000), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", UNITS)
def test_an_edm_schedule_is_refused_where_the_family_has_another_unit(name):
    case = Called(name)
    message = (
        "`call` is missing: models of the family .* take a time as .*, and EDM.* does not say how sigma becomes that"
    )
    with pytest.raises(ValueError, match=message):
        PaperObjective.wrap(case.model, schedules.EDM(), prediction=edm())
    explicit = PaperObjective.wrap(
        case.model, schedules.EDM(), prediction=edm(),
        call=lambda model, x, t, cond: case.family.call(model, x, t.log() / 4, cond),
    )  # fmt: skip
    explicit.call(case.model, case.tiny.clean, torch.tensor([0.5, 1.0, 2.0]), case.cond)
    torch.testing.assert_close(case.given[UNITS[name][0]], torch.tensor([0.5, 1.0, 2.0]).log() / 4)


def test_a_family_whose_time_is_the_schedules_own_takes_an_edm_schedule():
    case = Called("UNet1DModel")
    objective = PaperObjective.wrap(case.model, schedules.EDM(), prediction=edm())
    t = torch.tensor([0.5, 1.0, 2.0])
    objective.call(case.model, case.tiny.clean, t, case.cond)
    assert torch.equal(case.given["timestep"], t)


# --- low precision ----------------------------------------------------------------------------------------------------

LOW = [
    "AceStepTransformer1DModel", "FluxTransformer2DModel", "HunyuanDiT2DModel", "HunyuanImageTransformer2DModel",
    "HunyuanVideo15Transformer3DModel", "Ideogram4Transformer2DModel", "LongCatAudioDiTTransformer",
    "MiniMaxMusic3Transformer1DModel", "SD3Transformer2DModel", "StableCascadeUNet", "UNet2DConditionModel",
]  # fmt: skip


def low(value):
    if isinstance(value, torch.Tensor):
        return value.bfloat16() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: low(item) for key, item in value.items()}
    return type(value)(map(low, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", marked({name: name for name in LOW}))
def test_a_model_in_bfloat16_trains_on_the_same_part(name):
    model, tiny = build(name)
    shapes = []
    for dtype, cast in ((torch.float32, lambda value: value), (torch.bfloat16, low)):
        objective = PaperObjective.wrap(model.to(dtype), tiny.scheduler())
        clean, cond = cast(tiny.clean), cast(tiny.cond)
        loss = objective(model, clean, cond=cond)
        assert loss.isfinite()
        with torch.no_grad():
            t = objective.schedule.at(torch.tensor([0.1, 0.5, 0.9]))
            features = objective.teacher(clean, t, cond)
        shapes.append([[r.shape for r in f] if isinstance(f, list) else f.shape for f in features])
    assert shapes[0] == shapes[1]


# --- attention backends -----------------------------------------------------------------------------------------------

JOINT = ["AuraFlowTransformer2DModel", "ChromaTransformer2DModel", "Flux2Transformer2DModel", "FluxTransformer2DModel"]
FAULTS |= dict.fromkeys(JOINT[1:], "attention that cannot be watched mixes the text into the part that is found")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", marked({name: name for name in JOINT}))
def test_the_part_that_is_found_does_not_depend_on_the_attention_backend(name):
    model, tiny = build(name)
    shapes = []
    for backend in ("native", "flex"):
        objective = PaperObjective.wrap(model, tiny.scheduler())
        with torch.no_grad(), attention_backend(backend):
            features = objective.teacher(tiny.clean, T / 1000, tiny.cond)
        shapes.append([feature.shape for feature in features])
    assert shapes[0] == shapes[1]
