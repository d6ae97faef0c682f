"""Outside networks as teachers, and t' without noise: against hand computations, with nothing of theirs trained."""

import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from algorithm1 import algorithm1, freeze, solve, unit
from diffusers import AutoencoderKL, DDPMScheduler
from models import TOLERANCE, ConvNet, distance, unet
from paper import PaperObjective
from PIL import Image
from torch import nn
from torch.nn import functional as F

from perceptual_diffusion import schedules, timesteps
from perceptual_diffusion.adapters import DecoderTeacher, TimmTeacher
from perceptual_diffusion.cli.metrics import Network

# diffusers 0.42 turns torch tensors to numpy the old way under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CLOSE = TOLERANCE[torch.float32]
LABELS = {"class_labels": torch.tensor([1, 2])}


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


# --- t_prime="clean" --------------------------------------------------------------------------------------------------

ZERO = schedules.Discrete.scaled_linear().zero_terminal_snr()
PAIRS = {
    "table, epsilon": (schedules.Discrete.linear(), "epsilon", [30, 700], 0),
    "table, v, zero terminal SNR": (ZERO, "v_prediction", [999, 10], 0),
    "flow": (schedules.Linear(), "flow_prediction", [0.3, 0.9], 0.0),
    "flow, data at t = 1": (schedules.Linear(reverse=True), "flow_prediction", [0.3, 0.9], 1.0),
    "cosine, sample": (schedules.Cosine(), "sample", [0.3, 1.0], 0.0),  # regular from t = 0.1
    "edm": (schedules.EDM(), "sample", [0.3, 9.0], 0.002),
}
pairs = pytest.mark.parametrize(("schedule", "prediction", "t", "end"), PAIRS.values(), ids=PAIRS)


