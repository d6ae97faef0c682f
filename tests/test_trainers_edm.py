"""EDM, EDM2 and k-diffusion get Algorithm 1's gradient beside their own, by losses of the form they have."""

import importlib

import pytest
import torch
import trainer_tools
from algorithm1 import freeze
from edm_models import Denoiser, EDM2Precond, EDMPrecond, InnerModel, over
from trainer_tools import same_gradient, sp

plugins, t_primes = trainer_tools.plugins, trainer_tools.t_primes

SIGMA, SIGMA_PRIME = torch.tensor([0.1, 0.6, 2.0, 9.0]), torch.tensor([0.3, 5.0, 1.0, 0.2])


def edm(t):
    return torch.ones_like(t), t


class EDMLoss:
    """Imitates EDMLoss of NVlabs/edm at 0a2ff34 (training/loss.py): how it is called, and what it gives, (B, C, H, W)."""

    def __call__(self, net, images, labels=None, augment_pipe=None):
        sigma = over(SIGMA)
        y, augment_labels = augment_pipe(images) if augment_pipe is not None else (images, None)
        self.clean, self.noise = y, torch.randn_like(y)
        weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        return weight * (net(y + self.noise * sigma, sigma, labels, augment_labels=augment_labels) - y) ** 2


@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "augmented"])
def test_the_loss_of_edm_gets_algorithm_1_spread_over_its_elements(t_primes, augmented):
    t_primes.t_prime = SIGMA_PRIME
    net, own = EDMPrecond(label_dim=4).eval(), EDMLoss()  # no dropout, to be compared
    if augmented:
        net.model.map_augment = torch.nn.Linear(2, 16)
    frozen = freeze(net)
    loss_fn = importlib.import_module("edm_loss").PerceptualEDMLoss(own, net)
    with torch.no_grad():
        net.model.map_layer0.weight.mul_(1.2)
    marks, labels = torch.randn(4, 2), torch.eye(4)
    pipe = {"augment_pipe": lambda images: (images.flip(-1), marks)} if augmented else {}
    loss = loss_fn(net=net, images=torch.randn(4, 3, 8, 8), labels=labels, **pipe)
    cond = {"class_labels": labels} | ({"augment_labels": marks} if augmented else {})
    x_t = own.clean + over(SIGMA) * own.noise
    output = net(x_t, SIGMA, **cond)
    weight = (SIGMA**2 + 0.25) / (SIGMA * 0.5) ** 2
    elementwise = over(weight) * (output - own.clean) ** 2
    perceptual = sp(
        frozen, output, clean=own.clean, noise=own.noise, t=SIGMA, t_prime=SIGMA_PRIME, cond=cond, kind="sample", scales=edm,
        layer="model.dec.4x4_in1",
    )  # fmt: skip
    assert loss.shape == elementwise.shape
    same_gradient(loss.sum(), (elementwise + over(perceptual)).sum(), net.parameters())


class EDM2Loss:
    """Imitates EDM2Loss of NVlabs/edm2 at d8299d3 (training/training_loop.py): no augmentation, and a variance that is learned."""

    def __call__(self, net, images, labels=None):
        self.noise = torch.randn_like(images)
        denoised, logvar = net(images + self.noise * over(SIGMA), over(SIGMA), labels, return_logvar=True)
        return (denoised - images) ** 2 / logvar.exp() + logvar


def test_the_loss_of_edm2_keeps_its_learned_variance_and_gets_algorithm_1(t_primes):
    t_primes.t_prime = SIGMA_PRIME
    net, own, labels, images = EDM2Precond(label_dim=4).eval(), EDM2Loss(), torch.eye(4), torch.randn(4, 3, 8, 8)
    frozen, loss_fn = freeze(net), importlib.import_module("edm_loss").PerceptualEDMLoss(own, net)
    with torch.no_grad():
        net.logvar_linear.weight.mul_(1.5)
    net.requires_grad_(True)
    loss = loss_fn(net, images, labels)
    x_t = images + over(SIGMA) * own.noise
    output, logvar = net(x_t, SIGMA, labels, return_logvar=True)
    (layer,) = loss_fn.objective.teacher.layers
    perceptual = sp(
        frozen, output, clean=images, noise=own.noise, t=SIGMA, t_prime=SIGMA_PRIME, cond={"class_labels": labels}, kind="sample",
        scales=edm, layer=layer,
    )  # fmt: skip
    expected = (output - images) ** 2 / logvar.exp() + logvar + over(perceptual)
    same_gradient(loss.sum(), expected.sum(), net.parameters())


class KDenoiser(Denoiser):
    """Imitates `Denoiser` of k-diffusion 0.1.1 (layers.py): `loss` calls the network inside, not the denoiser."""

    def loss(self, input, noise, sigma, **kwargs):
        skip, out, scale = map(over, self.get_scalings(sigma))
        noised = input + noise * over(sigma)
        error = self.inner_model(noised * scale, sigma, **kwargs) - (input - skip * noised) / out
        return (error**2).flatten(1).mean(1) * (sigma / (sigma**2 + 1)) ** 2


def test_the_loss_of_k_diffusion_gets_algorithm_1_beside_its_own_and_no_pass_more(t_primes):
    t_primes.t_prime = SIGMA_PRIME
    model = KDenoiser(InnerModel())
    frozen, passes = freeze(model), []
    loss_of = importlib.import_module("edm_loss").PerceptualKLoss(model, layers="inner_model.u_net.d_blocks.2")
    with torch.no_grad():
        model.inner_model.proj_in.weight.mul_(1.2)
    clean, noise, cond = *torch.randn(2, 4, 3, 8, 8), {"class_cond": torch.tensor([1, 2, 3, 4])}
    hook = model.inner_model.register_forward_hook(lambda *_: passes.append(1))
    losses = loss_of(model, clean, noise, SIGMA, **cond)
    hook.remove()
    assert len(passes) == 1
    output = model(clean + over(SIGMA) * noise, SIGMA, **cond)
    perceptual = sp(
        frozen, output, clean=clean, noise=noise, t=SIGMA, t_prime=SIGMA_PRIME, cond=cond, kind="sample", scales=edm,
        layer="inner_model.u_net.d_blocks.2",
    )  # fmt: skip
    expected = model.loss(clean, noise, SIGMA, **cond) + perceptual
    same_gradient(losses.mean(), expected.mean(), model.parameters())
    assert not model.inner_model._forward_hooks
