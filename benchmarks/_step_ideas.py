"""What else could make a step cheaper, counted, and on small models timed: most of it is not worth it."""

import random
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from _step_count import Step, count, seconds
from _step_models import Batch, Case
from _step_tables import Row
from _step_variants import Study, mse, ours, renoised, study
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

from perceptual_diffusion import taps
from perceptual_diffusion._shapes import map_tensors
from perceptual_diffusion.inspection.flops import Flops, quiet
from perceptual_diffusion.teachers import CopyTeacher

BATCHED = ("SD1.5", "DiT-XL/2", "SD1.5, tiny", "DiT-XL/2, tiny")
CONVOLUTIONS = ("SD2.1", "DDPM", "SD1.5, tiny", "DDPM, tiny")
ROUNDS = 11


def ideas(case: Case) -> Iterator[Row]:
    """What each idea changes for a model: operations, bytes or time of a step, against the MSE step."""
    of = study(case, fake="tiny" not in case.name)
    given = of.batch(8)
    base = count(mse(of, given), of.model)

    def made(idea: str, what: str, without: float, with_it: float) -> Row:
        about = {"model": case.name, "resolution": case.resolution, "batch": 8, "variant": idea, "what": what}
        return about | {"without": without, "with": with_it}

    if of.fake:
        parts = of.parts(given)
        limit = base.flops + parts.added
        for idea, saved in (("condition shared", shared(of, given)), ("true features cached", parts.to_layer)):
            yield made(idea, "FLOPs", limit / base.flops, (limit - saved) / base.flops)
    for idea, changed, models in (
        ("one batch for both branches", batched, BATCHED),
        ("convolutions keep weights alone", lean, CONVOLUTIONS),
    ):
        if case.name not in models:
            continue
        plain, step = ours(of, given, micro_batch=None), changed(of, given)
        if of.fake:
            a, b = count(plain, of.model), count(step, of.model)
            yield made(idea, "FLOPs", a.flops / base.flops, b.flops / base.flops)
            yield made(idea, "memory", a.live / base.live, b.live / base.live)
        else:
            yield made(idea, "time", *_times(mse(of, given), plain, step))


def batched(study: Study, given: Batch) -> Step:
    """The true and the predicted samples in one batch of the teacher, with a graph for both."""
    teacher = CopyTeacher(study.model, layers=[study.layer], call=study.plain.call, select=taps.select)
    cond, t_prime = map_tensors(lambda x: torch.cat([x, x]), given.cond), given.t_prime.repeat(2)

    def run() -> None:
        study.forget()
        predicted, true = teacher(torch.cat(renoised(study, given)), t_prime, cond)[0].chunk(2)
        F.mse_loss(predicted, true.detach()).backward()

    run()  # the first pass cuts the copy
    return Step(run=run, held=[teacher.module])


def lean(study: Study, given: Batch) -> Step:
    """The objective, with convolutions of the teacher that keep their weight and not their input."""
    step = ours(study, given, micro_batch=None)
    for module in (m for held in step.held for m in held.modules() if isinstance(m, nn.Conv2d)):
        module.forward = partial(_frozen, module)
    return step


class _Frozen(torch.autograd.Function):
    """A convolution with a gradient to its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = x.shape, options
        return F.conv2d(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return conv2d_input(ctx.shape, ctx.saved_tensors[0], gradient, *ctx.options), None, None, None


def _frozen(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return _Frozen.apply(x, conv.weight, conv.bias, (conv.stride, conv.padding, conv.dilation, conv.groups))


def shared(study: Study, given: Batch) -> int:
    """Operations up to the middle that do not depend on the sample, and so are the same in both branches."""
    flops, same = Flops(), 0

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal same
            before = flops.total
            result = func(*args, **(kwargs or {}))
            if not (isinstance(result, Tensor) and result.requires_grad):
                same += flops.total - before
            return result

    sample = study.plain.add_noise(given.clean, given.noise, given.t_prime)
    with quiet(study.model, [sample]), Watch(), flops:
        taps.run(study.model, [study.layer], lambda: study.plain.call(study.model, sample, given.t_prime, given.cond))
    return same


def _times(base: Step, *steps: Step) -> list[float]:
    """Medians of the ratios to the time of the base in the same round."""
    order, ratios = random.Random(0), [[] for _ in steps]
    for _ in range(ROUNDS):
        taken = {}
        for index in order.sample(range(len(steps) + 1), len(steps) + 1):
            taken[index] = seconds((base, *steps)[index])
        for index, of in enumerate(ratios):
            of.append(taken[index + 1] / taken[0])
    return [statistics.median(of) for of in ratios]