def filters(x):
    """A fixed little network without noise levels."""
    kernel = torch.randn(5, x.shape[1], 3, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return torch.tanh(F.conv2d(x, kernel.to(x)))


class Seen:
    """A teacher that notes what it is given."""

    def __init__(self):
        self.samples, self.times = [], []

    def __call__(self, x_t, t, cond):
        self.samples.append(x_t)
        self.times.append(t)
        return [filters(x_t)]


def objective_of(schedule, prediction, teacher=None, **options):
    if isinstance(schedule, schedules.Cosine):
        options["t_range"] = (0.1, 1.0)
    return PaperObjective(
        schedule=schedule, prediction=prediction, teacher=teacher or Seen(), t_prime="clean", **options
    )


@pairs
def test_clean_gives_the_clean_end_of_the_schedule(schedule, prediction, t, end):
    like = torch.zeros(3, 2)
    drawn = timesteps.Clean()(schedule, like, t=None, generator=None)
    assert drawn.dtype == (torch.int64 if schedule.discrete else torch.float32)
    assert torch.equal(drawn, torch.tensor([end] * 3, dtype=drawn.dtype))
    schedule.check("t_prime", drawn, 3, like.device)


@pairs
def test_the_teacher_sees_the_clean_sample_itself_and_the_clean_estimate(schedule, prediction, t, end):
    objective = objective_of(schedule, prediction)
    clean, noise, predicted = torch.randn(3, 2, 3, 8, 8)
    t = torch.tensor(t)
    objective.loss(predicted, clean=clean, noise=noise, t=t)
    true, estimate = objective.teacher.samples
    alpha, sigma = (s.float().view(-1, 1, 1, 1) for s in schedule(t))
    expected, _ = solve(prediction, alpha * clean + sigma * noise, predicted, alpha, sigma)
    assert torch.equal(true, clean)
    assert distance(estimate, expected) < CLOSE
    assert all(torch.equal(time, torch.full_like(time, end)) for time in objective.teacher.times)


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_that_of_features_of_the_clean_estimate(schedule, prediction, t, end, dtype):
    objective = objective_of(schedule, prediction)
    clean, noise, predicted = torch.randn(3, 2, 3, 8, 8, dtype=dtype)
    predicted.requires_grad_()
    t = torch.tensor(t)
    loss = objective.loss(predicted, clean=clean, noise=noise, t=t, reduction="none")
    alpha, sigma = (s.to(dtype).view(-1, 1, 1, 1) for s in schedule(t))
    estimate, _ = solve(prediction, alpha * clean + sigma * noise, predicted, alpha, sigma)
    expected = (filters(estimate) - filters(clean)).square().flatten(1).mean(1)
    close = max(TOLERANCE[dtype], 1e-4 if dtype == torch.float32 else 0)  # solving for the estimate rounds twice
    assert distance(loss, expected) < close
    assert distance(gradient(loss.sum(), predicted), gradient(expected.sum(), predicted)) < close


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_perfect_prediction_has_exactly_no_loss(dtype):
    clean, noise = torch.randn(2, 2, 3, 8, 8, dtype=dtype)
    objective = objective_of(schedules.Linear(), "flow_prediction")
    loss = objective.loss(noise - clean, clean=clean, noise=noise, t=torch.tensor([0.3, 0.9]))
    assert float(loss) == 0
    assert torch.equal(objective.teacher.samples[0], clean)


def test_the_second_term_of_the_split_formulation_is_nothing():
    clean, noise, predicted = torch.randn(3, 2, 3, 8, 8)
    predicted.requires_grad_()
    batch = {"clean": clean, "noise": noise, "t": torch.tensor([0.3, 0.9])}
    joint, split = (
        objective_of(schedules.Linear(), "flow_prediction", formulation=kind).loss(predicted, **batch)
        for kind in ("joint", "split")
    )
    assert torch.equal(joint, split)
    assert torch.equal(gradient(joint, predicted), gradient(split, predicted))


def test_a_given_t_prime_is_told_to_the_teacher_and_nothing_is_noised_to_it():
    objective = objective_of(schedules.Discrete.linear(), "epsilon")
    clean, noise = torch.randn(2, 2, 3, 8, 8)
    t_prime = torch.tensor([500, 900])
    objective.loss(torch.zeros(2, 3, 8, 8), clean=clean, noise=noise, t=torch.tensor([9, 99]), t_prime=t_prime)
    assert torch.equal(objective.teacher.samples[0], clean)
    assert all(torch.equal(time, t_prime) for time in objective.teacher.times)


def test_the_copy_of_the_model_at_the_clean_end_equals_its_features_of_the_clean_estimate():
    student, t, t_prime = unet().eval(), torch.tensor([500, 900]), torch.tensor([0, 0])
    objective = PaperObjective.wrap(student, DDPMScheduler(), t_prime="clean")
    clean, noise, predicted = torch.randn(3, 2, 3, 8, 8)
    predicted.requires_grad_()
    loss = objective.loss(predicted, clean=clean, noise=noise, t=t, cond=LABELS)
    bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    expected = algorithm1(
        freeze(student), ["mid_block"], lambda m, x, s, cond: m(x, s, **cond), LABELS, clean=clean, noise=noise,
        model_output=predicted, t_prime=t_prime, at_t=(bar[t].sqrt(), (1 - bar[t]).sqrt()),
        at_t_prime=(torch.ones(2), torch.zeros(2)), kind="epsilon",
    ).mean()  # fmt: skip
    assert distance(loss, expected) < CLOSE
    assert distance(gradient(loss, predicted), gradient(expected, predicted)) < CLOSE


def test_singular_pairs_are_refused_as_ever():
    with pytest.raises(ValueError, match=r"alpha is 0 \(zero terminal SNR\)"):
        objective_of(ZERO, "epsilon")
    with pytest.raises(ValueError, match="sigma is 0"):
        objective_of(schedules.Linear(), "sample")


def test_clean_is_for_t_prime_only():
    with pytest.raises(ValueError, match="unknown `t` 'clean', expected one of 'uniform'"):
        objective_of(schedules.Linear(), "flow_prediction", t="clean")
    with pytest.raises(ValueError, match="`t` is 'clean', where there is nothing to denoise"):
        objective_of(schedules.Linear(), "flow_prediction", t=timesteps.Clean())


def test_an_unknown_t_prime_names_clean_too():
    with pytest.raises(ValueError, match=r"unknown `t_prime` 'close', expected .*'logit_normal'.* or 'clean'"):
        timesteps.get("t_prime", "close")


# --- a timm backbone --------------------------------------------------------------------------------------------------


def backbone(name="test_resnet", **options):
    return timm.create_model(name, pretrained=False, **options)


def pixels(batch=2, size=160):
    return 2 * torch.rand(batch, 3, size, size) - 1


def test_pictures_are_prepared_as_timm_prepares_them():
    model = backbone("test_efficientnet")
    config = timm.data.resolve_model_data_config(model)
    picture = Image.fromarray(torch.randint(0, 256, (160, 160, 3), dtype=torch.uint8).numpy())
    expected = timm.data.create_transform(**config | {"crop_pct": 1.0}, is_training=False)(picture)
    raw = torch.tensor(list(picture.tobytes())).reshape(160, 160, 3).movedim(-1, 0)
    assert distance(TimmTeacher(model).prepare(raw[None] / 127.5 - 1)[0], expected) < CLOSE


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_each_backbone_is_normalised_by_its_own_mean_and_deviation(name):
    model = backbone(name)
    config = timm.data.resolve_model_data_config(model)
    shown = TimmTeacher(model).prepare(torch.zeros(1, 3, 160, 160))
    expected = [(0.5 - mean) / std for mean, std in zip(config["mean"], config["std"], strict=True)]
    assert shown.mean((0, 2, 3)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("layers", "kept"), [(None, range(5)), ([0, 2], [0, 2]), ([-1, 1], [1, 4]), ([3, -2], [3])])
def test_features_are_maps_in_the_order_of_depth(layers, kept):
    model, x = backbone(), pixels()
    teacher = TimmTeacher(model, layers=layers)
    expected = model.forward_intermediates(teacher.prepare(x), intermediates_only=True)
    features = teacher(x, torch.zeros(2), {})
    assert len(features) == len(kept)
    assert all(torch.equal(f, expected[i]) for f, i in zip(features, kept, strict=True))


@pytest.mark.parametrize("prefix", [False, True])
def test_features_of_a_vit_are_tokens_with_or_without_the_class(prefix):
    model, x = backbone("test_vit"), pixels()
    (feature,) = TimmTeacher(model, layers=[-1], norm=True, prefix=prefix)(x, torch.zeros(2), {})
    expected = model.forward_features(TimmTeacher(model).prepare(x))
    assert feature.shape == (2, 100 + prefix, 64)
    assert distance(feature, expected if prefix else expected[:, 1:]) < CLOSE


def test_what_lies_behind_the_last_feature_is_not_run():
    model, ran = backbone("test_vit"), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, args, out, i=i: ran.append(i))
    TimmTeacher(model, layers=[1, 3])(pixels(), torch.zeros(2), {})
    assert ran == [0, 1, 2, 3]


