"""The self-test of `doctor`: loss and gradient of the objective on a device, against Algorithm 1 written out in float64.

`main` runs one job and prints a JSON object for each result: `doctor` starts it in a process of its own, which may crash or
hang.
"""

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from perceptual_diffusion import PAPER, SelfPerceptualObjective
from perceptual_diffusion.cli.reference import DiT, UNet, algorithm1

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BOUNDS = {"float64": 1e-9, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}
"""Relative error allowed of losses and gradient, by what is computed in."""
SCALE = 2.0**10
"""Factor of the loss before its backward: float16 would round small gradients to 0."""
MARK = "## perceptual-diffusion doctor ## "
"""Begins the lines that are results: what is imported prints, too."""
MODULES = {
    "diffusers": ("diffusers.models.unets.unet_2d_condition", "diffusers.pipelines.pipeline_utils"),
    "pillow": ("PIL.Image",),
    "scikit-learn": ("sklearn",),
    "tensorboard": ("torch.utils.tensorboard",),
    "transformers": ("transformers.models.clip.modeling_clip",),
}
"""What is imported of a package, where that is not the package's name: what loads its parts late would tell nothing."""
BATCH = 4


@dataclass(kw_only=True)
class Result:
    """What one self-test found. It failed if there are problems; without errors it was not run, and `note` says why."""

    device: str
    dtype: str
    case: str
    loss_error: float | None = None
    gradient_error: float | None = None
    bound: float | None = None
    note: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Case:
    """One way to run a model: what differs from the plain one.

    Args:
        make: builds the model.
        device: where it runs.
        dtype: of its weights and its samples.
        name: what the report calls it.
        bound: a key of `BOUNDS`; by default the dtype.
        checkpointing: of the student, non-reentrant.
        autocast: dtype under torch.autocast.
        options: arguments of `wrap`.
        adapt: puts LoRA layers into the model.
    """

    make: type[UNet] | type[DiT]
    device: str
    dtype: str = "float32"
    name: str = ""
    bound: str = ""
    checkpointing: bool = False
    autocast: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    adapt: Callable[[nn.Module], nn.Module] | None = None

    def run(self) -> Result:
        """Run it twice, and compare with Algorithm 1 and with itself."""
        made = self.make.__name__
        bound = BOUNDS[self.bound or self.autocast or self.dtype]
        result = Result(
            device=self.device, dtype=self.dtype, case=f"{made}, {self.name}" if self.name else made, bound=bound
        )
        try:
            self._plain()
        except Exception as error:  # torch's own, without the objective
            said = f"torch itself cannot train so: {line(error)}"
            if self.dtype == "float32" and not self.autocast:
                result.problems.append(said)
            result.note = said
            return result
        try:
            errors = self._exact(result)
            again = [self._drawn() for _ in range(2)]
        except Exception as error:
            result.problems.append(f"it raises {type(error).__name__}: {line(error)}")
            return result
        result.loss_error, result.gradient_error = (value if math.isfinite(value) else None for value in errors)
        for what, value in zip(("loss", "gradient"), errors, strict=True):
            if not value <= bound:
                result.problems.append(f"the {what} is off by {value:.1e}, expected at most {bound:.0e}")
        if not torch.equal(*again):
            if self.device == "cpu":
                result.problems.append("two runs from one seed differ: a run that goes on will differ, too")
            else:
                result.note = "two runs from one seed differ by rounding"
        return result

    def _model(self) -> tuple[nn.Module, nn.Module]:
        """The model, and a float64 copy of its base on the CPU."""
        torch.manual_seed(0)
        model: Any = self.make().to(DTYPES[self.dtype])
        base = copy.deepcopy(model).double()
        model.checkpointing = self.checkpointing
        return (self.adapt(model) if self.adapt else model).to(self.device), base

    def _batch(self) -> tuple[Tensor, Tensor]:
        clean, noise = torch.randn(2, BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(DTYPES[self.dtype])
        return clean, noise

    def _wrap(self, model: nn.Module) -> SelfPerceptualObjective:
        return SelfPerceptualObjective.wrap(
            model, self.make.schedule()[0], prediction=self.make.prediction, layers=self.make.layer, seed=0,
            call=lambda model, x_t, t, cond: model(x_t, t), **PAPER | self.options,
        )  # fmt: skip

    def _casting(self) -> Any:
        kind = torch.device(self.device).type
        return torch.autocast(kind, DTYPES[self.autocast]) if self.autocast else nullcontext()

    def _plain(self) -> None:
        """A step without the objective: what it raises is not ours."""
        model, _ = self._model()
        x = self._batch()[0].to(self.device)
        with self._casting():
            loss = model(x, torch.ones(BATCH, device=self.device)).square().mean()
        loss.backward()

    def _exact(self, result: Result) -> tuple[float, float]:
        """Relative errors of the losses and of the gradient of all weights that train."""
        model, base = self._model()
        objective = self._wrap(model)
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():  # the student moves away from its teacher, LoRA layers from 0
            for weight in _trained(model):
                weight.add_(0.1 * torch.randn(weight.shape, generator=draw).to(weight))
        student = copy.deepcopy(model).cpu().double()
        clean, noise = self._batch()
        _, times, alphas, sigmas = self.make.schedule()
        at, at_prime = torch.tensor([200, 400, 600, 800]), torch.tensor([700, 100, 150, 400])
        t, t_prime = times[at], times[at_prime]
        here = [x.to(self.device) for x in (clean, noise, t, t_prime)]
        teacher: Any = objective.teacher
        before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
        with self._casting():
            losses = objective(model, here[0], noise=here[1], t=here[2], t_prime=here[3], reduction="none")
        (losses.mean() * SCALE).backward()
        expected = algorithm1(
            student, base, self.make.layer, self.make.prediction, clean.double(), noise.double(), t, t_prime,
            (alphas[at], sigmas[at], alphas[at_prime], sigmas[at_prime]),
        )  # fmt: skip
        expected.mean().backward()
        gradient = _gradient(model) / SCALE
        with torch.no_grad():
            for weight in _trained(model):
                weight.sub_(0.1 * _grad(weight))
        held = teacher.module.state_dict()
        if not all(torch.equal(before[name], value) for name, value in held.items()):
            result.problems.append("the teacher's weights changed with the student's")
        if any(weight.grad is not None for weight in teacher.module.parameters()):
            result.problems.append("the teacher's weights have a gradient")
        if teacher.module.ended:
            result.problems.append("the teacher's pass did not end at its last layer")
        return _error(losses, expected), _error(gradient, _gradient(student))

    def _drawn(self) -> Tensor:
        """Losses and gradient of a step whose t, noise and t' the objective draws."""
        model, _ = self._model()
        objective = self._wrap(model)
        with self._casting():
            losses = objective(model, self._batch()[0].to(self.device), reduction="none")
        (losses.mean() * SCALE).backward()
        return torch.cat([losses.detach().double().cpu(), _gradient(model)])


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def _gradient(model: nn.Module) -> Tensor:
    return torch.cat([_grad(weight).cpu().double().flatten() for weight in _trained(model)])


def _grad(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().cpu().double(), expected.detach()
    return float((actual - expected).norm() / expected.norm()) if actual.shape == expected.shape else math.nan


def line(error: BaseException) -> str:
    """What an error says, on one line, or its kind."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def _tf32(on: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if on else "highest")
    torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def on_device(device: str) -> Iterator[Result]:
    """Test every dtype of a device, checkpointing and autocast; TF32 on CUDA."""
    with _tf32(False):
        for dtype in DTYPES:
            for make in (UNet, DiT):
                yield Case(make=make, device=device, dtype=dtype).run()
        for make in (UNet, DiT):
            yield Case(make=make, device=device, name="checkpointing", checkpointing=True).run()
            yield Case(make=make, device=device, name="bf16 autocast", autocast="bfloat16").run()
    if device.startswith("cuda"):
        with _tf32(True):
            for make in (UNet, DiT):
                yield Case(make=make, device=device, name="TF32", bound="tf32").run()


def compiled(device: str) -> Iterator[Result]:
    """Test a teacher under torch.compile; where it cannot be compiled here, that is a note."""
    case = Case(make=DiT, device=device, name="compiled", options={"compile": True})
    if torch._dynamo.config.disable:
        yield Result(device=device, dtype=case.dtype, case="DiT, compiled", note="torch.compile is switched off here")
        return
    result = case.run()
    if result.problems and result.loss_error is None:
        result.note, result.problems = result.problems.pop(), []
    yield result


def lora(device: str) -> Iterator[Result]:
    """Test a teacher that shares the base under LoRA layers of PEFT."""
    case = Case(make=DiT, device=device, name="LoRA", options={"teacher": "lora"})
    try:
        from peft import LoraConfig, get_peft_model
    except Exception as error:
        yield Result(device=device, dtype=case.dtype, case="DiT, LoRA", note=f"peft cannot be imported: {line(error)}")
        return
    case.adapt = lambda model: get_peft_model(model, LoraConfig(r=4, target_modules=["qkv", "out", "patch"]))
    yield case.run()


def imports(names: str) -> Iterator[dict[str, str]]:
    """Import packages of the extras, by their names at pip with commas between, and give what each raises."""
    for name in names.split(","):
        error = ""
        try:
            for module in MODULES.get(name, (name.replace("-", "_"),)):
                import_module(module)
        except BaseException as raised:  # some end the process
            error = f"{type(raised).__name__}: {line(raised)}"
        yield {"package": name, "error": error}


JOBS: dict[str, Callable[[str], Iterator[Any]]] = {
    "device": on_device, "compile": compiled, "lora": lora, "import": imports,
}  # fmt: skip


def main(job: str, argument: str) -> None:
    """Run a job and print each result as a JSON object on a line of its own."""
    warnings.simplefilter("ignore")
    for result in JOBS[job](argument):
        print(f"\n{MARK}{json.dumps(result if isinstance(result, dict) else asdict(result))}", flush=True)
