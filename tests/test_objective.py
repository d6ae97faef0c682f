"""The objective: equal to Algorithm 1 in loss and gradient, exact where theory is exact, and strict about its input."""

import copy
import inspect
import math

import pytest
import torch
from algorithm1 import DISTANCES, algorithm1, freeze
from diffusers.models.unets.unet_2d import UNet2DOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MLP, TOLERANCE, ConvNet, TwoStreams, distance, unet
from paper import PaperObjective

from perceptual_diffusion import PAPER, SelfPerceptualObjective, parameterizations, schedules, timesteps
from perceptual_diffusion import objective as module
from perceptual_diffusion.parameterizations import edm

# --- every schedule, written out by hand beside the package's ---------------------------------------------------------

STABLE = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
ROOT = STABLE.sqrt()
ZERO = ((ROOT - ROOT[-1]) * ROOT[0] / (ROOT[0] - ROOT[-1])) ** 2
SQUARED_COS = torch.cos((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
COSINE = (1 - (1 - SQUARED_COS[1:] / SQUARED_COS[:-1]).clamp(max=0.999)).cumprod(0)
NAMES = ("epsilon", "sample", "v_prediction")
FLOW = (*NAMES, "flow_prediction")
QUARTER = math.pi / 2


def table(bar):
    return lambda t: (bar[t].sqrt(), (1 - bar[t]).sqrt())


def sit(t):
    return t, 1 - t


def bent(t):
    return torch.cos(QUARTER * t) ** 2, torch.sin(QUARTER * t)


INDEX = {"t": (120, 480, 800), "t_prime": (500, 30, 999), "unit": lambda t: t}
UNIT = {"t": (0.2, 0.5, 0.8), "t_prime": (0.6, 0.05, 1.0), "unit": lambda t: 1000 * t, "t_range": (0.0625, 0.9375)}
SIGMA = {"t": (0.1, 1.0, 5.0), "t_prime": (0.7, 0.02, 20.0), "unit": lambda t: t.log() / 4}
CASES = {
    "scaled_linear": (schedules.Discrete.scaled_linear(), table(STABLE), None, NAMES, INDEX),
    "cosine": (schedules.Discrete.cosine(), table(COSINE), None, NAMES, INDEX),
    "zero_snr": (
        schedules.Discrete.scaled_linear().zero_terminal_snr(), table(ZERO), None, NAMES, INDEX | {"t_range": (0, 998)}
    ),
    "linear": (schedules.Linear(), lambda t: (1 - t, t), lambda t: (-1.0, 1.0), FLOW, UNIT),
    "linear_shift_3": (
        schedules.Linear(shift=3), lambda t: (1 - 3 * t / (1 + 2 * t), 3 * t / (1 + 2 * t)),
        lambda t: (-1.0, 1.0), FLOW, UNIT,
    ),
    "quarter_circle": (
        schedules.Cosine(), lambda t: (torch.cos(QUARTER * t), torch.sin(QUARTER * t)),
        lambda t: (-QUARTER * torch.sin(QUARTER * t), QUARTER * torch.cos(QUARTER * t)), FLOW, UNIT,
    ),
    "sit": (schedules.Interpolant(lambda t: t, lambda t: 1 - t), sit, lambda t: (1.0, -1.0), FLOW, UNIT),
    "bent": (
        schedules.Interpolant(lambda t: bent(t)[0], lambda t: bent(t)[1]), bent,
        lambda t: (-QUARTER * torch.sin(2 * QUARTER * t), QUARTER * torch.cos(QUARTER * t)), FLOW, UNIT,
    ),
    "edm": (schedules.EDM(), lambda t: (torch.ones_like(t), t), lambda t: (0.0, 1.0), (*FLOW, "edm"), SIGMA),
}  # fmt: skip
PAIRS = [(name, kind) for name, case in CASES.items() for kind in case[3]]


class Setup:
    """A student that has moved away from the frozen copy, one batch, and what Algorithm 1 needs to know of the pair."""

    def __init__(self, case="scaled_linear", kind="epsilon", layers=("mid_block",), **options):
        self.schedule, self.scales, velocity, _, extra = CASES[case]
        self.kind, self.layers, self.unit = kind, layers, extra["unit"]
        self.t, self.t_prime = torch.tensor(extra["t"]), torch.tensor(extra["t_prime"])
        self.student = unet()
        self.frozen = freeze(self.student)
        self.objective = PaperObjective.wrap(
            self.student, self.schedule, prediction=edm(0.5) if kind == "edm" else kind, layers=list(layers),
            call=self.call, **{"t_range": extra.get("t_range")} | options,
        )  # fmt: skip
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.mul_(1.05)
        self.cond = {"class_labels": torch.tensor([1, 2, 3])}
        self.clean, self.noise = torch.randn(2, 3, 3, 8, 8)
        self.constants = {}
        if kind == "flow_prediction":
            self.constants["velocity"] = tuple(
                s.float().view(-1, 1, 1, 1) if isinstance(s, torch.Tensor) else s
                for s in velocity(self.precise(self.t))
            )
        self.x_t = self.mix(*self.at(self.t))

    def call(self, model, x_t, t, cond):
        return model(x_t, self.unit(t), **cond).sample

    def precise(self, t):
        return t.double() if t.is_floating_point() else t

    def at(self, t):
        return self.scales(self.precise(t))

    def mix(self, clean_scale, noise_scale):
        clean_scale, noise_scale = (s.float().view(-1, 1, 1, 1) for s in (clean_scale, noise_scale))
        return clean_scale * self.clean + noise_scale * self.noise

    def predict(self):
        return self.call(self.student, self.x_t, self.t, self.cond)

    def loss(self, prediction, **options):
        return self.objective.loss(
            prediction, clean=self.clean, noise=self.noise, t=self.t, t_prime=self.t_prime, cond=self.cond, **options
        )

    def expected(self, prediction, **options):
        return algorithm1(
            self.frozen, self.layers, self.call, self.cond, clean=self.clean, noise=self.noise, model_output=prediction,
            t_prime=self.t_prime, at_t=self.at(self.t), at_t_prime=self.at(self.t_prime), kind=self.kind,
            **self.constants, **options,
        )  # fmt: skip

    def gradients(self, loss):
        """Of the mean loss, to the prediction and to all of the student's parameters as one vector."""
        prediction = self.predict()
        parameters = list(self.student.parameters())
        value = loss(prediction)
        to_prediction, *rest = torch.autograd.grad(value.mean(), [prediction, *parameters])
        return value.detach(), to_prediction, torch.cat([g.flatten() for g in rest])


def assert_equal_to_algorithm1(setup, loss, expected):
    for name, got, want in zip(
        ("loss", "to prediction", "to student"), setup.gradients(loss), setup.gradients(expected), strict=True
    ):
        assert distance(got, want) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("formulation", ["joint", "split"])
@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_loss_and_gradients_equal_algorithm_1(case, kind, formulation):
    setup = Setup(case, kind, formulation=formulation)
    assert_equal_to_algorithm1(
        setup, lambda p: setup.loss(p, reduction="none"), lambda p: setup.expected(p, formulation=formulation)
    )


@pytest.mark.parametrize("layers", [("mid_block",), ("down_blocks.0.resnets.0", "mid_block.attentions.0", "mid_block")])
@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_equals_algorithm_1_on_one_and_several_layers(name, layers):
    setup = Setup(kind="v_prediction", layers=layers, distance=name)
    assert_equal_to_algorithm1(
        setup, lambda p: setup.loss(p, reduction="none"), lambda p: setup.expected(p, distance=name)
    )


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_zero_terminal_snr_equals_algorithm_1_at_its_last_step(kind):
    setup = Setup("zero_snr", kind, t_range=None)
    setup.t, setup.t_prime = torch.tensor([999, 999, 10]), torch.tensor([500, 30, 999])
    setup.x_t = setup.mix(*setup.at(setup.t))
    assert_equal_to_algorithm1(setup, lambda p: setup.loss(p, reduction="none"), setup.expected)


@pytest.mark.parametrize("formulation", ["joint", "split"])
@pytest.mark.parametrize(
    ("case", "kind"), [("scaled_linear", "v_prediction"), ("linear", "flow_prediction"), ("edm", "edm")]
)
def test_an_x_t_of_the_users_own_goes_through_the_two_step_formula(case, kind, formulation):
    setup = Setup(case, kind, formulation=formulation)
    setup.x_t = setup.x_t + 0.3 * torch.randn_like(setup.x_t)
    assert_equal_to_algorithm1(
        setup,
        lambda p: setup.loss(p, x_t=setup.x_t, reduction="none"),
        lambda p: setup.expected(p, x_t=setup.x_t, formulation=formulation),
    )


@pytest.mark.parametrize("kind", NAMES)
def test_mse_weight_adds_that_much_of_the_mean_squared_error(kind):
    setup = Setup(kind=kind, mse_weight=0.3)
    alpha, sigma = setup.at(setup.t)
    target = {"epsilon": setup.noise, "sample": setup.clean, "v_prediction": setup.mix(-sigma, alpha)}[kind]
    assert_equal_to_algorithm1(
        setup,
        lambda p: setup.loss(p, reduction="none"),
        lambda p: setup.expected(p) + 0.3 * (p - target).square().mean((1, 2, 3)),
    )


def test_the_default_is_l_mse_plus_l_sp_of_normalised_features_at_weighted_times():
    """Decision 15. Wrapped with no options, and built by hand."""
    setup = Setup(kind="v_prediction")
    student = unet().eval()
    student.load_state_dict(setup.frozen.state_dict())
    wrapped = SelfPerceptualObjective.wrap(student, setup.schedule, prediction="v_prediction")
    built = SelfPerceptualObjective(
        schedule=setup.schedule, prediction="v_prediction", teacher=setup.objective.teacher, call=setup.call
    )
    sampler, seed = timesteps.Contributing(), torch.Generator
    setup.t_prime = sampler(setup.schedule, setup.clean, t=setup.t, generator=seed().manual_seed(3))
    weight = sampler.weight(setup.schedule, setup.t, setup.t_prime).float()
    alpha, sigma = setup.at(setup.t)
    target = setup.mix(-sigma, alpha)
    given = {"clean": setup.clean, "noise": setup.noise, "t": setup.t, "cond": setup.cond, "reduction": "none"}
    for objective in (wrapped, built):
        assert_equal_to_algorithm1(
            setup,
            lambda p, o=objective: o.loss(p, generator=seed().manual_seed(3), **given),
            lambda p: weight * setup.expected(p, distance="normalised") + (p - target).square().mean((1, 2, 3)),
        )


@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_the_default_equals_algorithm_1_and_the_mse_on_every_schedule(case, kind):
    setup = Setup(case, kind)
    objective = SelfPerceptualObjective(
        schedule=setup.schedule, prediction=setup.objective.prediction, teacher=setup.objective.teacher, call=setup.call,
        t_range=CASES[case][4].get("t_range"),
    )  # fmt: skip
    sampler, seed = timesteps.Contributing(), torch.Generator
    setup.t_prime = sampler(setup.schedule, setup.clean, t=setup.t, generator=seed().manual_seed(3))
    weight = sampler.weight(setup.schedule, setup.t, setup.t_prime).float()
    alpha, sigma = (s.float().view(-1, 1, 1, 1) for s in setup.at(setup.t))
    skip, out = 0.25 / (sigma**2 + 0.25), sigma / 2 / (sigma**2 + 0.25).sqrt()
    slope, rise = setup.constants.get("velocity", (0.0, 0.0))
    target = {
        "epsilon": setup.noise, "sample": setup.clean, "v_prediction": alpha * setup.noise - sigma * setup.clean,
        "flow_prediction": slope * setup.clean + rise * setup.noise, "edm": (setup.clean - skip * setup.x_t) / out,
    }[kind]  # fmt: skip
    given = {"clean": setup.clean, "noise": setup.noise, "t": setup.t, "cond": setup.cond, "reduction": "none"}
    assert_equal_to_algorithm1(
        setup,
        lambda p: objective.loss(p, generator=seed().manual_seed(3), **given),
        lambda p: weight * setup.expected(p, distance="normalised") + (p - target).square().mean((1, 2, 3)),
    )


def test_the_papers_options_are_those_that_differ_from_the_default():
    defaults = inspect.signature(SelfPerceptualObjective.__init__).parameters
    own = {name: p.default for name, p in defaults.items() if p.default is not p.empty}
    of_wrap = inspect.signature(SelfPerceptualObjective.wrap).parameters
    resolved = {"call", "output", "t", "t_prime"}  # None: what the adapter, the scheduler and the teacher say
    assert {name: of_wrap[name].default for name in own if name not in resolved} == {
        name: value for name, value in own.items() if name not in resolved
    }
    assert all(of_wrap[name].default is None for name in resolved)
    assert dict(PAPER) == {"distance": "mse", "mse_weight": 0.0, "t_prime": "uniform"}
    assert all(own[name] != value for name, value in PAPER.items())
    with pytest.raises(TypeError, match="does not support item assignment"):
        PAPER["mse_weight"] = 1.0


MIN_SNR = {  # Hang et al. 2023, section 3.4, for the prediction of noise, of the clean sample and of v
    "epsilon": lambda snr: snr.clamp(max=5) / snr,
    "sample": lambda snr: snr.clamp(max=5),
    "v_prediction": lambda snr: snr.clamp(max=5) / (snr + 1),
}


@pytest.mark.parametrize("kind", MIN_SNR)
def test_min_snr_weighs_the_error_of_the_clean_sample(kind):
    setup = Setup(kind=kind, weight="min_snr", mse_weight=0.0)
    alpha, sigma = setup.at(setup.t)
    assert (alpha**2 / sigma**2).min() < 5 < (alpha**2 / sigma**2).max()
    weight = MIN_SNR[kind]((alpha / sigma) ** 2).float()
    assert_equal_to_algorithm1(setup, lambda p: setup.loss(p, reduction="none"), lambda p: weight * setup.expected(p))


def test_a_callable_weight_multiplies_the_whole_loss_of_each_sample():
    plain, weighed = Setup(mse_weight=0.3), None
    torch.manual_seed(0)
    weighed = Setup(mse_weight=0.3, weight=lambda t: 1 + t / 100)
    prediction = plain.predict().detach()
    expected = (1 + plain.t / 100) * plain.loss(prediction, reduction="none")
    torch.testing.assert_close(weighed.loss(prediction, reduction="none"), expected)


def test_mean_is_the_mean_of_none():
    setup = Setup()
    prediction = setup.predict()
    each = setup.loss(prediction, reduction="none")
    assert each.shape == (3,)
    torch.testing.assert_close(setup.loss(prediction), each.mean())


# --- what holds exactly, for every pair, dtype and shape --------------------------------------------------------------

DTYPES = tuple(TOLERANCE)
MORE = [("linear", "-flow_prediction"), ("edm", "score"), ("scaled_linear", "score")]
OTHER = {"-flow_prediction": -parameterizations.FLOW_PREDICTION, "score": parameterizations.SCORE, "edm": edm(0.5)}
SHAPES = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), st.integers(1, 3).map(lambda n: (n, n, n, n))
)