def test_pictures_of_another_size_are_resized_unless_told_not_to():
    model, small = backbone(), pixels(size=64)
    assert TimmTeacher(model).prepare(small).shape == (2, 3, 160, 160)
    whole, own = TimmTeacher(model)(small, None, {})[0], TimmTeacher(model, resize=False)(small, None, {})[0]
    assert whole.shape[-2:] == (80, 80)
    assert own.shape[-2:] == (32, 32)
    flat = torch.full((1, 3, 40, 70), 0.3)
    assert distance(TimmTeacher(model).prepare(flat), TimmTeacher(model).prepare(flat[..., :1, :1])) < CLOSE


def test_a_backbone_laid_out_for_another_size_gets_that_size():
    teacher = TimmTeacher(backbone("test_vit", img_size=64), layers=[0])
    assert teacher.size == (64, 64)
    assert teacher(pixels(size=96), None, {})[0].shape == (2, 16, 64)


def test_frames_of_a_video_are_pictures():
    teacher, video = TimmTeacher(backbone(), layers=[-1]), 2 * torch.rand(2, 3, 4, 160, 160) - 1
    (feature,) = teacher(video, None, {})
    assert feature.shape == (8, 96, 5, 5)
    assert distance(feature[5], teacher(video[1:, :, 1], None, {})[0][0]) < CLOSE
    objective = objective_of(schedules.Linear(), "flow_prediction", teacher)
    loss = objective.loss(
        torch.zeros_like(video), clean=video, noise=video, t=torch.tensor([0.3, 0.9]), reduction="none"
    )
    assert loss.shape == (2,)


