"""`check` names every wrong set-up it is shown, lets right ones pass, and leaves everything as it was."""

import copy
import math
import random
import re
from contextlib import contextmanager

import pytest
import torch
from models import MLP, ConvNet, TwoStreams, dit, unet
from paper import PaperObjective
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import NO_CPU_BACKWARD, ROWS, build

from perceptual_diffusion import adapters, checks, parameterizations, schedules
from perceptual_diffusion._checking.skill import skills
from perceptual_diffusion.checks import SetupError, check
from perceptual_diffusion.cli import datasets, demo

T = torch.Tensor


def plain(model, x_t, t, cond):
    return model(x_t, t, **cond)


def thousandths(model, x_t, t, cond):
    """For nets that take the time as it is, and saturate."""
    return model(x_t, t / 1000)


def pictures(batch=4):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def wrap(model, **options):
    options = {"prediction": "v_prediction", "layers": "body"} | options
    return PaperObjective.wrap(model, options.pop("schedule", schedules.Linear()), **options)


def bare(teacher, **options):
    """An objective whose teacher is any callable."""
    options = {"schedule": schedules.Linear(), "prediction": "v_prediction"} | options
    return PaperObjective(teacher=teacher, **options)


def fault(objective, model, clean=None, **options):
    with pytest.raises(SetupError) as caught:
        check(objective, model, pictures() if clean is None else clean, **options)
    assert caught.value.fault in checks.FAULTS
    return caught.value.fault


def body(net):
    """What a careful user writes: the features of a frozen net."""
    net = net.eval().requires_grad_(False)
    return lambda x, t, cond: [torch.tanh(net.body(torch.tanh(net.stem(x)) + t.to(x.dtype).view(-1, 1, 1, 1)))]


# --- right set-ups ---


@pytest.mark.parametrize("prediction", ["v_prediction", "flow_prediction"])
@pytest.mark.parametrize(
    ("formulation", "distance", "t_prime"),
    [
        ("joint", "mse", "uniform"),
        ("split", "cosine", "near"),
        ("joint", "huber", "shifted"),
        ("split", "mae", "logit_normal"),
    ],
)
def test_a_right_set_up_gives_a_report(prediction, formulation, distance, t_prime):
    model = ConvNet()
    objective = wrap(
        model, prediction=prediction, formulation=formulation, distance=distance, t_prime=t_prime, mse_weight=0.3
    )
    report = check(objective, model, pictures())
    assert report.loss > 0
    assert report.trained_parameters == sum(p.numel() for p in model.parameters())
    assert report.teacher_parameters == sum(p.numel() for m in (model.stem, model.body) for p in m.parameters())
    assert [f.name for f in report.features] == ["body"]


