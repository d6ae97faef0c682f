"""Mixed precision with a gradient scaler, and channels_last: gradients as without, and formats kept."""

import copy

import pytest
import torch
from models import TOLERANCE, ConvNet, conditional_unet, distance
from paper import PaperObjective

from perceptual_diffusion import schedules
from perceptual_diffusion.teachers import ModuleTeacher

# torch hides this warning, of an input that is no leaf, but not from pytest
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

TEXT = {"encoder_hidden_states": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))}
T, T_PRIME = torch.tensor([200, 700]), torch.tensor([600, 100])


def call(model, x, t, cond):
    return model(x, timestep=t, **cond).sample


def setup(student=None, **options):
    torch.manual_seed(0)
    student = conditional_unet().eval() if student is None else student
    objective = PaperObjective.wrap(
        student, schedules.Discrete.scaled_linear(), prediction="v_prediction", layers=["mid_block"], call=call, **options
    )  # fmt: skip
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    return student, objective


def batch(seed=0):
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return clean, noise


def loss_of(objective, student, clean, noise):
    return objective(student, clean, noise=noise, t=T, t_prime=T_PRIME, cond=TEXT)


def gradient(student, objective, *, autocast=None, scale=1.0, seed=0):
    student.zero_grad()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss = loss_of(objective, student, *batch(seed))
    (loss * scale).backward()
    return torch.cat([p.grad.flatten().float() / scale for p in student.parameters() if p.grad is not None])


# --- autocast and the scaler ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher_dtype", [None, "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scaled_gradient_under_autocast_is_close_to_that_of_float32(dtype, teacher_dtype):
    expected = gradient(*setup())
    found = gradient(*setup(teacher_dtype=dtype if teacher_dtype else None), autocast=dtype, scale=2.0**10)
    assert found.norm() > 0
    assert distance(found, expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("micro_batch", [None, "auto", 1])
def test_weights_that_the_teacher_holds_too_keep_their_gradients_in_the_same_autocast_block(micro_batch):
    """Before torch 2.11 autocast hands a pass with gradient the casts that a pass without one has made."""
    torch.manual_seed(0)
    shared = torch.nn.Conv2d(4, 4, 3, padding=1)
    objective = PaperObjective.wrap(
        shared, schedules.Discrete.scaled_linear(), prediction="v_prediction", call=lambda m, x, t, cond: m(x),
        teacher=lambda x, t, cond: [shared(x)], micro_batch=micro_batch,
    )  # fmt: skip
    clean, noise = batch()
    for _ in range(2):  # in its first step the objective looks around
        shared.zero_grad()
        prediction = torch.randn(clean.shape, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            objective.loss(prediction, clean=clean, noise=noise, t=T, t_prime=T_PRIME)
            output = shared(clean)
        output.float().square().mean().backward()
        assert shared.weight.grad is not None
        assert shared.weight.grad.abs().sum() > 0
        assert torch.is_autocast_cache_enabled()


def test_a_compiled_teacher_under_autocast_gives_the_eager_gradient():
    pairs = [setup(), setup(compile={"backend": "aot_eager"})]
    for seed in range(2):
        eager, compiled = (gradient(*pair, autocast=torch.bfloat16, seed=seed) for pair in pairs)
        assert distance(compiled, eager) < TOLERANCE[torch.bfloat16]


def test_the_scaler_steps_on_finite_gradients_and_skips_infinite_ones():
    student, objective = setup()
    plain, reference = setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (student, plain)]

    def step(spoil=False):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(objective, student, *batch())
        scaler.scale(loss * float("inf") if spoil else loss).backward()
        scaler.step(optimizers[0])
        scaler.update()

    before = copy.deepcopy(student.state_dict())
    step()
    gradient(plain, reference)
    optimizers[1].step()
    moved = {name: value - before[name] for name, value in student.state_dict().items()}
    expected = {name: value - before[name] for name, value in plain.state_dict().items()}
    flat = [torch.cat([value.flatten() for value in values.values()]) for values in (moved, expected)]
    assert distance(*flat) < 2 * TOLERANCE[torch.bfloat16]
    before = copy.deepcopy(student.state_dict())
    step(spoil=True)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert scaler.get_scale() == 2.0**7
    step()
    assert not all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


# --- channels_last ----------------------------------------------------------------------------------------------------

LAST = torch.channels_last


def in_last(model):
    """Whether every convolution over more than one place has its weights in channels_last, and one has."""
    weights = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return bool(weights) and all(p.is_contiguous(memory_format=LAST) and not p.is_contiguous() for p in weights)


@pytest.mark.parametrize("compile", [False, {"backend": "aot_eager"}], ids=["eager", "compiled"])
def test_channels_last_is_kept_and_the_gradient_is_that_of_contiguous_tensors(compile):
    torch.manual_seed(0)
    model = ConvNet(channels=4)
    students, gradients, seen = [copy.deepcopy(model), copy.deepcopy(model).to(memory_format=LAST)], [], []

    def watched(model, x, t, cond):
        seen.append(x)
        return model(x, t / 1000)

    for student in students:
        objective = PaperObjective.wrap(
            student, schedules.Discrete.scaled_linear(), prediction="v_prediction", layers=["body"], call=watched,
            compile=compile,
        )  # fmt: skip
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.1)
        last = student is students[1]
        for seed in range(2):
            clean, noise = (x.to(memory_format=LAST if last else torch.contiguous_format) for x in batch(seed))
            seen.clear()
            student.zero_grad()
            objective(student, clean, noise=noise, t=T, t_prime=T_PRIME).backward()
        # the last step: in the first, the teacher disturbs the sample to find its part of the layer
        assert len(seen) == 3
        assert all(x.is_contiguous(memory_format=LAST) is last for x in seen)
        assert in_last(student) is in_last(objective.teacher.module) is last
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert distance(*gradients) < TOLERANCE[torch.float32]


def test_features_of_a_channels_last_model_are_those_of_a_contiguous_one():
    torch.manual_seed(0)
    model, (x, _) = conditional_unet().eval(), batch()
    features = [
        ModuleTeacher(copy.deepcopy(model).to(memory_format=form), layers=["mid_block"], call=call)(
            x.to(memory_format=form), T, TEXT
        )[0]
        for form in (torch.contiguous_format, LAST)
    ]
    assert distance(*features) < TOLERANCE[torch.float32]
