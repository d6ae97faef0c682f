"""EDM denoisers D(x, sigma): known by their structure, wrapped in one line, equal to Algorithm 1, in full precision."""

import hashlib
import types

import pytest
import torch
from algorithm1 import algorithm1, freeze
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from edm_models import (
    Denoiser,
    EDM2Precond,
    EDMPrecond,
    EpsDenoiser,
    IDDPMPrecond,
    InnerModel,
    VEPrecond,
    VPPrecond,
    over,
)
from models import distance
from paper import PaperObjective
from torch import nn

from perceptual_diffusion import parameterizations, schedules
from perceptual_diffusion.adapters import edm, find
from perceptual_diffusion.teachers import ModuleTeacher
from perceptual_diffusion.timesteps import Uniform

CLOSE = 1e-4
"""Relative error allowed in float32."""
SIGMA, SIGMA_PRIME = torch.tensor([0.05, 0.8, 6.0]), torch.tensor([1.5, 0.3, 20.0])
ONE_HOT = {"class_labels": torch.eye(4)[[0, 2, 3]]}
AUGMENT = {"augment_labels": torch.randn(3, 9, generator=torch.Generator().manual_seed(3))}
CLASS = {"class_cond": torch.tensor([1, 5, 9])}
IN_DEC, IN_UNET, LAST_DOWN = "model.dec.4x4_in1", "unet.dec.4x4_in1", "inner_model.u_net.d_blocks.2"
DENOISERS = {
    "EDM": (lambda: EDMPrecond(), {}, IN_DEC),
    "EDM, labels": (lambda: EDMPrecond(label_dim=4), ONE_HOT, IN_DEC),
    "EDM, labels left out": (lambda: EDMPrecond(label_dim=4), {}, IN_DEC),
    "EDM, labels and augmentation": (lambda: EDMPrecond(label_dim=4, augment_dim=9), ONE_HOT | AUGMENT, IN_DEC),
    "VP": (lambda: VPPrecond(augment_dim=9), AUGMENT, IN_DEC),
    "VE": (lambda: VEPrecond(), {}, IN_DEC),
    "iDDPM": (lambda: IDDPMPrecond(label_dim=4), ONE_HOT, IN_DEC),
    "EDM2": (lambda: EDM2Precond(label_dim=4), ONE_HOT, IN_UNET),
    "EDM2 with its uncertainty": (lambda: EDM2Precond(), {"return_logvar": True}, IN_UNET),
    "k-diffusion": (lambda: Denoiser(InnerModel(), sigma_data=0.7), CLASS, LAST_DOWN),
    "k-diffusion, a model of noise": (
        lambda: EpsDenoiser(InnerModel(), torch.linspace(0.999, 0.01, 100)),
        CLASS,
        LAST_DOWN,
    ),
}
denoisers = pytest.mark.parametrize(("make", "cond", "layer"), DENOISERS.values(), ids=DENOISERS)


def gradients(loss, *inputs):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, inputs, allow_unused=True) if g is not None])


def run(model, x, sigma, cond):
    output = model(x, sigma, **cond)
    return output[0] if isinstance(output, tuple) else output