def lpips(model, x, y, mean, std):
    """Zhang et al. 2018, eq. 1, with weights of 1 and the mean over layers."""
    total = 0.0
    features = (
        model.forward_intermediates(((image + 1) / 2 - mean) / std, intermediates_only=True) for image in (x, y)
    )
    for f, g in zip(*features, strict=True):
        total = total + (unit(f, 1) - unit(g, 1)).square().sum(1).mean((1, 2))
    return total / 5


def test_an_lpips_like_loss_equals_one_written_by_hand():
    """On a real network, EfficientNet-Lite0 with its ImageNet weights."""
    network = Network().model.requires_grad_(True)
    teacher = TimmTeacher(network, resize=False)
    objective = objective_of(schedules.Linear(), "flow_prediction", teacher, distance="normalised")
    clean, noise, predicted = pixels(size=64), *torch.randn(2, 2, 3, 64, 64)
    predicted.requires_grad_()
    t = torch.tensor([0.2, 0.6])
    loss = objective.loss(predicted, clean=clean, noise=noise, t=t, reduction="none")
    time = t.view(-1, 1, 1, 1)
    estimate = (1 - time) * clean + time * noise - time * predicted
    expected = lpips(network, estimate, clean, 0.5, 0.5)
    assert distance(loss, expected) < CLOSE
    assert distance(gradient(loss.sum(), predicted), gradient(expected.sum(), predicted)) < 1e-4


def test_a_loss_on_tokens_of_a_vit_equals_one_written_by_hand():
    model = backbone("test_vit")
    teacher = TimmTeacher(model, layers=[-1], norm=True, prefix=True)
    objective = objective_of(schedules.Linear(), "flow_prediction", teacher, distance="cosine")
    clean, noise, predicted = pixels(), *torch.randn(2, 2, 3, 160, 160)
    predicted.requires_grad_()
    t = torch.tensor([0.2, 0.6])
    loss = objective.loss(predicted, clean=clean, noise=noise, t=t)
    time = t.view(-1, 1, 1, 1)
    estimate = (1 - time) * clean + time * noise - time * predicted
    tokens = [model.forward_features(teacher.prepare(x)) for x in (estimate, clean)]
    expected = (1 - F.cosine_similarity(*(x.flatten(1) for x in tokens))).mean()
    assert distance(loss, expected) < CLOSE
    assert distance(gradient(loss, predicted), gradient(expected, predicted)) < 1e-4


def test_backbone_and_decoder_are_frozen_and_never_move():
    model, decode = backbone("test_vit").train(), nn.Conv2d(3, 3, 1).train()
    teacher = TimmTeacher(model, decode=decode)
    before = [p.clone() for m in (model, decode) for p in m.parameters()]
    objective = PaperObjective.wrap(
        student := ConvNet(), schedules.Linear(), prediction="flow_prediction", layers=["body"], teacher=teacher,
        t_prime="clean",
    )  # fmt: skip
    optimizer = torch.optim.Adam([*student.parameters(), *model.parameters(), *decode.parameters()], lr=0.01)
    objective(student, pixels(size=32)).backward()
    optimizer.step()
    assert all(p.grad is not None for p in student.parameters())
    after = [p for m in (model, decode) for p in m.parameters()]
    assert all(torch.equal(p, q) and p.grad is None and not p.requires_grad for p, q in zip(after, before, strict=True))
    assert not any(m.training for m in (*model.modules(), *decode.modules()))
    assert teacher.parameters_held == sum(p.numel() for p in after)


def test_a_prediction_that_follows_the_gradient_comes_nearer_in_features():
    objective = objective_of(schedules.Linear(), "flow_prediction", TimmTeacher(backbone()), distance="normalised")
    clean, noise = pixels(), torch.randn(2, 3, 160, 160)
    predicted = (noise - clean + 0.5 * torch.randn_like(clean)).requires_grad_()
    optimizer, losses = torch.optim.Adam([predicted], lr=0.03), []
    for _ in range(8):
        losses.append(objective.loss(predicted, clean=clean, noise=noise, t=torch.tensor([0.5, 0.7])))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1].detach()) < 0.7 * float(losses[0].detach())