def bare(case="scaled_linear", kind="epsilon", **options):
    """An objective whose teacher is the identity, so that samples of any shape pass."""
    schedule, *_, extra = CASES[case]
    options = {"t_range": extra.get("t_range"), "teacher": lambda x, t, cond: [x]} | options
    return PaperObjective(schedule=schedule, prediction=OTHER.get(kind, kind), **options)


def times(objective, count):
    """Times all over the range in which the objective is regular, the ends included."""
    schedule, (low, high) = objective.schedule, objective.t_range
    if isinstance(schedule, schedules.EDM):
        low, high = 0.002, 80.0
    grid = schedule.grid()
    grid = grid[(grid >= low) & (grid <= high)]
    return grid[torch.randint(len(grid), (count,))].to(torch.long if schedule.discrete else torch.float32)


@pytest.mark.parametrize(("case", "kind"), PAIRS + MORE)
@settings(max_examples=20)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_loss_is_exactly_zero_at_t_prime_equal_to_t(case, kind, shape, seed):
    assert_zero_at_t_prime_equal_to_t(bare(case, kind), shape, seed)


@pytest.mark.parametrize("name", DISTANCES)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_every_distance_is_exactly_zero_at_t_prime_equal_to_t(name, shape, seed):
    assert_zero_at_t_prime_equal_to_t(bare(distance=name), shape, seed)


