"""The student's part of a step: it runs, it is trained, and it sees its input."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_diffusion import taps
from perceptual_diffusion._checking.batch import Batch
from perceptual_diffusion._checking.numbers import difference, equal, finite
from perceptual_diffusion._checking.report import SetupError, named
from perceptual_diffusion._checking.watch import Watch, acts_in_training, same_randomness
from perceptual_diffusion._shapes import check_sample, first, leaves
from perceptual_diffusion.types import Sample

SAME = 0.02
"""How far two computations of one gradient may be apart, relatively."""

Gradients = list[Tensor | None]


def trained_weights(model: nn.Module) -> list[nn.Parameter]:
    """Give the weights of a student that require grad.

    Raises:
        SetupError: there are none, or the student is partitioned over processes.
    """
    for name, parameter in model.named_parameters():
        if taps.partitioned(parameter):
            raise SetupError(
                "partitioned",
                f"`model` is partitioned ({name!r} is not whole here). Check it before FSDP or DeepSpeed does that.",
            )
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise SetupError(
            "frozen",
            "no weight of `model` requires grad, so nothing would train. Call `model.requires_grad_(True)`, or add the LoRA "
            "layers first.",
        )
    return trained


class Student:
    """The student in one step.

    Args:
        batch: the batch.
        trained: its weights that require grad.
    """

    def __init__(self, batch: Batch, trained: list[nn.Parameter]) -> None:
        self.batch, self.model, self.trained = batch, batch.model, trained
        if any(acts_in_training(m) and not m.training for m in self.model.modules()):
            batch.warnings.append("`model` is in eval mode: its dropout or batch norm is off. Call `model.train()`.")

    def predict(self) -> Sample:
        """Give the prediction, with its graph."""
        batch = self.batch
        with self._watching_times():
            try:
                predicted = batch.run(batch.x_t, batch.t)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                cause = error.__cause__
                if isinstance(cause, Exception) and str(cause).rstrip(".") in str(error):  # told with all shapes
                    error = cause
                text = str(error).rstrip(".")
                if isinstance(error, TypeError) and ("keyword argument" in text or "required" in text):
                    raise SetupError(
                        "cond", f"`cond` has {sorted(batch.cond)}: {text}. Pass what the forward of `model` takes."
                    ) from error
                raise SetupError(
                    "call",
                    f"`model` cannot be run on the batch: {type(error).__name__}: {text}. Mend `cond` or `call`.",
                ) from error
        try:
            check_sample("model_pred", predicted, batch.clean)
        except (TypeError, ValueError) as error:
            raise SetupError(
                "shape", f"{error} Take the prediction out of the model's output with `output=`."
            ) from error
        if not finite(predicted):
            raise SetupError("output", "the output of `model` holds NaN or infinity. Mend its weights or its dtype.")
        if not any(leaf.requires_grad for leaf in leaves(predicted)):
            raise SetupError(
                "untrainable",
                "the output of `model` has no gradient, so nothing would train. Run it without no_grad and without detaching; "
                "with reentrant checkpointing, let its input require grad.",
            )
        return predicted

    @contextlib.contextmanager
    def _watching_times(self) -> Iterator[None]:
        """Warn if the model is given one bfloat16 number per sample that is not part of `cond`."""
        batch = self.batch
        given = {id(value) for value in batch.cond.values()}

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.dtype == torch.bfloat16 and value.shape == batch.t.shape:
                    if id(value) not in given and value.shape != first(batch.clean).shape:
                        batch.warnings.append(
                            "`model` is given its times in bfloat16, which keeps 507 of 1000 indices. Pass them as float32, "
                            "unless it was trained so."
                        )

        handle = self.model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def gradients(self, graph: Sample, cotangent: Sample, watch: Watch) -> Gradients:
        """Give the gradient of each trained weight.

        Args:
            graph: the prediction, with its graph.
            cotangent: the gradient of the loss with respect to it.
            watch: knows what the teacher has run.
        """
        found = self.backward(graph, cotangent)
        if watch.ran(self.model.modules()):
            self._check_undisturbed(graph, cotangent, found)
        if not any(g is not None and bool(g.any()) for g in found):
            raise SetupError(
                "untrainable",
                "the loss has no gradient with respect to any weight of `model`. Check which ones are trained.",
            )
        if not all(g is None or finite(g) for g in found):
            raise SetupError(
                "loss", "the gradient of a weight is NaN or infinite. Mend the weights of `model`, or its dtype."
            )
        missed = sum(p.numel() for p, g in zip(self.trained, found, strict=True) if g is None)
        if missed > sum(p.numel() for p in self.trained) / 2:
            self.batch.warnings.append(
                f"{missed:,} of the numbers that are trained get no gradient. Either `model` does not use them; or, with "
                "reentrant checkpointing, its input has to require grad."
            )
        return found

    def backward(self, graph: Sample, cotangent: Sample) -> Gradients:
        """Give the gradient of each trained weight as it comes."""
        pairs = [(p, g.to(p.dtype)) for p, g in zip(leaves(graph), leaves(cotangent), strict=True) if p.requires_grad]
        with same_randomness(), named("untrainable", "the backward of `model` fails"):
            torch.autograd.backward([p for p, _ in pairs], [g for _, g in pairs])
        found = [p.grad for p in self.trained]
        for p in self.trained:
            p.grad = None
        return found

    def _check_undisturbed(self, graph: Sample, cotangent: Sample, found: Gradients) -> None:
        """Repeat the step without a pass of the teacher in the middle."""
        again = self.batch.run(self.batch.x_t, self.batch.t)
        if difference(list(leaves(graph)), list(leaves(again))) > SAME:
            raise SetupError(
                "gradient",
                "`model` gives another output after the teacher's pass, which leaves its adapters or weights changed. Use "
                "`teacher='copy'` or 'lora'.",
            )
        if difference(found, self.backward(again, cotangent)) > SAME:
            raise SetupError(
                "gradient",
                "the teacher's pass changes the gradient of `model` and not its output: it switches adapters or weights of the "
                "same module, which the backward then meets. Use `teacher='copy'` or 'lora'.",
            )

    def check_input(self, predicted: Sample, cotangent: Sample, found: Gradients) -> None:
        """Refuse a student that does not see x_t. One whose last layer is still zero does see it: its gradient shows it."""
        batch = self.batch
        other = batch.disturbed(batch.x_t)
        with torch.no_grad():
            if not equal(predicted, batch.run(other, batch.t)):
                return
        if difference(found, self.backward(batch.run(other, batch.t), cotangent)) == 0:
            raise SetupError("output", "the output of `model` does not depend on x_t. Let `call` pass x_t to it.")