def test_to_moves_backbone_and_decoder():
    decode = vae()
    objective = objective_of(schedules.Linear(), "flow_prediction", TimmTeacher(backbone(), decode=decode))
    objective.to(torch.float64)
    latents = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    loss = objective.loss(latents[0], clean=latents[1], noise=latents[2], t=torch.tensor([0.5, 0.7]))
    assert loss.dtype == torch.float64
    assert {p.dtype for p in decode.parameters()} == {torch.float64}


# --- a decoder --------------------------------------------------------------------------------------------------------


def vae(**config):
    return AutoencoderKL(**{
        "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "scaling_factor": 0.2,
    } | config).eval()  # fmt: skip


CHANNELS = {"latents_mean": [0.1, 0.2, -0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 3.0]}
SCALINGS = {
    "a factor": ({}, lambda z: z / 0.2),
    "a factor and a shift": ({"shift_factor": 0.4}, lambda z: z / 0.2 + 0.4),
    "means and deviations of channels": (
        CHANNELS,
        lambda z: (
            z * torch.tensor([1.0, 2.0, 0.5, 3.0]).view(-1, 1, 1) / 0.2
            + torch.tensor([0.1, 0.2, -0.3, 0.0]).view(-1, 1, 1)
        ),
    ),
}


@pytest.mark.parametrize(("config", "undo"), SCALINGS.values(), ids=SCALINGS)
def test_a_vae_as_decode_undoes_the_scaling_of_its_latents(config, undo):
    model, decoder, latents = backbone(), vae(**config), torch.randn(2, 4, 8, 8)
    features = TimmTeacher(model, decode=decoder)(latents, None, {})
    expected = TimmTeacher(model)(decoder.decode(undo(latents)).sample, None, {})
    assert all(distance(f, g) < CLOSE for f, g in zip(features, expected, strict=True))


def test_a_function_as_decode_is_used_as_it_is():
    model, x = backbone(), pixels()
    teacher = TimmTeacher(model, decode=lambda sample: sample["image"].flip(-1))
    assert torch.equal(teacher({"image": x}, None, {})[0], TimmTeacher(model)(x.flip(-1), None, {})[0])


def test_features_of_the_decoder_equal_those_taken_by_hand():
    decoder = vae(shift_factor=0.1)
    objective = objective_of(schedules.Linear(), "flow_prediction", DecoderTeacher(decoder), distance="normalised")
    clean, noise, predicted = torch.randn(3, 2, 4, 8, 8)
    predicted.requires_grad_()
    t = torch.tensor([0.2, 0.6])
    loss = objective.loss(predicted, clean=clean, noise=noise, t=t)
    frozen, time = freeze(decoder), t.view(-1, 1, 1, 1)
    estimate, expected = (1 - time) * clean + time * noise - time * predicted, 0.0
    for layer in (frozen.decoder.mid_block, frozen.decoder.up_blocks[0], frozen.decoder.up_blocks[1]):
        seen = []
        hook = layer.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        for latents in (estimate, clean):
            frozen.decode(latents / 0.2 + 0.1)
        hook.remove()
        expected = expected + (unit(seen[0], 1) - unit(seen[1], 1)).square().sum(1).mean() / 3
    assert distance(loss, expected) < CLOSE
    assert distance(gradient(loss, predicted), gradient(expected, predicted)) < 1e-4


def test_the_decoder_is_left_after_its_last_layer():
    decoder, ran = vae(), []
    decoder.decoder.up_blocks[1].register_forward_hook(lambda m, args, out: ran.append(1))
    decoder.decoder.conv_out.register_forward_hook(lambda m, args, out: ran.append(2))
    features = DecoderTeacher(decoder, layers=["decoder.mid_block", "decoder.up_blocks.0"])
    assert len(features(torch.randn(2, 4, 8, 8), torch.zeros(2), {})) == 2
    assert ran == []


# --- what is refused --------------------------------------------------------------------------------------------------