def assert_zero_at_t_prime_equal_to_t(objective, shape, seed):
    torch.manual_seed(seed)
    t = times(objective, shape[0])
    for dtype in DTYPES:
        clean, noise, prediction = torch.randn(3, *shape).to(dtype)
        prediction.requires_grad_()
        loss = objective.loss(prediction, clean=clean, noise=noise, t=t, t_prime=t, reduction="none")
        assert loss.shape == shape[:1]
        assert (loss == 0).all(), dtype
        if prediction.numel():
            assert (torch.autograd.grad(loss.sum(), prediction)[0] == 0).all(), dtype


@pytest.mark.parametrize("formulation", ["joint", "split"])
@pytest.mark.parametrize(("case", "kind"), PAIRS + MORE)
@settings(max_examples=20)
@given(shape=SHAPES, seed=st.integers(0, 99), with_x_t=st.booleans())
def test_loss_of_a_perfect_prediction_is_exactly_zero(case, kind, formulation, shape, seed, with_x_t):
    torch.manual_seed(seed)
    objective = bare(case, kind, formulation=formulation, mse_weight=1.0)
    t, t_prime = times(objective, shape[0]), times(objective, shape[0])
    for dtype in DTYPES:
        clean, noise = torch.randn(2, *shape).to(dtype)
        x_t = objective.add_noise(clean, noise, t) if with_x_t else None
        prediction = objective.target(clean, noise, t).requires_grad_()
        loss = objective.loss(prediction, clean=clean, noise=noise, t=t, t_prime=t_prime, x_t=x_t, reduction="none")
        assert (loss == 0).all(), dtype
        if prediction.numel():
            assert (torch.autograd.grad(loss.sum(), prediction)[0] == 0).all(), dtype


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 3, 4, 4)])
def test_an_empty_batch_can_be_trained_on(shape):
    objective = bare(mse_weight=1.0)
    clean, noise, prediction = torch.randn(3, *shape)
    t = times(objective, shape[0])
    loss = objective.loss(prediction.requires_grad_(), clean=clean, noise=noise, t=t, t_prime=t)
    loss.backward()
    assert loss == 0
    assert prediction.grad.shape == shape


@given(
    seed=st.integers(0, 99),
    pair=st.sampled_from(PAIRS),
    n=st.integers(2, 4),
    formulation=st.sampled_from(["joint", "split"]),
)
def test_each_sample_of_a_square_batch_has_its_own_times(seed, pair, n, formulation):
    torch.manual_seed(seed)
    objective = bare(*pair, formulation=formulation, mse_weight=0.5, weight="min_snr")
    t, t_prime = times(objective, n), times(objective, n)
    tensors = torch.randn(4, n, n, n, n, dtype=torch.float64)

    def loss(part):
        prediction, clean, noise, x_t = (x[part] for x in tensors)
        return objective.loss(
            prediction, clean=clean, noise=noise, x_t=x_t, t=t[part], t_prime=t_prime[part], reduction="none"
        )

    together, alone = loss(slice(None)), torch.cat([loss(slice(i, i + 1)) for i in range(n)])
    torch.testing.assert_close(together, alone, rtol=TOLERANCE[torch.float64], atol=0)


@pytest.mark.parametrize("size", [(4, 5, 5), (6, 4)], ids=["maps", "tokens"])
@pytest.mark.parametrize("name", ["mse", "mae", "huber", "normalised"])
def test_features_of_batch_times_frames_are_compared_frame_by_frame(name, size):
    clean, noise, prediction = torch.randn(3, 2, 3, *size)  # (B, frames, *)
    t, t_prime = torch.tensor([[100, 500], [700, 20]])
    seen = []

    def teacher(x, t, cond):
        seen.append(x.flatten(0, 1))  # (B · frames, *), as video models have it
        return seen[-1:]

    loss = bare(distance=name, teacher=teacher).loss(
        prediction, clean=clean, noise=noise, t=t, t_prime=t_prime, reduction="none"
    )
    assert distance(loss, DISTANCES[name](*seen).view(2, 3).mean(1)) < TOLERANCE[torch.float32]


def test_features_that_do_not_divide_by_the_batch_are_refused():
    with pytest.raises(
        ValueError, match=r"a feature has shape \(3, 4\), expected its first dimension to be the batch of 2"
    ):
        bare(teacher=lambda x, t, cond: [x.flatten(0, 1)[:3]]).loss(X, clean=X, noise=X, t=T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_low_precision_is_close_to_float64(case, kind, dtype):
    objective, t = bare(case, kind), torch.tensor(CASES[case][-1]["t"])
    clean, noise, prediction = torch.randn(3, 3, 40).to(dtype)
    t_prime = t.flip(0)
    low, high = (
        objective.loss(p, clean=x, noise=e, t=t, t_prime=t_prime, reduction="none")
        for p, x, e in ((prediction, clean, noise), (prediction.double(), clean.double(), noise.double()))
    )
    assert low.dtype == torch.float32
    assert distance(low, high) < TOLERANCE[dtype]


@pytest.mark.parametrize("formulation", ["joint", "split"])
@pytest.mark.parametrize(
    ("case", "kind"), [("scaled_linear", "v_prediction"), ("linear", "flow_prediction"), ("edm", "edm")]
)
def test_gradcheck_of_the_whole_objective(case, kind, formulation):
    schedule, *_, extra = CASES[case]
    student = MLP().double()
    objective = PaperObjective.wrap(
        student, schedule, prediction=OTHER.get(kind, kind), layers=["first", "middle"], formulation=formulation,
        mse_weight=0.5, call=lambda model, x, t, cond: model(x, extra["unit"](t.double()) / 1000),
    )  # fmt: skip
    t, t_prime = torch.tensor(extra["t"]), torch.tensor(extra["t_prime"])
    clean, noise, prediction, x_t = torch.randn(4, 3, 5, dtype=torch.float64)
    prediction.requires_grad_()
    x_t.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, x: objective.loss(p, clean=clean, noise=noise, t=t, t_prime=t_prime, x_t=x), (prediction, x_t)
    )