def moved(model):
    """The model after some training, so that it is no longer its own teacher."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    return model


@denoisers
@pytest.mark.parametrize("formulation", ["joint", "split"])
def test_a_denoiser_wraps_in_one_line_and_equals_algorithm_1(make, cond, layer, formulation):
    student = make().eval()
    frozen = freeze(student)
    objective = PaperObjective.wrap(student, schedules.EDM(), formulation=formulation)
    moved(student)
    clean, noise = torch.randn(2, 3, 3, 8, 8)
    loss = objective(student, clean, noise=noise, t=SIGMA, t_prime=SIGMA_PRIME, cond=cond, reduction="none")
    prediction = run(student, clean + over(SIGMA) * noise, SIGMA, cond)
    expected = algorithm1(
        frozen, [layer], run, cond, clean=clean, noise=noise, model_output=prediction, t_prime=SIGMA_PRIME,
        at_t=(torch.ones(3), SIGMA), at_t_prime=(torch.ones(3), SIGMA_PRIME), kind="sample", formulation=formulation,
    )  # fmt: skip
    assert distance(loss, expected) < CLOSE
    weights = list(student.parameters())
    assert distance(gradients(loss.sum(), *weights), gradients(expected.sum(), *weights)) < CLOSE


@denoisers
def test_the_gradient_to_a_prediction_made_by_the_loop_equals_algorithm_1(make, cond, layer):
    student = make().eval()
    objective = PaperObjective.wrap(student, schedules.EDM(), truncate=False)
    clean, noise, prediction = torch.randn(3, 3, 3, 8, 8)
    prediction.requires_grad_()
    loss = objective.loss(prediction, clean=clean, noise=noise, t=SIGMA, t_prime=SIGMA_PRIME, cond=cond)
    expected = algorithm1(
        freeze(student), [layer], run, cond, clean=clean, noise=noise, model_output=prediction, t_prime=SIGMA_PRIME,
        at_t=(torch.ones(3), SIGMA), at_t_prime=(torch.ones(3), SIGMA_PRIME), kind="sample",
    ).mean()  # fmt: skip
    assert distance(gradients(loss, prediction), gradients(expected, prediction)) < CLOSE


# --- what is found ----------------------------------------------------------------------------------------------------


@denoisers
def test_a_denoiser_is_found_with_its_middle(make, cond, layer):
    adapter = find(make())
    assert (adapter.family, adapter.layers, adapter.prediction, adapter.time) == ("EDM", (layer,), "sample", "sigma")
    assert adapter.sure


def test_a_denoiser_is_found_inside_a_wrapper():
    assert find(torch.compile(EDMPrecond(), backend="eager")).family == "EDM"


def test_a_class_of_a_module_without_a_file_is_known_by_its_structure():
    """As classes are that were unpickled with their source."""
    source = "class Net(Parent):\n    def forward(self, x, sigma, class_labels=None, **kwargs):\n        return super().forward(x, sigma)"
    module = types.ModuleType("_imported_module_1f2e")
    module.Parent = VPPrecond
    exec(source, vars(module))
    net = module.Net()
    assert type(net).__module__ == "_imported_module_1f2e"
    objective = PaperObjective.wrap(net, schedules.EDM())
    assert objective.prediction == parameterizations.SAMPLE
    assert objective(net, torch.randn(2, 3, 8, 8)).requires_grad


class Plain(nn.Module):
    """A preconditioning as people write it themselves."""

    def __init__(self, net, sigma_data):
        super().__init__()
        self.net, self.sigma_data = net, sigma_data

    def scales(self, sigma):
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt()

    def forward(self, x, sigmas, y):
        skip, out, scale = self.scales(over(sigmas))
        return skip * x + out * self.net(scale * x, sigmas, class_cond=y)


def test_a_preconditioning_of_your_own_is_known_by_its_use_of_sigma_data():
    assert find(Plain(InnerModel(), 0.5)).family == "EDM"


NO_DENOISERS = {
    "the network inside a denoiser, which holds a sigma_data": lambda: InnerModel(),
    "an EDM network without its preconditioning": lambda: EDMPrecond().model,
    "a module of one layer": lambda: nn.Conv2d(3, 3, 3),
}


@pytest.mark.parametrize("make", NO_DENOISERS.values(), ids=NO_DENOISERS)
def test_what_gives_no_clean_sample_is_not_taken_for_a_denoiser(make):
    assert edm.conventions(make()) is None


def test_the_network_inside_a_denoiser_needs_its_prediction_said():
    with pytest.raises(ValueError, match="`prediction` is missing"):
        PaperObjective.wrap(InnerModel(), schedules.EDM())


def test_a_network_in_a_preconditioning_outside_of_it_equals_the_denoiser():
    inner = InnerModel()
    whole = Denoiser(inner, sigma_data=0.7)

    def call(model, x, sigma, cond):
        return model(x / over((sigma**2 + 0.7**2).sqrt()), sigma, **cond)

    batch = {"noise": torch.randn(3, 3, 8, 8), "t": SIGMA, "t_prime": SIGMA_PRIME, "cond": CLASS}
    clean = torch.randn(3, 3, 8, 8)
    bare = PaperObjective.wrap(inner, schedules.EDM(), prediction=parameterizations.edm(0.7), call=call)
    objective = PaperObjective.wrap(whole, schedules.EDM())
    moved(whole)
    one, other = bare(inner, clean, **batch), objective(whole, clean, **batch)
    weights = list(inner.parameters())
    assert distance(one, other) < CLOSE
    assert distance(gradients(one, *weights), gradients(other, *weights)) < CLOSE


class SuperResolution(EDMPrecond):
    """Its second argument is another picture, sigma is the third."""

    def __init__(self):
        super().__init__(channels=6)

    def forward(self, x, small, sigma, **kwargs):
        return super().forward(torch.cat([x, small], 1), sigma, **kwargs)[:, :3]


def test_sigma_is_passed_by_its_name_where_it_is_not_the_second_argument():
    student, small = SuperResolution().eval(), torch.randn(3, 3, 8, 8)
    objective = PaperObjective.wrap(student, schedules.EDM())
    clean, noise, prediction = torch.randn(3, 3, 3, 8, 8)
    loss = objective.loss(prediction, clean=clean, noise=noise, t=SIGMA, t_prime=SIGMA_PRIME, cond={"small": small})
    expected = algorithm1(
        freeze(student), [IN_DEC], lambda m, x, s, cond: m(x, small, s), {}, clean=clean, noise=noise,
        model_output=prediction, t_prime=SIGMA_PRIME, at_t=(torch.ones(3), SIGMA),
        at_t_prime=(torch.ones(3), SIGMA_PRIME), kind="sample",
    ).mean()  # fmt: skip
    assert distance(loss, expected) < CLOSE


def preconditioned(model, x, scales, cond):
    """D of clean + sigma noise, for a sample alpha clean + sigma noise."""
    alpha, sigma = (scale.float() for scale in scales)
    return model(x / over(alpha), sigma / alpha, **cond)


def table(t):
    bar = DDPMScheduler().alphas_cumprod.double()[t]
    return bar.sqrt(), (1 - bar).sqrt()


SCHEDULES = {
    "a table": (DDPMScheduler, table, torch.tensor([20, 400, 900]), torch.tensor([700, 100, 300])),
    "EDM's scheduler": (EDMEulerScheduler, lambda t: (torch.ones(3), t), SIGMA, SIGMA_PRIME),
    "a flow": (
        FlowMatchEulerDiscreteScheduler,
        lambda t: (1 - t / 1000, t / 1000),
        torch.tensor([20.0, 400.0, 900.0]),
        torch.tensor([700.0, 100.0, 300.0]),
    ),
}


@pytest.mark.parametrize(("scheduler", "scales", "t", "t_prime"), SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("layers", [None, [IN_DEC]], ids=["found", "given"])
def test_a_denoiser_is_given_its_own_sample_and_sigma_on_any_schedule(scheduler, scales, t, t_prime, layers):
    student = EDMPrecond().eval()
    t_range = (1, 1000) if scheduler is FlowMatchEulerDiscreteScheduler else None
    objective = PaperObjective.wrap(student, scheduler(), layers=layers, t_range=t_range)
    clean, noise, prediction = torch.randn(3, 3, 3, 8, 8)
    prediction.requires_grad_()
    loss = objective.loss(prediction, clean=clean, noise=noise, t=t, t_prime=t_prime)
    expected = algorithm1(
        freeze(student), [IN_DEC], lambda m, x, s, cond: preconditioned(m, x, scales(s), cond), {}, clean=clean,
        noise=noise, model_output=prediction, t_prime=t_prime, at_t=scales(t), at_t_prime=scales(t_prime), kind="sample",
    ).mean()  # fmt: skip
    assert distance(loss, expected) < CLOSE
    assert distance(gradients(loss, prediction), gradients(expected, prediction)) < CLOSE


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "layer"), [(EDM2Precond, IN_UNET), (EDMPrecond, IN_DEC)])
def test_the_teacher_of_a_half_precision_denoiser_runs_in_float32(cls, layer):
    """In float16, at a batch of 64, the loss is right within 1 %; the gradient of plain autograd is wrong by more than 10 %, the scaled one by some."""
    student = cls(resolution=16, use_fp16=True).eval()
    objective = PaperObjective.wrap(student, schedules.EDM())
    layer = layer.replace("4x4", "8x8")
    clean, noise, prediction = torch.randn(3, 64, 3, 16, 16)
    sigma, sigma_prime = torch.full((64,), 0.8), torch.full((64,), 0.5)
    prediction = (clean + 0.1 * prediction).requires_grad_()
    batch = {"clean": clean, "noise": noise, "t": sigma, "t_prime": sigma_prime}
    loss = objective.loss(prediction, **batch)
    full = freeze(student)
    full.use_fp16 = False
    expected = algorithm1(
        full, [layer], run, {}, clean=clean, noise=noise, model_output=prediction, t_prime=sigma_prime,
        at_t=(torch.ones(64), sigma), at_t_prime=(torch.ones(64), sigma_prime), kind="sample",
    ).mean()  # fmt: skip
    wanted = gradients(expected, prediction)
    assert distance(loss, expected) < CLOSE
    assert distance(gradients(loss, prediction), wanted) < CLOSE

    half = ModuleTeacher(freeze(student), layers=[layer], call=run)
    assert half(clean, sigma_prime, {})[0].dtype == torch.float16
    objective.teacher = half
    rounded = objective.loss(prediction, **batch)
    assert distance(rounded, expected) < 0.01
    assert 0.02 < distance(gradients(rounded, prediction), wanted) < 0.1
    objective.micro_batches = None
    assert distance(gradients(objective.loss(prediction, **batch), prediction), wanted) > 0.1


def test_the_student_keeps_its_own_precision():
    student = EDM2Precond(use_fp16=True)
    PaperObjective.wrap(student, schedules.EDM())
    assert student.use_fp16


def sha(model):
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy(force=True).tobytes())
    return digest.hexdigest()


def test_weights_that_are_normalised_in_train_mode_stay_as_they_are_in_the_teacher():
    student = EDM2Precond().train()
    objective = PaperObjective.wrap(student, schedules.EDM(), truncate=False)
    weights, of_student = sha(objective.teacher.module), sha(student)
    objective(student, torch.randn(2, 3, 8, 8)).backward()
    assert sha(student) != of_student
    assert sha(objective.teacher.module) == weights


# --- sigma ------------------------------------------------------------------------------------------------------------


def test_a_denoiser_with_levels_takes_a_sampler_that_keeps_to_them():
    student = IDDPMPrecond(levels=50)
    seen = []

    def levels(schedule, like, *, t, generator):
        return student.round_sigma(Uniform()(schedule, like, t=t, generator=generator))

    def call(model, x, sigma, cond):
        seen.append(sigma)
        return model(x, sigma)

    schedule = schedules.EDM(sigma_min=student.sigma_min, sigma_max=80)
    objective = PaperObjective.wrap(student, schedule, t=levels, t_prime=levels, call=call)
    objective(student, torch.randn(16, 3, 8, 8)).backward()
    assert len(seen) > 2
    assert all(torch.isin(sigma, student.u).all() for sigma in seen)