BAD = {
    "a name": (TypeError, "`backbone` is 'vgg16', expected a model of timm", lambda: TimmTeacher("vgg16")),
    "no intermediates": (
        ValueError, "`backbone` is a ConvNet without `forward_intermediates`.*ModuleTeacher",
        lambda: TimmTeacher(ConvNet()),
    ),
    "one index": (TypeError, r"`layers` is 2, expected a list of indices, such as \[-1\]", lambda: TimmTeacher(backbone(), layers=2)),
    "no index": (TypeError, r"`layers` is \[\], expected a list", lambda: TimmTeacher(backbone(), layers=[])),
    "names": (TypeError, r"`layers` is \['layer1'\]", lambda: TimmTeacher(backbone(), layers=["layer1"])),
    "a far index": (
        ValueError, r"`layers` is \[0, 5\], expected indices from -5 to 4: ResNet has 5",
        lambda: TimmTeacher(backbone(), layers=[0, 5]),
    ),
    "prefix of a convolutional network": (
        ValueError, "`prefix` is True, but ResNet has no class or register tokens",
        lambda: TimmTeacher(backbone(), prefix=True),
    ),
    "decode is a number": (TypeError, "`decode` is 3, expected a VAE of diffusers", lambda: TimmTeacher(backbone(), decode=3)),
    "latents without decode": (
        ValueError, r"the sample gives \(2, 4, 8, 8\), expected pixels in \[-1, 1\], shape \(B, 3, H, W\). Pass a `decode=`",
        lambda: TimmTeacher(backbone())(torch.randn(2, 4, 8, 8), None, {}),
    ),
    "decode gives grey": (
        ValueError, r"`decode` gives \(2, 1, 8, 8\), expected pixels",
        lambda: TimmTeacher(backbone(), decode=lambda x: x[:, :1])(pixels(size=8), None, {}),
    ),
    "decode gives a list": (
        ValueError, r"`decode` gives \[\(3, 160, 160\), \(3, 160, 160\)\], expected pixels",
        lambda: TimmTeacher(backbone(), decode=list)(pixels(), None, {}),
    ),
    "another device": (
        ValueError, r"the teacher is on cpu, expected meta.*Call `objective.to\('meta'\)`",
        lambda: TimmTeacher(backbone())(torch.randn(2, 3, 8, 8, device="meta"), None, {}),
    ),
    "an autoencoder without a scale": (
        ValueError, r"the config of AutoencoderKL has no `scaling_factor`.*Pass a function, `decode=lambda",
        lambda: TimmTeacher(backbone(), decode=vae(scaling_factor=None)),
    ),
    "a decoder that is none": (
        TypeError, "`vae` is a ConvNet, expected a VAE of diffusers", lambda: DecoderTeacher(ConvNet()),
    ),
    "no such layer": (
        ValueError, "no module 'decoder.up' in AutoencoderKL", lambda: DecoderTeacher(vae(), layers=["decoder.up"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "words", "make"), BAD.values(), ids=BAD)
def test_wrong_arguments_say_what_to_do(kind, words, make):
    with pytest.raises(kind, match=words):
        make()


def test_a_missing_timm_is_named_with_what_mends_it(monkeypatch):
    model = backbone()
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(ImportError, match=r"pip install 'perceptual-diffusion\[timm\]'"):
        TimmTeacher(model)


# --- the documentation ------------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[1] / "docs/outside_teachers.md"


def test_the_code_of_the_documentation_runs_in_order_and_gives_gradients():
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    model = unet(in_channels=4, out_channels=4)
    latents, noise, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([100, 400])
    scheduler = DDPMScheduler()
    x_t = scheduler.add_noise(latents, noise, timesteps)
    names = {
        "model": model, "scheduler": scheduler, "latents": latents, "noise": noise, "timesteps": timesteps,
        "cond": LABELS, "backbone": backbone(), "vit": backbone("test_vit"), "vae": vae(),
        "model_pred": model(x_t, timesteps, **LABELS).sample,
    }  # fmt: skip
    for block in blocks:
        model.zero_grad()
        exec(block, names)
        if model.conv_in.weight.grad is None:
            names["loss"].backward()
        assert float(model.conv_in.weight.grad.abs().sum()) > 0
