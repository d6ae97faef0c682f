"""Every denoiser of diffusers, wrapped with nothing but its scheduler, against Algorithm 1 written by hand for its row.

What is compared is the gradient with respect to the model's output and to the student's parameters. The oracle calls the
model, hooks its middle and takes the noisy sample's part as the row says, in full passes; it shares no code with the
package.
"""

import warnings

import pytest
import torch
from algorithm1 import freeze
from paper import PaperObjective
from zoo import NO_CPU_BACKWARD, REFUSED, ROWS, build
from zoo.nested import leaves, mapped, per_sample

from perceptual_diffusion import adapters, schedules

ALLOWED = 1e-4
NAMES = [name for name in ROWS if name not in NO_CPU_BACKWARD]

BROKEN_CHECKPOINTING = {
    "HunyuanImageTransformer2DModel": (TypeError, "attention_mask"),
    "AudioLDM2UNet2DConditionModel": (RuntimeError, "must match the size"),
}
"""diffusers 0.42 calls its own checkpointing wrongly there: the model alone raises, without the package."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Transformer2DModelOutput.*:FutureWarning"),
]


def moved(device, value):
    """The tensors of nested dicts, lists and tuples on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(device, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(device, item) for item in value))
    return type(value)(moved(device, item) for item in value) if type(value) in (list, tuple) else value


class Case:
    """One row, wrapped, with a batch and the oracle."""

    def __init__(self, name, *, device="cpu", **options):
        self.device = device
        self.model, self.tiny = build(name)
        self.model.to(device)
        self.frozen = freeze(self.model)
        for module in self.frozen.modules():
            if type(module).__name__ in self.tiny.awake:
                module.train()
        self.scheduler = self.tiny.scheduler()
        predictions = adapters.find(self.model).prediction
        if isinstance(predictions, tuple):  # released models of the class differ
            options["prediction"] = self.tiny.prediction
        if self.tiny.prediction == "sample" and not hasattr(self.scheduler, "alphas_cumprod"):
            options["t_range"] = (1, 1000)  # at sigma = 0 the clean sample does not give the noise
        self.options = options
        self.objective = self.wrap()
        generator = torch.Generator().manual_seed(1)
        self.clean = self.on_device(self.tiny.clean)
        self.noise = mapped(lambda x: torch.randn(x.shape, generator=generator).to(device), self.tiny.clean)
        self.t, self.t_prime = self.tiny.t, self.tiny.t.flip(0)
        if (self.t == self.t_prime).all():  # one time for the whole batch
            self.t_prime = self.t / 2
        self.given = {
            "cond": self.on_device(self.tiny.cond), "noise": self.noise, "t": self.unit(self.t).to(device),
            "t_prime": self.unit(self.t_prime).to(device),
        }  # fmt: skip

    def wrap(self, **more):
        return PaperObjective.wrap(self.model, self.scheduler, **self.options, **more)

    def unit(self, t):
        """The released timestep, 0 clean to 1000 noise, in the unit of the objective's schedule."""
        schedule = self.objective.schedule
        if schedule.discrete or isinstance(schedule, schedules.EDM):
            return t
        return (1 - t / 1000 if schedule.noise_first else t / 1000) * schedule.high

    # --- the oracle ---

    def scales(self, t):
        if hasattr(self.scheduler, "alphas_cumprod") and not t.is_floating_point():
            bar = self.scheduler.alphas_cumprod.double()[t]
            return bar.sqrt(), (1 - bar).sqrt()
        if type(self.scheduler).__name__ == "IPNDMScheduler":
            return torch.cos(t / 1000 * torch.pi / 2), torch.sin(t / 1000 * torch.pi / 2)
        if type(self.scheduler).__name__ == "DDPMWuerstchenScheduler":
            bar = self.scheduler._alpha_cumprod(t / 1000, t.device)
            return bar.sqrt(), (1 - bar).sqrt()
        if isinstance(self.objective.schedule, schedules.EDM):
            return torch.ones_like(t), t
        return 1 - t / 1000, t / 1000

    def row(self, t):
        """(a, b) of the target y = a x_0 + b noise, from the definitions of the predictions."""
        alpha, sigma = self.scales(t)
        sign, kind = (-1, self.tiny.prediction[1:]) if self.tiny.prediction[0] == "-" else (1, self.tiny.prediction)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        if kind == "edm":  # Karras et al. 2022, eq. 7: clean = c_skip x + c_out F
            data = self.scheduler.config.get("sigma_data", 1.0)
            skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
            a, b = (1 - skip) / out, -skip * sigma / out
        else:
            a, b = {
                "epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-sigma, alpha),
                "flow_prediction": (-one, one),
            }[kind]  # fmt: skip
        return sign * a, sign * b

    def raw(self, model, x, t):
        time = self.tiny.time(t)
        cond = {key: value for key, value in self.tiny.cond.items() if key != "concat"}
        cond = {key: value(next(iter(time.values()))) if callable(value) else value for key, value in cond.items()}
        given = self.tiny.given(moved("cpu", x), t)  # a row holds what it joins to x on the CPU
        return model(**self.on_device(given), **self.on_device(time), **self.on_device(cond))

    def on_device(self, value):
        return moved(self.device, value)

    def features(self, x, t):
        caught = []
        hook = dict(self.frozen.named_modules())[self.tiny.middle].register_forward_hook(
            lambda m, a, out: caught.append(out)
        )
        self.raw(self.frozen, x, t)
        hook.remove()
        taken = self.tiny.feature(caught[0])
        return taken if isinstance(taken, list) else [taken]

    def oracle(self, predicted):
        """Algorithm 1 (Lin & Yang): the loss of each sample, (B,)."""
        alpha, sigma = self.scales(self.t)
        a, b = self.row(self.t)
        x_t = per_sample(lambda k, x, e: k[0] * x + k[1] * e, (alpha, sigma), self.clean, self.noise)
        delta = alpha * b - sigma * a
        clean_hat = per_sample(lambda k, x, y: (k[0] * x - k[1] * y) / k[2], (b, sigma, delta), x_t, predicted)
        noise_hat = per_sample(lambda k, x, y: (k[0] * y - k[1] * x) / k[2], (alpha, a, delta), x_t, predicted)
        mixed = lambda x, e: per_sample(lambda k, x, e: k[0] * x + k[1] * e, self.scales(self.t_prime), x, e)  # noqa: E731
        with torch.no_grad():
            true = self.features(mixed(self.clean, self.noise), self.t_prime)
        told = self.features(mixed(clean_hat, noise_hat), self.t_prime)
        terms = [
            torch.stack([((x - y) ** 2).mean() for x, y in zip(f, g, strict=True)])
            for f, g in zip(told, true, strict=True)
        ]
        return torch.stack(terms).mean(0)

    def student(self):
        """The model's own prediction, by hand."""
        x_t = per_sample(lambda k, x, e: k[0] * x + k[1] * e, self.scales(self.t), self.clean, self.noise)
        return self.tiny.predicted(self.raw(self.model, x_t, self.t))


