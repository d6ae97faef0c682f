"""EDM (NVlabs/edm, edm2) and k-diffusion: their losses with the self-perceptual loss added, as callables of the same form.

In EDM's training_loop.py, after `net` has its trained weights, and in place of the call of `loss_fn` (which keeps its name, since
EDM pickles it into its snapshots):

    perceptual = PerceptualEDMLoss(loss_fn, net)
    loss = perceptual(net=ddp, images=images, labels=labels, augment_pipe=augment_pipe)

In k-diffusion's train.py, before `accelerator.prepare`, and in place of the call of `model.loss`:

    loss_of = PerceptualKLoss(K.config.make_denoiser_wrapper(config)(inner_model))
    losses = loss_of(model, reals, noise, sigma, aug_cond=aug_cond, **extra_args)
"""

from typing import Any

from torch import Tensor, nn

from perceptual_diffusion import SelfPerceptualObjective, schedules
from perceptual_diffusion.objective import take_prediction


class PerceptualEDMLoss:
    """A loss of EDM or EDM2, elementwise (B, C, H, W), plus L_sp spread over the elements, so that sums and means fit.

    Args:
        loss: a VPLoss, VELoss, EDMLoss or EDM2Loss: `loss(net, images, labels, augment_pipe)`.
        net: the preconditioned network with its trained weights; the teacher is a frozen copy of it.
        options: of `SelfPerceptualObjective.wrap`.
    """

    def __init__(self, loss: Any, net: nn.Module, **options: Any) -> None:
        self.loss = loss
        self.objective = SelfPerceptualObjective.wrap(net, schedules.EDM(), **{"mse_weight": 0.0} | options)

    def __call__(self, net: Any, images: Tensor, labels: Tensor | None = None, augment_pipe: Any = None) -> Tensor:
        """Give the elementwise loss of clean images (B, C, H, W) with their labels."""
        clean, augment = augment_pipe(images) if augment_pipe is not None else (images, None)
        given: dict[str, Any] = {} if augment_pipe is None else {"augment_pipe": lambda _: (clean, augment)}
        seen: list[Any] = []

        def watched(x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, **kwargs: Any) -> Any:
            seen[:] = [x, sigma, net(x, sigma, class_labels, **kwargs)]
            return seen[2]

        loss: Tensor = self.loss(watched, clean, labels, **given)
        x, sigma, output = seen
        sp = self.objective.loss(
            take_prediction(output, x),
            clean=clean,
            noise=(x - clean) / sigma,
            t=sigma.flatten(),
            cond={"class_labels": labels} | ({} if augment is None else {"augment_labels": augment}),
            reduction="none",
        )
        return loss + sp.view(-1, 1, 1, 1)


class PerceptualKLoss:
    """A loss of k-diffusion's denoisers, (B,), plus L_sp.

    Args:
        model: a `K.Denoiser` over the network with its trained weights; the teacher is a frozen copy of it.
        options: of `SelfPerceptualObjective.wrap`.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.objective = SelfPerceptualObjective.wrap(model, schedules.EDM(), **{"mse_weight": 0.0} | options)

    def __call__(self, model: Any, clean: Tensor, noise: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        """Give the loss of clean samples (B, *) and unit noise at sigma (B,)."""
        outputs: list[Tensor] = []
        hook = model.inner_model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            loss: Tensor = model.loss(clean, noise, sigma, **cond)
        finally:
            hook.remove()
        at = sigma.view(-1, *[1] * (clean.ndim - 1))
        c_skip, c_out, _ = model.get_scalings(at)
        denoised = c_out * take_prediction(outputs[0], clean) + c_skip * (clean + at * noise)
        return loss + self.objective.loss(denoised, clean=clean, noise=noise, t=sigma, cond=cond, reduction="none")