def test_the_report_has_the_figures_of_the_step():
    model, clean = ConvNet(), pictures()
    objective = wrap(model, t=lambda schedule, like, *, t, generator: torch.full((4,), 0.5))
    objective.t_prime = lambda schedule, like, *, t, generator: torch.full((4,), 0.75)
    report = check(objective, model, clean, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    times = {"t": torch.full((4,), 0.5), "t_prime": torch.full((4,), 0.75)}
    loss = objective(model, clean, noise=noise, **times).detach()
    y = (noise - clean) * 0.5
    error = model((clean + noise) * 0.5, times["t"]).detach() - y
    assert report.loss == pytest.approx(float(loss), rel=1e-5)
    assert report.mse == pytest.approx(float(error.square().mean()), rel=1e-5)
    assert report.explained == pytest.approx(1 - float(error.square().mean() / y.square().mean()), rel=1e-4)
    (feature,) = objective.teacher((clean + 3 * noise) / 4, times["t_prime"], {})
    (seen,) = report.features
    assert seen.shape == tuple(feature.shape)
    assert seen.mean_abs == pytest.approx(float(feature.abs().mean()), rel=1e-5)
    assert seen.std == pytest.approx(float(feature.std(correction=0)), rel=1e-5)
    power = feature.square().sum((0, 2, 3))
    assert seen.largest_channel == pytest.approx(float(power.max() / power.sum()), rel=1e-5)
    assert (seen.outliers, seen.zeros) == (0, 0)


def test_the_report_prints_its_figures_and_warnings():
    model = unet(dropout=0.1)
    objective = PaperObjective.wrap(model, schedules.Linear(), prediction="v_prediction")
    report = check(objective, model.eval(), torch.randn(2, 3, 16, 16), cond={"class_labels": torch.tensor([0, 1])})
    lines = str(report).splitlines()
    assert lines[0].startswith(f"loss {report.loss:.4g}, mse {report.mse:.4g}")
    assert f"{report.teacher_parameters:,}" in lines[1]
    assert lines[3].startswith("mid_block  ")
    assert any(line.startswith("warning: `model` is in eval mode: its dropout") for line in lines)


def test_nested_samples_and_plain_vectors_pass():
    model = TwoStreams()
    clean = {"image": torch.randn(3, 3, 6, 6), "sound": torch.randn(3, 4)}
    check(wrap(model, layers="join"), model, clean)
    model = MLP()
    check(wrap(model, layers="middle"), model, torch.randn(6, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_precision_passes(dtype):
    model = ConvNet().to(dtype)
    check(wrap(model), model, pictures().to(dtype))


def test_a_checkpointed_student_passes():
    class Checkpointed(ConvNet):
        def forward(self, x, t):
            hidden = checkpoint(self.stem, x, use_reentrant=False)
            return self.head(torch.tanh(checkpoint(self.body, hidden, use_reentrant=False)))

    model = Checkpointed()
    check(wrap(model), model, pictures())


@pytest.mark.parametrize("wrapper", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_student_passes_as_the_plain_one_does(wrapper):
    model = ConvNet()
    objective = wrap(model)
    assert check(objective, wrapper(model), pictures()).loss == pytest.approx(check(objective, model, pictures()).loss)


def test_the_loss_is_that_of_the_precision_trained_in():
    model = ConvNet()
    objective = wrap(model)
    plain = check(objective, model, pictures()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert check(objective, model, pictures()).loss != plain


def test_a_new_model_whose_last_layer_is_zero_passes():
    model = ConvNet()
    nn.init.zeros_(model.head.weight)
    check(wrap(model), model, pictures())
    nn.init.zeros_(model.head.bias)
    assert any("untrained" in text for text in check(wrap(model), model, pictures()).warnings)


def test_a_frozen_network_that_keeps_its_gradients_out_passes():
    model, net = ConvNet(), ConvNet().eval()  # its attention may need parameters that require grad
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    check(bare(lambda x, t, cond: [torch.tanh(net.body(net.stem(x)))]), model, pictures())


# --- faults of the student and its batch ---


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_is_not_finite_is_named(value):
    clean = pictures()
    clean[1, 2, 3, 4] = value
    model = ConvNet()
    assert fault(wrap(model), model, clean) == "clean"


@pytest.mark.parametrize(
    ("clean", "cond", "error"),
    [(3, None, TypeError), (torch.zeros(()), None, ValueError), (torch.randn(2, 3, 8, 8), [1], TypeError)],
)
def test_arguments_of_a_wrong_kind_are_refused(clean, cond, error):
    model = ConvNet()
    with pytest.raises(error, match=r"`cl|`cond"):
        check(wrap(model), model, clean, cond=cond)
    with pytest.raises(TypeError, match="`model` is a function"):
        check(wrap(model), lambda x, t: x, pictures())


def test_a_condition_that_the_model_does_not_take_is_named():
    model = ConvNet()
    assert fault(wrap(model), model, cond={"text": torch.zeros(4, 2)}) == "cond"


def test_a_condition_that_is_missing_is_named():
    class Labelled(ConvNet):
        def forward(self, x, t, labels):
            return super().forward(x, t + labels)

    model = Labelled()
    assert fault(wrap(model), model) == "cond"
    check(wrap(model), model, pictures(), cond={"labels": torch.rand(4)})


def test_a_model_that_cannot_run_on_the_batch_is_named():
    model = ConvNet()
    assert fault(wrap(model), model, torch.randn(2, 5, 8, 8)) == "call"


def test_an_output_of_another_shape_is_named():
    model = ConvNet()
    objective = wrap(model, output=lambda output, x_t: output[:, :2])
    assert fault(objective, model) == "shape"


def test_an_output_that_is_not_finite_is_named():
    model = ConvNet()
    objective = wrap(model)
    model.head.bias.data[0] = float("inf")
    assert fault(objective, model) == "output"


def test_a_model_that_does_not_see_its_input_is_named():
    model = ConvNet()
    objective = wrap(model, call=lambda model, x_t, t, cond: model(torch.ones_like(x_t), t))
    assert fault(objective, model) in ("output", "features")
    assert fault(bare(body(ConvNet()), call=objective.call), model) == "output"


def test_a_student_without_trained_weights_is_named():
    model = ConvNet()
    objective = wrap(model)
    assert fault(objective, model.eval().requires_grad_(False)) == "frozen"


def test_a_partitioned_student_is_named():
    model = ConvNet()
    objective = wrap(model)
    model.body.weight.ds_id = 0
    assert fault(objective, model) == "partitioned"


@pytest.mark.parametrize("no_grad", [True, False])
def test_a_student_that_gets_no_gradient_is_named(no_grad):
    model = ConvNet()
    if no_grad:  # the output has no graph
        assert fault(wrap(model, call=torch.no_grad()(plain)), model) == "untrainable"
        return
    unused = nn.Parameter(torch.ones(3))  # the only weight that is trained has no part in the output
    frozen = ConvNet().requires_grad_(False)
    frozen.register_parameter("unused", unused)
    objective = bare(body(ConvNet()), call=lambda m, x, t, c: m(x.requires_grad_(), t))
    assert fault(objective, frozen) == "untrainable"


def test_reentrant_checkpointing_that_trains_half_of_the_weights_is_warned_of():
    class Reentrant(ConvNet):
        def forward(self, x, t):
            if not torch.is_grad_enabled():
                return super().forward(x, t)
            return self.head(
                checkpoint(lambda h: torch.tanh(self.body(torch.tanh(self.stem(h)))), x, use_reentrant=True)
            )

    model = Reentrant()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        report = check(bare(body(ConvNet())), model, pictures())
    assert report.trained_parameters == sum(p.numel() for p in model.head.parameters())
    assert any("of the numbers that are trained get no gradient" in text for text in report.warnings)


# --- times ---


def sampler(function):
    return lambda schedule, like, *, t, generator: function(torch.rand(len(like), generator=generator))


WRONG_TIMES = {
    "negative": sampler(lambda u: u - 0.5),
    "beyond the end": sampler(lambda u: u * 1000),
    "bfloat16": sampler(lambda u: u.bfloat16()),
    "rounded": sampler(lambda u: u.bfloat16().float()),
    "NaN": sampler(lambda u: u / 0 * 0),
    "of another shape": sampler(lambda u: u[:, None]),
}


@pytest.mark.parametrize("name", ["t", "t_prime"])
@pytest.mark.parametrize("kind", WRONG_TIMES)
def test_a_sampler_that_draws_wrong_times_is_named(kind, name):
    model = ConvNet()
    objective = wrap(model, **{name: WRONG_TIMES[kind]})
    assert fault(objective, model) == "time"
    assert fault(objective, model, pictures(1)) == "time"


def test_indices_rounded_to_bfloat16_are_named_and_coarse_grids_are_not():
    model = ConvNet()
    objective = wrap(model, schedule=schedules.Discrete.linear(), call=thousandths)
    objective.t = sampler(lambda u: (u * 999).bfloat16().long().clamp(max=999))
    assert fault(objective, model) == "time"
    for grid in (8, 250):  # every eighth index, and the four of a distilled model
        objective.t = sampler(lambda u, grid=grid: (u * 1000 / grid).long() * grid)
        check(objective, model, pictures())


def test_a_second_time_that_is_the_first_one_is_named():
    model = ConvNet()
    same = lambda schedule, like, *, t, generator: t  # noqa: E731
    assert fault(wrap(model, t_prime=same), model) == "time"
    check(wrap(model, t_prime=same, formulation="split"), model, pictures())


def test_times_given_in_bfloat16_are_warned_of():
    model = ConvNet()
    objective = wrap(model, call=lambda model, x_t, t, cond: model(x_t, t.bfloat16()))
    assert any("bfloat16" in text for text in check(objective, model, pictures()).warnings)


# --- faults of the teacher ---


def test_a_teacher_under_no_grad_is_named():
    model, features = ConvNet(), body(ConvNet())
    assert fault(bare(torch.no_grad()(features)), model) == "no_gradient"


@pytest.mark.parametrize("mse_weight", [0.0, 1.0])
def test_a_teacher_that_only_seems_to_have_a_gradient_is_named(mse_weight):
    model, features, constant = ConvNet(), body(ConvNet()), nn.Parameter(torch.zeros(()))
    objective = bare(lambda x, t, cond: [features(x, t, cond)[0].detach() + constant], mse_weight=mse_weight)
    assert fault(objective, model) == "no_gradient"
    assert constant.grad is None


def test_a_tap_that_never_fires_is_named():
    model = ConvNet()
    model.spare = nn.Conv2d(3, 3, 1)
    assert fault(wrap(model, layers="spare"), model) == "tap"
    assert fault(bare(lambda x, t, cond: []), model) == "tap"
    assert fault(bare(lambda x, t, cond: [None]), model) == "tap"


def test_features_kept_from_an_earlier_pass_are_named():
    model, stale = ConvNet(), body(ConvNet())(pictures(), torch.rand(4), {})
    assert fault(bare(lambda x, t, cond: stale), model) == "features"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f * 0, "is all zero"),
        (lambda f: torch.ones_like(f) + 0 * f, "does not depend on the noisy sample"),
        (lambda f: f / 0, "holds NaN or infinity"),
        (lambda f: (f * 1e30).square() + f, "holds NaN or infinity"),
    ],
    ids=["zero", "constant", "infinite", "overflow"],
)
def test_features_that_say_nothing_are_named(change, words):
    model, features = ConvNet(), body(ConvNet())
    with pytest.raises(SetupError, match=words) as caught:
        check(bare(lambda x, t, cond: [change(features(x, t, cond)[0])]), model, pictures())
    assert caught.value.fault == "features"


def flat(function):
    return lambda f, g: function(f - g).flatten(1).mean(1)


@pytest.mark.parametrize(
    ("distance", "words"),
    [
        (flat(lambda d: d.square() * 1e300 * 1e300), "^the loss is NaN or infinite"),
        (flat(lambda d: d.square() + (d * 0).sqrt()), "the gradient of the loss is NaN"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_is_named(distance, words):
    model = ConvNet()
    with pytest.raises(SetupError, match=words) as caught:
        check(wrap(model, distance=distance), model, pictures())
    assert caught.value.fault == "loss"


def test_a_gradient_of_a_weight_that_is_not_finite_is_named():
    class Rooted(ConvNet):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(()))

        def forward(self, x, t):
            return super().forward(x, t) + self.gain.sqrt()

    model = Rooted()
    with pytest.raises(SetupError, match="the gradient of a weight is NaN"):
        check(wrap(model), model, pictures())


def test_a_layer_beside_the_path_of_the_sample_is_named():
    class Timed(ConvNet):
        def __init__(self):
            super().__init__()
            self.clock = nn.Linear(1, 1)

        def forward(self, x, t):
            return super().forward(x, self.clock(t.to(x.dtype)[:, None])[:, 0])

    model = Timed()
    assert fault(wrap(model, layers="clock"), model) == "features"


def test_a_channel_that_dwarfs_the_others_is_warned_of():
    model = ConvNet(width=8)
    model.body.weight.data[2] *= 1000
    report = check(wrap(model), model, pictures())
    assert report.features[0].outliers == 1
    assert any("`distance='normalised'`" in text for text in report.warnings)


def test_a_teacher_that_learns_is_named():
    model, net = ConvNet(), ConvNet().eval()
    net.body.weight.grad = torch.ones_like(net.body.weight)
    learning = lambda x, t, cond: [net.body(net.stem(x))]  # noqa: E731
    check(bare(learning), model, pictures())  # its weights are not asked for a gradient
    assert fault(bare(learning, micro_batch=None), model) == "unfrozen"
    assert torch.equal(net.body.weight.grad, torch.ones_like(net.body.weight))
    assert net.stem.weight.grad is None
    weight = nn.Parameter(torch.randn(4, 3, 1, 1))  # held by no module
    assert fault(bare(lambda x, t, cond: [torch.conv2d(x, weight)], micro_batch=None), model) == "unfrozen"


def test_a_teacher_that_is_the_student_is_named():
    model = ConvNet()
    assert fault(bare(lambda x, t, cond: [model.body(model.stem(x))]), model) == "shared"
    twin = ConvNet()
    twin.body.weight = nn.Parameter(model.body.weight.data, requires_grad=False)  # the same memory
    assert fault(bare(lambda x, t, cond: [twin.body(twin.stem(x))]), model) == "shared"


@pytest.mark.parametrize("options", [{"norm": True}, {"dropout": 0.2}])
def test_a_teacher_in_train_mode_is_named(options):
    model = ConvNet(**options)
    objective = wrap(model)
    check(objective, model, pictures())
    objective.teacher.module.train()
    before = copy.deepcopy(objective.teacher.module.state_dict())
    assert fault(objective, model) == "training"
    after = objective.teacher.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # the running statistics too


def test_a_teacher_that_draws_at_random_is_named():
    model, features = ConvNet(), body(ConvNet())
    noisy = bare(lambda x, t, cond: [nn.functional.dropout(features(x, t, cond)[0], 0.1)])
    assert fault(noisy, model) == "random"


def test_a_teacher_whose_weights_follow_the_student_is_named():
    model, net = ConvNet(), ConvNet().eval().requires_grad_(False)

    def average(x, t, cond):
        with torch.no_grad():
            for mine, other in zip(net.parameters(), model.parameters(), strict=True):
                mine.lerp_(other, 0.1)
        return [net.body(net.stem(x))]

    assert fault(bare(average), model) == "moving"


class Swapped:
    """Puts other weights into the student for the time of the teacher's pass, as EMA recipes do."""

    def __init__(self, model):
        self.model = model
        self.other = [torch.randn_like(p) * 0.2 for p in model.parameters()]

    def swap(self):
        for p, other in zip(self.model.parameters(), self.other, strict=True):
            mine = p.data.clone()
            p.data.copy_(other)
            other.copy_(mine)

    def __call__(self, x, t, cond):
        self.swap()
        try:
            return [self.model.body(torch.tanh(self.model.stem(x)))]
        finally:
            self.swap()


def test_weights_swapped_in_and_out_are_named():
    model = ConvNet()
    before = [p.clone() for p in model.parameters()]
    assert fault(bare(Swapped(model)), model) in ("shared", "moving")
    model.stem.requires_grad_(False)
    model.body.requires_grad_(False)  # then none of the teacher's weights is trained
    assert fault(bare(Swapped(model)), model) == "moving"
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_copy_that_needs_what_it_has_dropped_is_named():
    class Conditional(ConvNet):
        def __init__(self):
            super().__init__()
            self.text = nn.Linear(2, 6)

        def forward(self, x, t, text=None):
            hidden = self.stem(x) + t.to(x.dtype).view(-1, 1, 1, 1)
            hidden = hidden if text is None else hidden + self.text(text)[:, :, None, None]
            return self.head(torch.tanh(self.body(torch.tanh(hidden))))

    model, text = Conditional(), {"text": torch.randn(4, 2)}
    objective = wrap(model)
    check(objective, model, pictures())  # drops nothing for good
    check(objective, model, pictures(), cond=text)
    objective(model, pictures())
    assert fault(objective, model, cond=text) == "truncated"
    check(objective, model, pictures())


def test_a_teacher_that_cannot_run_is_named():
    model = ConvNet()
    objective = wrap(model)
    objective.to("meta")
    assert fault(objective, model) == "teacher"


# --- gradients that are wrong beside a loss that is right ---


class Int8(nn.Conv2d):
    """Weights and activations rounded to 8 bits in each pass: the gradient goes through the scale alone."""

    activations = True

    def forward(self, x):
        scale = self.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
        weight = (self.weight / scale).round().to(torch.int8) * scale
        if not self.activations:
            return nn.functional.conv2d(x, weight, self.bias, padding=1)
        size = x.abs().amax((1, 2, 3), keepdim=True) / 127
        return nn.functional.conv2d((x / size).round().to(torch.int8) * size, weight, self.bias, padding=1)


@pytest.mark.parametrize("activations", [True, False])
def test_a_teacher_with_quantised_activations_is_named_and_one_with_quantised_weights_is_not(activations):
    model, net = ConvNet(), ConvNet(width=16)
    for name, inputs, outputs in (("stem", 3, 16), ("body", 16, 16)):
        layer = Int8(inputs, outputs, 3, padding=1)
        layer.activations = activations
        setattr(net, name, layer)
    objective = bare(body(net))
    if activations:
        assert fault(objective, model) == "gradient"
    else:
        check(objective, model, pictures())


def test_a_wrong_gradient_in_half_precision_is_warned_of():
    model, features = ConvNet().bfloat16(), body(ConvNet().bfloat16())
    half = bare(lambda x, t, cond: features(x * 0.5 + (x * 0.5).detach(), t, cond))
    report = check(half, model, pictures().bfloat16())
    (text,) = (text for text in report.warnings if "too rough" in text)
    assert 40 < int(re.search(r"differs by (\d+)%", text)[1]) < 60


@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_a_gradient_of_the_wrong_size_or_with_a_part_missing_is_named(keep):
    model, features = ConvNet(), body(ConvNet())
    smaller = bare(lambda x, t, cond: features(x * keep + (x * (1 - keep)).detach(), t, cond))
    half = bare(lambda x, t, cond: features(torch.cat([x[:, :1], x[:, 1:].detach()], 1), t, cond))
    if keep == 0.5:
        assert fault(smaller, model) == "gradient"
        assert fault(half, model) == "gradient"
    else:  # within what is tolerated of a coarse measurement
        check(smaller, model, pictures())


def test_a_gradient_that_is_right_along_the_error_alone_is_named():
    """What is added to it is at right angles to the error of the prediction."""
    model, features, true = ConvNet(), body(ConvNet()), []

    class Astray(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            error = (ctx.saved_tensors[0] - true[0]).flatten(1)
            other = torch.randn_like(error)
            other -= (other * error).sum(1, keepdim=True) / error.square().sum(1, keepdim=True) * error
            return grad + (other * grad.norm() / other.norm()).view_as(grad)

    def teacher(x, t, cond):
        true.append(x.detach().clone())  # the first is the true pair
        return features(Astray.apply(x), t, cond)

    assert fault(bare(teacher), model) == "gradient"


class LoRA(nn.Module):
    """A frozen convolution with two adapters, of which one or none is active."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv.requires_grad_(False)
        make = lambda: nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False)  # noqa: E731
        self.adapters = nn.ModuleDict({"student": make(), "teacher": make()})
        self.active = "student"

    def forward(self, x):
        return self.conv(x) + (self.adapters[self.active](x) if self.active else 0)


class LoRANet(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.enter = nn.Conv2d(3, 3, 1)  # so that a reentrant checkpoint gets an input that requires grad
        self.stem = LoRA(nn.Conv2d(3, 8, 3, padding=1))
        self.body = LoRA(nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Conv2d(8, 3, 3, padding=1).requires_grad_(False)
        self.reentrant = reentrant

    def hidden(self, x):
        def run(x):
            return torch.tanh(self.body(torch.tanh(self.stem(x))))

        x = self.enter(x)
        if self.reentrant is None:
            return run(x)
        return checkpoint(run, x, use_reentrant=self.reentrant)

    def forward(self, x, t):
        return self.head(self.hidden(x))

    @contextmanager
    def adapter(self, name):
        layers = [m for m in self.modules() if isinstance(m, LoRA)]
        before = [m.active for m in layers]
        for m in layers:
            m.active = name
        try:
            yield
        finally:
            for m, active in zip(layers, before, strict=True):
                m.active = active

    def teacher(self, name):
        """The features under another adapter, or under none."""

        def features(x, t, cond):
            with self.adapter(name):
                return [self.hidden(x)]

        return features


def lora(reentrant, train):
    """A student that trains some adapters; `enter` is frozen, so a frozen part of the input has to require grad."""
    model = LoRANet(reentrant).requires_grad_(False)
    for layer in (model.stem, model.body):
        for name in train:
            layer.adapters[name].requires_grad_(True)
    return model


def with_grad(model, x_t, t, cond):
    return model(x_t.requires_grad_(), t)


RECOMPUTED = {None: "gradient", "auto": "gradient"}
AT_THE_TRUE_PAIR = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")


@AT_THE_TRUE_PAIR
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_adapters_switched_off_for_the_teacher_are_named_under_checkpointing_alone(reentrant, dtype):
    model = lora(reentrant, ["student"]).to(dtype)
    for micro_batch, name in RECOMPUTED.items():
        objective = bare(model.teacher(None), call=with_grad, micro_batch=micro_batch)
        if reentrant is None:
            check(objective, model, pictures().to(dtype))
        else:
            expected = name if reentrant else "gradient"  # otherwise the recomputation itself is refused
            assert fault(objective, model, pictures().to(dtype)) == expected


def test_a_teacher_that_leaves_the_students_adapters_switched_is_named():
    model = lora(None, ["student"])

    def features(x, t, cond):
        model.stem.active = model.body.active = None
        return [model.hidden(x)]

    with pytest.raises(SetupError, match="gives another output after the teacher's pass"):
        check(bare(features), model, pictures())


@AT_THE_TRUE_PAIR
@pytest.mark.parametrize("reentrant", [None, True])
def test_a_second_adapter_as_teacher_is_named_under_reentrant_checkpointing_alone(reentrant):
    model = lora(reentrant, ["student"])
    for micro_batch, name in RECOMPUTED.items():
        objective = bare(model.teacher("teacher"), call=with_grad, micro_batch=micro_batch)
        if reentrant is None:
            check(objective, model, pictures())
        else:
            assert fault(objective, model) == name


@AT_THE_TRUE_PAIR
@pytest.mark.parametrize("reentrant", [None, True])
def test_an_adapter_set_until_the_next_step_is_named_under_reentrant_checkpointing_alone(reentrant):
    model = lora(reentrant, ["student"])

    def activate(name):
        model.stem.active = model.body.active = name

    def features(x, t, cond):
        activate("teacher")
        return [model.hidden(x)]

    def call(model, x_t, t, cond):
        activate("student")
        return with_grad(model, x_t, t, cond)

    objective = bare(features, call=call)
    if reentrant is None:
        check(objective, model, pictures())
        return
    with pytest.raises(SetupError, match="changes the gradient of `model` and not its output"):
        check(objective, model, pictures())


# --- everything stays as it was ---


class Everything(ConvNet):
    """Dropout, batch norm, and weights that its own forward normalises in train mode."""

    def __init__(self):
        super().__init__(norm=True, dropout=0.3)

    def forward(self, x, t):
        if self.training:
            with torch.no_grad():
                self.head.weight /= self.head.weight.norm()
        random.random()
        return super().forward(x, t) + 0.01 * torch.rand(())


@pytest.mark.parametrize("right", [True, False])
def test_everything_is_left_as_it_was(right):
    model = Everything()
    model.body.weight.grad = torch.ones_like(model.body.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ran = []
    for parameter in model.parameters():  # an optimizer in the backward
        parameter.register_post_accumulate_grad_hook(lambda p: ran.append(p) or optimizer.step())
    model.dropout.eval()
    objective = wrap(model, seed=7)
    objective(model, pictures())
    if not right:
        objective.teacher.module.train()
    state = [v.clone() for v in model.state_dict().values()]
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    grad_ids = {n: id(p.grad) for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    taught = [v.clone() for v in objective.teacher.module.state_dict().values()]
    streams = torch.get_rng_state(), objective.rng_state(), random.getstate()
    terms, hooks = objective.terms, [dict(m._forward_pre_hooks) for m in model.modules()]
    clean, ran[:] = pictures(), []
    if right:
        check(objective, model, clean)
    else:
        fault(objective, model, clean)
    assert not ran
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state, strict=True))
    for name, parameter in model.named_parameters():
        assert id(parameter.grad) == grad_ids[name]
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name])
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(a, b) for a, b in zip(objective.teacher.module.state_dict().values(), taught, strict=True))
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert torch.equal(objective.rng_state(), streams[1])
    assert random.getstate() == streams[2]
    assert objective.terms is terms
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert torch.equal(clean, pictures())
    model.head.bias.sum().backward()
    assert ran  # the optimizer in the backward is awake again


def test_a_check_changes_nothing_of_the_training_that_follows():
    losses = []
    for checked in (False, True):
        torch.manual_seed(0)
        model = ConvNet(dropout=0.2)
        objective = wrap(model, seed=1)
        if checked:
            check(objective, model, pictures())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = objective(model, pictures())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]


def test_what_the_model_does_to_its_condition_stays_in_the_check():
    class Greedy(ConvNet):
        def forward(self, x, t, shift):
            with torch.no_grad():
                shift.add_(1)
            return super().forward(x, t + shift)

    model, cond = Greedy(), {"shift": torch.zeros(4)}
    check(bare(body(ConvNet())), model, pictures(), cond=cond)
    assert not cond["shift"].any()


def test_a_generator_given_draws_other_batches_and_none_given_the_same():
    model = ConvNet()
    objective = wrap(model)
    assert check(objective, model, pictures()).loss == check(objective, model, pictures()).loss
    generator = torch.Generator().manual_seed(1)
    drawn = {check(objective, model, pictures(), generator=generator).loss for _ in range(2)}
    assert len(drawn) == 2


def test_a_check_runs_inside_no_grad_too():
    model = ConvNet()
    with torch.no_grad():
        first = check(wrap(model), model, pictures())
    assert first == check(wrap(model), model, pictures())


# --- what a trained student knows ---


ANY = [parameterizations.get(name) for name in ("epsilon", "sample", "v_prediction", "flow_prediction")]


@pytest.mark.parametrize("prediction", [*ANY, -ANY[3], parameterizations.edm()], ids=lambda p: p.name)
def test_skill_is_1_for_a_perfect_prediction_and_0_for_a_multiple_of_x_t(prediction):
    schedule = schedules.EDM() if prediction.name == "edm" else schedules.Linear()
    clean, noise, t = 0.3 * pictures() + 0.2, torch.randn(4, 3, 8, 8), torch.tensor([0.1, 0.3, 0.6, 0.9])
    alpha, sigma = (s.view(-1, 1, 1, 1) for s in schedule(t))
    a, b = (s.view(-1, 1, 1, 1) for s in prediction.row(schedule, t))
    x_t = alpha * clean + sigma * noise
    clean_hat = x_t * ((clean * x_t).sum((1, 2, 3), keepdim=True) / x_t.square().sum((1, 2, 3), keepdim=True))
    given = {"schedule": schedule, "prediction": prediction}
    perfect, _ = skills(a * clean + b * noise, clean, noise, t, **given)
    torch.testing.assert_close(perfect, torch.ones(4).double())
    blind, _ = skills(a * clean_hat + b * (x_t - alpha * clean_hat) / sigma, clean, noise, t, **given)
    torch.testing.assert_close(blind, torch.zeros(4).double(), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def base():
    split = datasets.load("emoji")
    model, scheduler = demo.load_base(len(split.train.classes))
    return model.train(), scheduler, split.train


def emoji(data, batch, seed):
    index = torch.randint(len(data), (batch,), generator=torch.Generator().manual_seed(seed))
    return datasets.to_model(data.images[index]), {"class_labels": data.labels[index]}


def checked(base, batch, seed, schedule=None, call=None, **options):
    model, scheduler, data = base
    if call is not None:
        options["call"] = lambda model, x_t, t, cond: model(x_t, call(t), **cond)
    objective = PaperObjective.wrap(model, schedule or scheduler, layers="mid_block", **options)
    clean, cond = emoji(data, batch, seed)
    return check(objective, model, clean, cond=cond, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("batch", "seed"), [(1, 0), (1, 1), (1, 2), (2, 3), (2, 4), (8, 5), (8, 6)])
def test_the_trained_base_passes_without_a_warning(base, batch, seed):
    report = checked(base, batch, seed)
    assert not report.warnings
    assert report.explained > 0.5
    assert report.skill > 0.5


WRONG_PREDICTIONS = {
    "negative": {"prediction": -parameterizations.get("v_prediction")},
    "epsilon": {"prediction": "epsilon", "t_range": (1, 998)},
    "sample": {"prediction": "sample", "t_range": (1, 998)},
    "negative epsilon": {"prediction": -parameterizations.get("epsilon"), "t_range": (1, 998)},
    "edm": {"schedule": schedules.EDM(), "prediction": parameterizations.edm(), "call": lambda t: t},
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", WRONG_PREDICTIONS)
def test_a_wrong_prediction_is_named_with_the_right_one(base, kind, seed):
    with pytest.raises(SetupError, match=r"Pass `prediction='v_prediction'`") as caught:
        checked(base, 8, seed, **WRONG_PREDICTIONS[kind])
    assert caught.value.fault == "prediction"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_wrong_sign_is_named_on_a_single_sample(base, seed):
    with pytest.raises(SetupError, match=r"`prediction` is '-v_prediction', but"):
        checked(base, 1, seed, prediction=-parameterizations.get("v_prediction"))


CIRCLE = lambda t: torch.sin(t * math.pi / 2)  # noqa: E731
TURNED = schedules.Interpolant(CIRCLE, lambda t: CIRCLE(1 - t))  # t = 1 is the data
WRONG_UNITS = {
    "t * 1000": {"call": lambda t: t / 1000},
    "t / 1000": {"call": lambda t: t * 1000},
    "999 - t": {"call": lambda t: 999 - t},
    "(999 - t) / 1000": {"call": lambda t: 999 - t * 1000},
    "(1 - t) * 1000": {"call": lambda t: t, "schedule": TURNED, "prediction": "v_prediction"},
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("formula", WRONG_UNITS)
def test_times_in_a_wrong_unit_are_named_with_the_right_one(base, formula, seed):
    with pytest.raises(SetupError, match=re.escape(f"with `{formula}` in the place of t it explains")) as caught:
        checked(base, 8, seed, **WRONG_UNITS[formula])
    assert caught.value.fault == "time"


WRONG_SCHEDULES = {
    "cosine table": {"schedule": schedules.Discrete.cosine(), "prediction": "v_prediction", "call": lambda t: t},
    "cosine": {"schedule": schedules.Cosine(), "prediction": "v_prediction", "call": lambda t: t * 1000},
    "linear path": {"schedule": schedules.Linear(), "prediction": "v_prediction", "call": lambda t: t * 1000},
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", WRONG_SCHEDULES)
def test_a_schedule_of_another_shape_is_named(base, kind, seed):
    with pytest.raises(SetupError, match="was trained on another schedule") as caught:
        checked(base, 8, seed, **WRONG_SCHEDULES[kind])
    assert caught.value.fault == "schedule"


def test_a_schedule_without_the_terminal_fix_is_not_told_from_the_one_with_it(base):
    right = PaperObjective.wrap(base[0], base[1]).schedule
    without = schedules.Discrete.scaled_linear()
    assert float(right.alpha_bar[-1]) == 0 < float(without.alpha_bar[-1])
    report = checked(base, 8, 0, schedule=without, prediction="v_prediction", call=lambda t: t)
    assert not report.warnings


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("seed", range(6))
def test_a_new_model_on_pictures_is_no_error_whatever_it_is_said_to_predict(base, prediction, seed):
    torch.manual_seed(seed)
    data = base[2]
    clean, cond = emoji(data, 4, seed)
    model = (
        unet(in_channels=12, out_channels=12, sample_size=16, num_class_embeds=10) if seed % 2 else ConvNet(channels=12)
    )
    layer = "mid_block" if seed % 2 else "body"
    call = None if seed % 2 else thousandths
    schedule = schedules.Discrete.scaled_linear()
    objective = PaperObjective.wrap(model, schedule, prediction=prediction, layers=layer, call=call)
    check(objective, model, clean, cond=cond if seed % 2 else None, generator=torch.Generator().manual_seed(seed))


def test_of_a_few_numbers_nothing_is_read():
    for seed in range(40):
        torch.manual_seed(seed)
        model = MLP()
        for parameter in model.parameters():
            parameter.data.mul_(3)
        check(wrap(model, layers="middle"), model, torch.randn(1, 5), generator=torch.Generator().manual_seed(seed))


def test_a_model_with_a_learned_variance_passes():
    model = dit()
    objective = PaperObjective.wrap(model, schedules.Discrete.linear(), prediction="epsilon")
    check(objective, model, torch.randn(2, 4, 8, 8), cond={"class_labels": torch.tensor([0, 1])})


# --- no false alarm on any denoiser of diffusers ---


def one_time(schedule, like, *, t, generator):
    return schedule.at(torch.rand(1, generator=generator)).expand(len(like))


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in ROWS if name not in NO_CPU_BACKWARD])
def test_no_denoiser_of_the_zoo_is_refused(name):
    model, tiny = build(name)
    options = {"prediction": tiny.prediction} if isinstance(adapters.find(model).prediction, tuple) else {}
    if tiny.prediction == "sample" and tiny.t.is_floating_point():
        options["t_range"] = (1, 1000)
    if len(tiny.t.unique()) == 1:  # the class has one time for the whole batch
        options |= {"t": one_time, "t_prime": one_time}
    objective = PaperObjective.wrap(model, tiny.scheduler(), **options)
    report = check(objective, model, tiny.clean, cond=tiny.cond)
    assert report.loss > 0