# --- how it is used ---------------------------------------------------------------------------------------------------


def small(student=None, **options):
    student = student or ConvNet()
    objective = PaperObjective.wrap(
        student, **{"schedule": schedules.Linear(), "prediction": "v_prediction", "layers": "body"} | options
    )
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    return student, objective, torch.randn(4, 3, 6, 6)


def test_calling_equals_loss_with_the_same_draws():
    setup = Setup("linear", "v_prediction")
    given_all = setup.objective(
        setup.student, setup.clean, cond=setup.cond, noise=setup.noise, t=setup.t, t_prime=setup.t_prime
    )
    x_t = setup.objective.add_noise(setup.clean, setup.noise, setup.t)
    prediction = setup.call(setup.student, x_t, setup.t, setup.cond)
    assert torch.equal(given_all, setup.loss(prediction))


def test_t_then_noise_then_t_prime_come_from_the_generator():
    student, objective, clean = small()
    loss = objective(student, clean, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    t = timesteps.Uniform()(objective.schedule, clean, generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    prediction = student(objective.add_noise(clean, noise, t), t)
    assert torch.equal(loss, objective.loss(prediction, clean=clean, noise=noise, t=t, generator=generator))
    assert objective.rng_state() is None, "the objective's own generator was not touched"


def test_nothing_is_drawn_from_the_global_generator():
    student, objective, clean = small()
    before = torch.get_rng_state()
    objective(student, clean)
    assert torch.equal(before, torch.get_rng_state())


def test_the_students_dropout_stream_is_what_it_is_without_the_objective():
    student, objective, clean = small(ConvNet(dropout=0.5))
    torch.manual_seed(1)
    student(clean, torch.zeros(4))
    plain = torch.get_rng_state()
    torch.manual_seed(1)
    objective(student.train(), clean)
    assert torch.equal(plain, torch.get_rng_state())


def test_seed_fixes_the_draws():
    torch.manual_seed(5)
    losses = []
    for seed in (5, 5, None, 6):
        torch.manual_seed(5)
        student, objective, clean = small(seed=seed)
        losses.append(objective(student, clean).item())
    assert losses[0] == losses[1] == losses[2], "the default is torch's initial seed"
    assert losses[0] != losses[3]


def test_each_rank_draws_its_own(monkeypatch):
    losses = []
    for rank, seed in (("3", 5), ("0", 8), ("0", 5), ("0", 5)):
        monkeypatch.setenv("RANK", rank)
        torch.manual_seed(0)
        student, objective, clean = small(seed=seed)
        losses.append(objective(student, clean).item())
    assert len(set(losses)) == 3  # also no rank's stream is another seed's
    assert losses[2] == losses[3]


def stream():
    """The state of the generator after an objective's first call."""
    objective = bare(seed=3)
    objective(lambda x, t: x, X)
    return objective.rng_state()


def test_the_rank_is_that_of_the_process_group_or_of_the_launcher(monkeypatch, tmp_path):
    monkeypatch.delenv("RANK", raising=False)
    alone = stream()
    for rank, same in (("0", True), ("none", True), ("", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert torch.equal(stream(), alone) == same
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert torch.equal(stream(), alone)  # rank 0, whatever the variable says
    finally:
        torch.distributed.destroy_process_group()


def test_a_seed_gives_the_same_draws_in_every_release():
    objective = bare(seed=3)
    objective(lambda x, t: x, X)
    assert objective.times["t"].tolist() == [244, 138]


def test_the_own_stream_is_not_torchs_of_the_same_seed():
    torch.manual_seed(0)
    student, objective, clean = small()
    seen = []
    objective.call = lambda model, x_t, t, cond: seen.append(x_t) or model(x_t, t)
    t = torch.full((len(clean),), objective.schedule.high, dtype=torch.float32)
    objective(student, clean, t=t)
    torch.manual_seed(0)
    alpha, sigma = objective.schedule(t)
    torchs = alpha[0].float() * clean + sigma[0].float() * torch.randn(clean.shape)
    assert not torch.allclose(seen[0], torchs)


def test_rng_state_continues_the_stream():
    student, objective, clean = small()
    objective(student, clean)
    state = objective.rng_state()
    expected = [objective(student, clean).item() for _ in range(2)]
    resumed = PaperObjective(schedule=objective.schedule, prediction="v_prediction", teacher=objective.teacher, seed=99)
    resumed.set_rng_state(state)
    assert [resumed(student, clean).item() for _ in range(2)] == expected


def test_rng_state_from_before_the_first_use_can_be_set():
    student, objective, clean = small(seed=3)
    expected = copy.deepcopy(objective)(student, clean)
    objective.set_rng_state(objective.rng_state())
    assert torch.equal(objective(student, clean), expected)


def test_a_state_that_is_none_is_refused_and_nothing_is_changed():
    student, objective, clean = small()
    objective(student, clean)
    before = objective.rng_state()
    with pytest.raises(TypeError, match="`state` is 3, expected what `rng_state` gave, a uint8 tensor, or None"):
        objective.set_rng_state(3)
    for state in (torch.zeros(3, dtype=torch.uint8), torch.zeros(before.shape)):
        with pytest.raises(
            ValueError, match=r"`state` is no state of a generator on .*cpu.*: .*Pass what `rng_state` gave"
        ):
            objective.set_rng_state(state)
    with pytest.raises(ValueError, match=r"`state` is no state of a generator on .*meta"):
        objective.set_rng_state(before, "meta")
    assert torch.equal(objective.rng_state(), before)
    objective.set_rng_state(None)
    assert objective.rng_state() is None


def test_check_draws_from_the_generator_it_is_given():
    student, objective, clean = small()
    reports = [objective.check(student, clean, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert str(reports[0]) == str(reports[1]) != str(reports[2])


def test_loss_is_the_same_without_a_graph():
    setup = Setup()
    prediction = setup.predict()
    with_graph = setup.loss(prediction)
    with torch.no_grad():
        without = setup.loss(prediction)
    assert with_graph.requires_grad
    assert not without.requires_grad
    assert torch.equal(with_graph, without)


def test_first_pass_may_be_an_evaluation():
    expected = Setup()
    torch.manual_seed(0)
    setup = Setup()
    with torch.no_grad():
        setup.loss(setup.predict())
    for got, want in zip(setup.gradients(setup.loss), expected.gradients(expected.loss), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("formulation", ["joint", "split"])
def test_nested_samples_equal_algorithm_1_on_the_flat_ones(formulation):
    student = TwoStreams()

    def nest(x):
        return {"image": x[:, :75].view(-1, 3, 5, 5), "sound": x[:, 75:]}

    def call(model, x, t, cond):
        return torch.cat([out.flatten(1) for out in model(nest(x), t).values()], 1)

    frozen = freeze(student)
    objective = PaperObjective.wrap(
        student, schedules.Linear(), prediction="flow_prediction", layers=["see", "join"], formulation=formulation
    )
    clean, noise, flat = torch.randn(3, 4, 79)
    flat.requires_grad_()
    t, t_prime = torch.rand(2, 4)
    loss = objective.loss(nest(flat), clean=nest(clean), noise=nest(noise), t=t, t_prime=t_prime)
    expected = algorithm1(
        frozen, ["see", "join"], call, {}, clean=clean, noise=noise, model_output=flat, t_prime=t_prime,
        at_t=(1 - t, t), at_t_prime=(1 - t_prime, t_prime), kind="flow_prediction", formulation=formulation,
    ).mean()  # fmt: skip
    assert distance(loss, expected) < TOLERANCE[torch.float32]
    assert distance(*(torch.autograd.grad(x, flat)[0] for x in (loss, expected))) < TOLERANCE[torch.float32]
    called = objective(student, nest(clean), noise=nest(noise), t=t, t_prime=t_prime)
    by_hand = student(objective.add_noise(nest(clean), nest(noise), t), t)
    assert torch.equal(called, objective.loss(by_hand, clean=nest(clean), noise=nest(noise), t=t, t_prime=t_prime))


def test_nested_samples_may_be_tuples():
    objective = bare("linear", "v_prediction", teacher=lambda x, t, cond: list(x))
    clean, noise = (torch.randn(2, 3), torch.randn(2, 4, 4)), (torch.randn(2, 3), torch.randn(2, 4, 4))
    t, t_prime = torch.rand(2, 2) * 0.8 + 0.1
    perfect = objective.target(clean, noise, t)
    assert isinstance(perfect, tuple)
    assert objective.loss(perfect, clean=clean, noise=noise, t=t, t_prime=t_prime) == 0
    assert objective.loss(noise, clean=clean, noise=noise, t=t, t_prime=t_prime) > 0


def test_the_prediction_is_taken_out_of_what_models_give():
    for wrapped in (lambda y: y, lambda y: (y, X), lambda y: [y, X], lambda y: UNet2DOutput(sample=y)):
        objective, y = bare(), torch.randn(X.shape)
        given = {"clean": X, "noise": X, "t": T, "t_prime": T + 9}
        assert torch.equal(objective.loss(wrapped(y), **given), objective.loss(y, **given))
    nested = bare(teacher=lambda x, t, cond: [[part[None] for part in x]])
    clean = [torch.randn(1, 3), torch.randn(1, 4)]  # a list of samples of different sizes is itself the prediction
    assert nested.loss(clean, clean=clean, noise=clean, t=T).isfinite()
    with pytest.raises(ValueError, match="`model_pred` is empty"):
        bare().loss((), clean=X, noise=X, t=T)


def test_a_teacher_may_say_its_own_t_prime():
    def teacher(x, t, cond):
        return [x]

    assert isinstance(small(teacher=teacher, t_prime=None)[1].t_prime, timesteps.Contributing)
    teacher.t_prime = "clean"
    assert isinstance(small(teacher=teacher, t_prime=None)[1].t_prime, timesteps.Clean)
    assert isinstance(small(teacher=teacher, t_prime="near")[1].t_prime, timesteps.Near)


def test_wrap_copies_as_it_is_told():
    student, objective, clean = small(truncate=False)
    whole = sum(p.numel() for p in student.parameters())
    head = sum(p.numel() for p in student.head.parameters())
    objective(student, clean)
    assert objective.teacher.parameters_held == whole
    assert small(example=(clean, None))[1].teacher.parameters_held == whole - head
    assert {p.dtype for p in small(teacher_dtype=torch.bfloat16)[1].teacher.module.parameters()} == {torch.bfloat16}
    assert small(features="all")[1].teacher.features == "all"


def test_an_mse_without_weight_may_overflow():
    objective = bare(teacher=lambda x, t, cond: [torch.tanh(x)])
    loss = objective.loss(1e30 * (1 + X), clean=X, noise=X, t=T)
    assert objective.terms["mse"].isinf().all()
    assert loss.isfinite()


def test_contributing_weighs_the_perceptual_loss_and_not_the_mse():
    drawn, given = (bare(t_prime=kind, mse_weight=0.5, seed=3) for kind in ("contributing", "uniform"))
    options = {"clean": X, "noise": X.sin(), "t": T, "reduction": "none"}
    loss = drawn.loss(X.cos(), **options)
    t_prime = drawn.times["t_prime"]
    given.loss(X.cos(), **options, t_prime=t_prime)
    weight = drawn.t_prime.weight(drawn.schedule, T, t_prime).float()
    assert (weight != 1).all()
    torch.testing.assert_close(drawn.terms["sp"], weight * given.terms["sp"])
    torch.testing.assert_close(loss, weight * given.terms["sp"] + 0.5 * given.terms["mse"])
    by_hand = drawn.loss(X.cos(), **options, t_prime=t_prime)
    torch.testing.assert_close(by_hand, given.terms["sp"] + 0.5 * given.terms["mse"])  # times of one's own: no weight


def test_clean_compares_the_clean_estimate_with_the_clean_sample():
    objective = bare("linear", "flow_prediction", t_prime="clean")
    clean, y, t = X.sin(), X.cos(), torch.tensor([0.25, 0.5])
    loss = objective.loss(y, clean=clean, noise=0 * X, t=t, reduction="none")
    of_each = t.view(2, 1, 1)
    expected = (1 - of_each) * clean - of_each * y - clean  # x̂_0 = x_t − t ŷ
    torch.testing.assert_close(loss, expected.square().mean((1, 2)))


def test_what_is_drawn_has_the_dtype_of_the_sample():
    seen = []
    objective = bare("linear", "v_prediction", t_range=None)
    for dtype in DTYPES:
        objective(lambda x, t: seen.append(x) or x, X.to(dtype))
        assert seen[-1].dtype == dtype


def test_to_moves_the_teacher_and_returns_the_objective():
    student, objective, clean = small()
    assert objective.to(dtype=torch.bfloat16) is objective
    assert {p.dtype for p in objective.teacher.module.parameters()} == {torch.bfloat16}
    assert objective.to(torch.float64) is objective
    assert {p.dtype for p in objective.teacher.module.parameters()} == {torch.float64}
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert objective(student, clean).isfinite()
    assert bare().to("cpu") is not None, "a teacher that cannot be moved is left alone"


def test_before_the_first_call_nothing_is_recorded():
    objective = bare()
    assert objective.terms == objective.times == objective.left_out == {}
    assert objective.rng_state() is None


def test_terms_hold_both_losses_without_their_graph():
    setup = Setup(mse_weight=0.3, weight="min_snr")
    prediction = setup.predict()
    setup.loss(prediction)
    assert set(setup.objective.terms) == {"sp", "mse"}
    assert not any(term.requires_grad for term in setup.objective.terms.values())
    assert distance(setup.objective.terms["sp"], setup.expected(prediction)) < TOLERANCE[torch.float32]
    mse = (prediction - setup.noise).square().mean((1, 2, 3))
    assert distance(setup.objective.terms["mse"], mse) < TOLERANCE[torch.float32]


def test_the_condition_gets_no_gradient_through_the_teacher():
    student = MLP()
    objective = PaperObjective.wrap(student, schedules.Linear(), prediction="v_prediction", layers="middle")
    prediction, shift = torch.randn(4, 5, requires_grad=True), torch.ones(4, 7, requires_grad=True)
    clean, noise = torch.randn(2, 4, 5)
    objective.loss(prediction, clean=clean, noise=noise, t=torch.rand(4), cond={"shift": shift}).backward()
    assert shift.grad is None
    assert prediction.grad.abs().sum() > 0


def test_nothing_of_the_objective_enters_the_student():
    student, objective, clean = small(ConvNet(dropout=0.5))
    keys, parameters = list(student.state_dict()), list(student.parameters())
    student.objective = objective
    objective(student, clean).backward()
    student.train().requires_grad_(True).to(torch.float64)
    assert list(student.state_dict()) == keys
    assert all(a is b for a, b in zip(student.parameters(), parameters, strict=True))
    teacher = objective.teacher.module
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}


# --- what is refused --------------------------------------------------------------------------------------------------

PREDICTIONS = "'epsilon', 'sample', 'v_prediction', 'flow_prediction'"
SAMPLERS = "'uniform', 'near', 'shifted', 'logit_normal', 'contributing', or a callable"
BAD_CONSTRUCTION = {
    "schedule is a function": (TypeError, "`schedule` is a function, expected", {"schedule": lambda t: t}),
    "unknown prediction": (
        ValueError,
        f"unknown prediction 'velocity', expected one of {PREDICTIONS}",
        {"prediction": "velocity"},
    ),
    "prediction is a number": (TypeError, "`prediction` is a int, expected", {"prediction": 3}),
    "unknown distance": (
        ValueError,
        "unknown distance 'l2', expected one of 'mse', 'mae', 'huber', 'cosine', 'normalised'",
        {"distance": "l2"},
    ),
    "distance is a number": (TypeError, "`distance` is 2, expected one of 'mse'", {"distance": 2}),
    "unknown formulation": (
        ValueError,
        "unknown formulation 'both', expected 'joint' or 'split'",
        {"formulation": "both"},
    ),
    "unknown t": (ValueError, f"unknown `t` 'lognormal', expected one of {SAMPLERS}", {"t": "lognormal"}),
    "t near itself": (ValueError, "`t` is 'near', which places t' relative to t. Use 'uniform'", {"t": "near"}),
    "unknown t_prime": (ValueError, f"unknown `t_prime` 'close', expected one of {SAMPLERS}", {"t_prime": "close"}),
    "t_prime is a number": (TypeError, "`t_prime` is 40, expected one of 'uniform'", {"t_prime": 40}),
    "negative mse_weight": (ValueError, "`mse_weight` is -1, expected a number of at least 0", {"mse_weight": -1}),
    "mse_weight is nan": (ValueError, "`mse_weight` is nan", {"mse_weight": math.nan}),
    "mse_weight is infinite": (ValueError, "`mse_weight` is inf", {"mse_weight": math.inf}),
    "mse_weight is a string": (ValueError, "`mse_weight` is '1'", {"mse_weight": "1"}),
    "unknown weight": (
        ValueError,
        "unknown weight 'snr', expected 'none', 'min_snr', or a callable",
        {"weight": "snr"},
    ),
    "weight is a tensor": (TypeError, "`weight` is tensor.*expected 'none', 'min_snr'", {"weight": torch.ones(2)}),
    "no teacher": (TypeError, "`teacher` is a NoneType, expected a callable", {"teacher": None}),
    "t_range is a string": (TypeError, "`t_range` is 'ab', expected a pair", {"t_range": "ab"}),
    "t_range has three ends": (TypeError, "`t_range` is .0, 1, 2., expected a pair", {"t_range": (0, 1, 2)}),
    "t_range is reversed": (ValueError, "`t_range` is .5, 1., expected 0 <= low < high <= 999", {"t_range": (5, 1)}),
    "t_range is one time": (ValueError, "`t_range` is .5, 5., expected 0 <= low < high", {"t_range": (5, 5)}),
    "t_range is a number": (TypeError, "`t_range` is 5, expected a pair", {"t_range": 5}),
    "t_range begins too early": (ValueError, "`t_range` is .-1, 5., expected 0 <= low", {"t_range": (-1, 5)}),
    "t_range is too long": (ValueError, "`t_range` is .0, 1000., expected 0 <= low", {"t_range": (0, 1000)}),
    "t_range holds nan": (ValueError, "`t_range` is .nan, 1., expected", {"t_range": (math.nan, 1)}),
    "call is a number": (TypeError, "`call` is", {"call": 3}),
    "output is a number": (TypeError, "`output` is", {"output": 3}),
    "seed is a string": (TypeError, "`seed` is", {"seed": "a"}),
    "seed is a fraction": (TypeError, "`seed` is", {"seed": 1.5}),
}


@pytest.mark.parametrize(("error", "message", "options"), BAD_CONSTRUCTION.values(), ids=BAD_CONSTRUCTION)
def test_construction_refuses(error, message, options):
    good = {"schedule": schedules.Discrete.linear(), "prediction": "epsilon", "teacher": lambda x, t, cond: [x]}
    with pytest.raises(error, match=message):
        PaperObjective(**good | options)


SINGULAR = [
    (schedules.Linear(), "epsilon", r"at t = 1 of Linear.*alpha is 0.*'epsilon'.*Use 'v_prediction'.*t_range"),
    (schedules.Linear(), "sample", r"at t = 0 of Linear.*sigma is 0.*'sample'"),
    (schedules.Cosine(), "epsilon", r"at t = 1 of Cosine\(\).*'epsilon'"),
    (
        schedules.Discrete.linear().zero_terminal_snr(),
        "epsilon",
        r"at t = 999 of Discrete\(1000 steps, zero terminal SNR\).*'epsilon'",
    ),
    (schedules.Interpolant(lambda t: t, lambda t: 1 - t), "epsilon", r"at t = 0 of Interpolant.*'epsilon'"),
    (schedules.Discrete.linear(), "flow_prediction", r"discrete schedule.*'flow_prediction'"),
]


@pytest.mark.parametrize(("schedule", "kind", "message"), SINGULAR)
def test_a_singular_pair_is_refused_at_construction(schedule, kind, message):
    with pytest.raises(ValueError, match=message):
        PaperObjective(schedule=schedule, prediction=kind, teacher=lambda x, t, cond: [x])


def test_a_singular_end_may_be_left_out_by_t_range():
    objective = bare("zero_snr", "epsilon")
    clean = torch.randn(512, 2)
    drawn = objective.t(objective.schedule, clean, generator=None)
    assert drawn.max() <= 998
    with pytest.raises(ValueError, match="`t` holds 999, expected times from 0 to 998"):
        objective.loss(clean, clean=clean, noise=clean, t=torch.full((512,), 999))


def test_a_singular_end_may_be_left_out_by_the_sampler_of_t():
    for kind, sampler, t_range in (
        ("epsilon", timesteps.Uniform(high=0.5), (0, 0.5)),
        ("sample", timesteps.Uniform(low=0.25), (0.25, 1)),
        ("v_prediction", timesteps.Uniform(low=0.25, high=0.5), (0, 1)),  # singular nowhere
        ("epsilon", timesteps.LogitNormal(low=0.25, high=0.5), (0.25, 0.5)),
    ):
        objective = bare("linear", kind, t=sampler, t_range=None)
        assert objective.t_range == t_range
        assert objective(lambda x, t: x, torch.randn(4, 3)).isfinite()
        with pytest.raises(ValueError, match=r"`t` holds 2, expected times from"):
            objective.loss(X, clean=X, noise=X, t=torch.tensor([2.0, 0.3]))


def test_times_that_a_callable_draws_are_looked_at():
    def drawing(value):
        return lambda schedule, like, /, *, t, generator: torch.full((len(like),), value)

    for value, refused in ((0.75, False), (0.8, True), (0.2, True), (0.25, False)):
        objective = bare("linear", "v_prediction", t=drawing(value), t_range=(0.25, 0.75))
        if refused:
            with pytest.raises(ValueError, match=rf"`t` holds {value}, expected times from 0.25 to 0.75"):
                objective(lambda x, t: x, X)
        else:
            assert objective(lambda x, t: x, X).isfinite()
    objective = bare("linear", "v_prediction", t_prime=drawing(1.0), t_range=(0.25, 0.75))
    assert objective(lambda x, t: x, X).isfinite(), "t' is drawn from the whole schedule"
    objective = bare("linear", "v_prediction", t=drawing(torch.tensor(0.5, device="meta")), t_range=(0.25, 0.75))
    objective.t = lambda schedule, like, /, *, t, generator: torch.full((len(like),), 0.5, device="meta")
    with pytest.raises(ValueError, match="`t` is on meta, expected cpu"):
        objective(lambda x, t: x, X)


def test_t_range_does_not_widen_the_sampler_of_t():
    objective = bare("linear", "v_prediction", t=timesteps.Uniform(low=0.4, high=0.5), t_range=(0.0, 0.75))
    drawn = objective.t(objective.schedule, torch.randn(64, 1), generator=None)
    assert drawn.min() >= 0.4
    assert drawn.max() <= 0.5


@pytest.mark.parametrize(("t_range", "end"), [((0.1, 0.6), 0.6), ((0.7, 0.9), 0.7)])
def test_the_ends_of_t_range_are_times_of_it_in_float32(t_range, end):
    objective = bare("linear", "v_prediction", t_range=t_range)
    clean = torch.randn(2, 3)
    assert objective.loss(clean, clean=clean, noise=clean, t=torch.full((2,), end)).isfinite()


X = torch.arange(24.0).view(2, 3, 4)
T = torch.tensor([1, 2])
BAD_LOSS = {
    "prediction of another shape": (
        ValueError,
        r"`model_pred` has shape \(2, 3\), expected \(2, 3, 4\), that of `clean`",
        {"model_pred": X[..., 0]},
    ),
    "prediction that would broadcast": (ValueError, r"`model_pred` has shape \(2, 1, 4\)", {"model_pred": X[:, :1]}),
    "no prediction": (TypeError, "`model_pred` is a NoneType, expected a tensor", {"model_pred": None}),
    "prediction on meta": (ValueError, "`model_pred` is on meta, expected cpu", {"model_pred": X.to("meta")}),
    "noise of another shape": (
        ValueError,
        r"`noise` has shape \(2, 3, 1\), expected \(2, 3, 4\)",
        {"noise": X[..., :1]},
    ),
    "noise on meta": (ValueError, "`noise` is on meta, expected cpu, the device of `clean`", {"noise": X.to("meta")}),
    "x_t of another shape": (ValueError, r"`x_t` has shape \(1, 3, 4\), expected \(2, 3, 4\)", {"x_t": X[:1]}),
    "integer clean": (
        TypeError,
        r"`clean` has dtype torch.int64, expected a floating dtype. Pass `clean.float\(\)`",
        {"clean": X.long()},
    ),
    "complex clean": (TypeError, "`clean` has dtype torch.complex64", {"clean": X.to(torch.complex64)}),
    "clean without a batch": (ValueError, r"`clean` has shape \(\), expected \(B, \*\)", {"clean": X[0, 0, 0]}),
    "clean is a list of numbers": (TypeError, r"`clean\[0\]` is a float", {"clean": [1.0, 2.0]}),
    "clean is empty": (ValueError, "`clean` is empty", {"clean": ()}),
    "nested clean, plain noise": (
        ValueError,
        r"`noise` has shape \(2, 3, 4\), expected \{'a': \(2, 3, 4\)\}",
        {"clean": {"a": X}},
    ),
    "nested clean of two batch sizes": (
        ValueError,
        "`clean` .*differ in the number of samples",
        {"clean": {"a": X, "b": X[:1]}},
    ),
    "t negative": (ValueError, "`t` holds -1, expected times from 0 to 999", {"t": torch.tensor([-1, 2])}),
    "t too large": (ValueError, "`t` holds 1000, expected times from 0 to 999", {"t": torch.tensor([1000, 2])}),
    "t is nan": (ValueError, "`t` holds NaN, expected times from 0 to 999", {"t": torch.tensor([math.nan, 2])}),
    "t is infinite": (ValueError, "`t` holds inf, expected", {"t": torch.tensor([math.inf, 2])}),
    "t is bfloat16": (TypeError, "`t` has dtype torch.bfloat16, which rounds 999 to 1000", {"t": T.bfloat16()}),
    "t is bool": (TypeError, "`t` has dtype torch.bool, expected", {"t": T.bool()}),
    "t of rank 4": (
        ValueError,
        r"`t` has shape \(2, 1, 1, 1\), expected \(2,\).*`t.flatten\(\)`",
        {"t": T.view(2, 1, 1, 1)},
    ),
    "t without a batch": (ValueError, r"`t` has shape \(\), expected \(2,\)", {"t": T[0]}),
    "t of another batch": (ValueError, r"`t` has shape \(3,\), expected \(2,\)", {"t": torch.tensor([1, 2, 3])}),
    "t with a fraction": (ValueError, r"`t` holds a fraction, expected whole indices.*`t.long\(\)`", {"t": T + 0.5}),
    "t is a number": (TypeError, r"`t` is int 5, expected a tensor of shape \(B,\)", {"t": 5}),
    "t on meta": (ValueError, "`t` is on meta, expected cpu", {"t": T.to("meta")}),
    "t_prime negative": (ValueError, "`t_prime` holds -1, expected times from 0 to 999", {"t_prime": T - 2}),
    "t_prime of another batch": (ValueError, r"`t_prime` has shape \(1,\), expected \(2,\)", {"t_prime": T[:1]}),
    "t_prime is bfloat16": (TypeError, "`t_prime` has dtype torch.bfloat16", {"t_prime": T.bfloat16()}),
    "unknown reduction": (ValueError, "unknown reduction 'sum', expected 'mean' or 'none'", {"reduction": "sum"}),
    "generator is a number": (TypeError, "`generator` is a.* int, expected a torch.Generator", {"generator": 3}),
    "cond is a tensor": (
        TypeError,
        r"^`cond` is a Tensor, expected a mapping of the model's.*such as `\{'encoder_hidden_states': text\}`\.$",
        {"cond": X},
    ),
    "cond is a list": (TypeError, "`cond` is", {"cond": [X]}),
}


@pytest.mark.parametrize(("error", "message", "options"), BAD_LOSS.values(), ids=BAD_LOSS)
def test_loss_refuses(error, message, options):
    arguments = {"model_pred": X, "clean": X, "noise": X, "t": T} | options
    with pytest.raises(error, match=message):
        bare("scaled_linear", "epsilon").loss(arguments.pop("model_pred"), **arguments)


CALLED = [name for name in BAD_LOSS if not {"model_pred", "x_t"} & BAD_LOSS[name][2].keys()]


@pytest.mark.parametrize("name", CALLED)
def test_calling_refuses_the_same(name):
    error, message, options = BAD_LOSS[name]
    arguments = {"clean": X, "noise": X, "t": T} | options
    with pytest.raises(error, match=message):
        bare("scaled_linear", "epsilon")(lambda x, t, **cond: x, arguments.pop("clean"), **arguments)


@pytest.mark.parametrize("method", ["add_noise", "target"])
@pytest.mark.parametrize("name", [n for n in CALLED if BAD_LOSS[n][2].keys() <= {"clean", "noise", "t"}])
def test_add_noise_and_target_refuse_the_same(method, name):
    error, message, options = BAD_LOSS[name]
    arguments = {"clean": X, "noise": X, "t": T} | options
    with pytest.raises(error, match=message):
        getattr(bare("scaled_linear", "epsilon"), method)(*arguments.values())


def test_what_a_swap_would_change_silently_is_keyword_only():
    objective = bare()
    with pytest.raises(TypeError, match="positional"):
        objective.loss(X, X, X, T)
    with pytest.raises(TypeError, match="positional"):
        objective(lambda x, t: x, X, X, T)


CALLABLES = {
    "teacher gives a tensor": (
        TypeError,
        "`teacher` gives .*expected a list of features",
        {"teacher": lambda x, t, c: x},
    ),
    "teacher gives nothing": (
        TypeError,
        "`teacher` gives .*expected a list of features",
        {"teacher": lambda x, t, c: []},
    ),
    "teacher loses the batch": (
        ValueError,
        r"feature has shape \(3, 4\), expected",
        {"teacher": lambda x, t, c: [x[0]]},
    ),
    "teacher gives as many as it likes": (
        ValueError,
        "`teacher` gives",
        {"teacher": lambda x, t, c: [x] * (2 if torch.is_grad_enabled() else 1)},
    ),
    "distance loses the batch": (
        ValueError,
        r"`distance` gives \(\), expected one value per sample, shape \(2,\)",
        {"distance": lambda f, g: (f - g).mean()},
    ),
    "weight of another shape": (
        ValueError,
        r"`weight` gives \(2, 1\), expected one weight per sample, shape \(2,\)",
        {"weight": lambda t: torch.ones(2, 1)},
    ),
    "weight is a constant": (
        ValueError,
        "`weight` gives float, expected one weight per sample",
        {"weight": lambda t: 1.0},
    ),
    "t_prime of another batch": (
        ValueError,
        r"`t_prime` has shape \(5,\), expected \(2,\)",
        {"t_prime": lambda s, x, /, *, t, generator: torch.zeros(5)},
    ),
    "t_prime outside": (
        ValueError,
        "`t_prime` holds 1002, expected times from 0 to 999",
        {"t_prime": lambda s, x, /, *, t, generator: t + 1000},
    ),
}


@pytest.mark.parametrize(("error", "message", "options"), CALLABLES.values(), ids=CALLABLES)
def test_a_callable_that_gives_the_wrong_thing_is_named(error, message, options):
    with pytest.raises(error, match=message):
        bare(**options).loss(X, clean=X, noise=X, t=T)


WRAP = {
    "no such layer": (
        ValueError,
        "no module 'mid' in ConvNet; at its top level: stem, norm, dropout, body, head",
        {"layers": "mid"},
    ),
    "no such inner layer": (
        ValueError,
        "no module 'body.conv' in ConvNet; in body: no module",
        {"layers": ["body.conv"]},
    ),
    "layers is a number": (TypeError, "`layers` is 3, expected a dotted name or a list", {"layers": 3}),
    "layers is empty": (TypeError, r"`layers` is \[\], expected a dotted name", {"layers": []}),
    "no layers for an unknown class": (
        ValueError,
        "the middle of ConvNet cannot be told.*Pass `layers=",
        {"layers": None},
    ),
    "no prediction": (ValueError, "`prediction` is missing", {"prediction": None}),
    "schedule is a pair of functions": (
        TypeError,
        "`schedule` is a tuple, expected a diffusers scheduler or",
        {"schedule": (1, 2)},
    ),
    "teacher is lora, without LoRA": (ValueError, "without LoRA layers.*`teacher='copy'`", {"teacher": "lora"}),
    "unknown teacher": (
        ValueError,
        "unknown teacher 'ema', expected 'copy', 'lora', a torch.nn.Module, or a callable",
        {"teacher": "ema"},
    ),
    "no teacher": (TypeError, "`teacher` is a NoneType", {"teacher": None}),
    "teacher without that layer": (
        ValueError,
        "no module 'body' in MLP; at its top level: first, middle, last",
        {"teacher": MLP()},
    ),
    "call is a number": (TypeError, "`call` is", {"call": 3}),
    "output is a number": (TypeError, "`output` is 3", {"output": 3}),
    "unknown features": (ValueError, "unknown features 'some'", {"features": "some"}),
    "whole teacher_dtype": (ValueError, "`dtype` is torch.int64", {"teacher_dtype": torch.int64}),
    "compile is a number": (TypeError, "`compile` is 3", {"compile": 3}),
    "example is no pair": (TypeError, "`example` is not a pair", {"example": 3}),
    "unknown t": (ValueError, "unknown `t` 'lognormal'", {"t": "lognormal"}),
    "unknown t_prime": (ValueError, "unknown `t_prime` 'close'", {"t_prime": "close"}),
    "unknown nonfinite": (ValueError, "unknown nonfinite 'ignore'", {"nonfinite": "ignore"}),
    "micro_batch is zero": (ValueError, "`micro_batch` is 0", {"micro_batch": 0}),
    "t_range is reversed": (ValueError, "`t_range` is .0.5, 0.25.", {"t_range": (0.5, 0.25)}),
}


@pytest.mark.parametrize(("error", "message", "options"), WRAP.values(), ids=WRAP)
def test_wrap_refuses(error, message, options):
    with pytest.raises(error, match=message):
        small(**options)


def test_wrap_needs_the_adapters(monkeypatch):
    monkeypatch.setattr(module, "_assemble", None)
    with pytest.raises(
        RuntimeError, match=r"^no adapters are installed\. Import `perceptual_diffusion`, not one of its files\.$"
    ):
        small()


def test_a_model_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"`model` is a function, expected a torch.nn.Module"):
        PaperObjective.wrap(lambda x, t: x, schedules.Linear(), prediction="v_prediction", layers="body")


def test_a_teacher_that_shares_weights_with_the_model_is_refused():
    student = ConvNet()
    other = ConvNet()
    other.stem = student.stem
    for teacher in (student, other):
        with pytest.raises(ValueError, match="`teacher` shares its weights with `model`"):
            small(student, teacher=teacher)