def error(actual, expected):
    actual, expected = (torch.cat([t.detach().double().flatten() for t in side]) for side in (actual, expected))
    assert expected.norm() > 0
    return float((actual - expected).norm() / expected.norm())


def parameter_gradients(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_are_those_of_algorithm_1(name):
    check(Case(name))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward on a GPU only")
@pytest.mark.parametrize("name", sorted(NO_CPU_BACKWARD))
def test_the_gradients_of_flex_attention_are_those_of_algorithm_1(name):
    check(Case(name, device="cuda"))


def check(case):
    assert list(case.objective.teacher.layers) == [case.tiny.middle]
    with torch.no_grad():
        start = case.student()
    predicted = mapped(lambda p: p.detach().clone().requires_grad_(), start)
    expected = case.oracle(predicted)
    gradient = torch.autograd.grad(expected.sum(), leaves(predicted))
    whole = case.wrap(truncate=False)
    whole.teacher.stop = False
    for objective in (case.objective, whole):
        values = objective.loss(predicted, clean=case.clean, reduction="none", **case.given)
        assert error([values], [expected]) < ALLOWED
        assert error(torch.autograd.grad(values.sum(), leaves(predicted)), gradient) < ALLOWED
    by_hand = parameter_gradients(case.model, case.oracle(case.student()).mean())
    trained = parameter_gradients(case.model, case.objective(case.model, case.clean, **case.given))
    assert error(trained, by_hand) < ALLOWED


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name):
    case = Case(name)
    if not getattr(case.model, "_supports_gradient_checkpointing", False):
        pytest.skip("the class has no gradient checkpointing")
    plain = parameter_gradients(case.model, case.objective(case.model, case.clean, **case.given))
    case.model.enable_gradient_checkpointing()
    if name.split(".")[0] in BROKEN_CHECKPOINTING:
        kind, message = BROKEN_CHECKPOINTING[name.split(".")[0]]
        with pytest.raises(kind, match=message):
            case.student()
        pytest.skip("diffusers' own checkpointing of this class raises")
    again = parameter_gradients(case.model, case.wrap()(case.model, case.clean, **case.given))
    assert error(again, plain) < ALLOWED


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_with_the_reason(name):
    import diffusers

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = object.__new__(getattr(diffusers, name))
        torch.nn.Module.__init__(model)
    with pytest.raises(ValueError, match=REFUSED[name]):
        adapters.find(model)
