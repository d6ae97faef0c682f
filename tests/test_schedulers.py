"""Reading diffusers' schedulers, each compared with the scheduler's own arithmetic."""

import math

import diffusers
import pytest
import torch
from models import unet
from scheduling import FLOAT32, FLOAT64, batch, make, near, ours, target

from perceptual_diffusion import parameterizations
from perceptual_diffusion.adapters import read
from perceptual_diffusion.parameterizations import System, mix, recover
from perceptual_diffusion.schedules import EDM, Discrete, Linear
from perceptual_diffusion.timesteps import Uniform

# diffusers 0.42 turns torch tensors to numpy the old way under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}
INDEXED = ("DDPM", "DDIM", "PNDM")
EXPLODING = ("LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete")
SOLVERS = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep")
TABLE = (*INDEXED, *EXPLODING, *SOLVERS)
RESCALABLE = ("DDPM", "DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep")
TABLE_CASES = [(name, rescale) for name in TABLE for rescale in (False, True) if not rescale or name in RESCALABLE]
FLOW = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")
KARRAS = ("EDMEuler", "EDMDPMSolverMultistep")
KINDS = ("epsilon", "v_prediction", "sample")

tables = pytest.mark.parametrize(("name", "rescale"), TABLE_CASES)


def make_table(name, rescale=False, steps=1000, **config):
    """A scheduler with Stable Diffusion's table, set to run all its timesteps, its table in float64 where it serves."""
    config = SD | ({"rescale_betas_zero_snr": True} if rescale else {}) | config
    if name in ("DDPM", "DDIM"):
        config["clip_sample"] = False
    if name in ("DDIM", "PNDM"):
        config["set_alpha_to_one"] = False
    if name == "PNDM":
        config["skip_prk_steps"] = True
    if name == "DPMSolverSinglestep":
        config = {**config, "lower_order_final": True}
        del config["timestep_spacing"]
    scheduler = make(name, **config)
    if name in INDEXED:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    return scheduler


def timestep_of(scheduler, t):
    """A time in the dtype of the scheduler's own timesteps."""
    return t.to(scheduler.timesteps.dtype)


# Tables of ᾱ_t: x_t and the target


@tables
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_scheduler_is_read_as_its_table_and_its_prediction(name, rescale, kind):
    scheduler = make_table(name, rescale, prediction_type=kind)
    process = read(scheduler)
    assert isinstance(process.schedule, Discrete)
    assert process.prediction == kind
    assert process.t == Uniform()
    assert process.model_input is None
    table = process.schedule.alpha_bar
    assert len(table) == 1000
    assert torch.equal(table[:-1], scheduler.alphas_cumprod[:-1].double())
    assert (float(table[-1]) == 0) == rescale


@tables
def test_x_t_is_the_schedulers(name, rescale):
    scheduler = make_table(name, rescale)
    clean, noise = batch()
    first = 1 if name == "DPMSolverSinglestep" else 0  # it never runs t = 0
    last = 998 if rescale and name not in INDEXED else 999  # theirs is not quite noise there: see below
    t = torch.tensor([first, 10, 100, 500, 900, last])
    x_t = scheduler.add_noise(clean, noise, timestep_of(scheduler, t))
    process = read(scheduler)
    if name in EXPLODING:  # x_0 + (sigma / alpha) ε: ours over alpha_t
        x_t = x_t * process.schedule(t)[0][:, None, None]
    near(x_t, ours(process, clean, noise, t), FLOAT64 if name in INDEXED else FLOAT32)


@pytest.mark.parametrize(("name", "rescale"), [case for case in TABLE_CASES if case[0] in EXPLODING])
@pytest.mark.parametrize("t", [0, 100, 998])
def test_what_the_model_is_given_by_a_variance_exploding_scheduler_is_our_x_t(name, rescale, t):
    scheduler = make_table(name, rescale)
    clean, noise = batch(3)
    index, t = torch.full((3,), t), torch.full((3,), float(t), dtype=scheduler.timesteps.dtype)
    sample = scheduler.add_noise(clean, noise, t)
    near(scheduler.scale_model_input(sample, t[0]), ours(read(scheduler), clean, noise, index), FLOAT32)


@pytest.mark.parametrize(("name", "rescale"), [case for case in TABLE_CASES if case[0] in ("DDPM", "DDIM")])
def test_the_target_of_v_prediction_is_the_schedulers_get_velocity(name, rescale):
    scheduler = make_table(name, rescale, prediction_type="v_prediction")
    clean, noise = batch()
    t = torch.tensor([0, 1, 100, 500, 900, 999])
    near(target(read(scheduler), clean, noise, t), scheduler.get_velocity(clean, noise, t), FLOAT64)


@pytest.mark.parametrize(("kind", "expected"), [("epsilon", "noise"), ("sample", "clean")])
def test_the_target_of_epsilon_is_the_noise_and_of_sample_the_clean_sample(kind, expected):
    clean, noise = batch()
    process = read(make_table("DDPM", prediction_type=kind))
    y = target(process, clean, noise, torch.arange(6))
    assert torch.equal(y, {"noise": noise, "clean": clean}[expected])


@pytest.mark.parametrize(
    ("config", "schedule"),
    [
        (SD, Discrete.scaled_linear()),
        ({}, Discrete.linear()),
        ({"beta_schedule": "squaredcos_cap_v2"}, Discrete.cosine()),
        (SD | {"rescale_betas_zero_snr": True}, Discrete.scaled_linear().zero_terminal_snr()),
        ({"rescale_betas_zero_snr": True}, Discrete.linear().zero_terminal_snr()),
        ({"num_train_timesteps": 50, "beta_end": 0.3}, Discrete.linear(end=0.3, steps=50)),
    ],
)
def test_our_named_tables_are_diffusers(config, schedule):
    table = read(make("DDIM", **config)).schedule.alpha_bar
    torch.testing.assert_close(table, schedule.alpha_bar, rtol=2e-3, atol=1e-7)  # theirs is a product in float32


def test_reading_copies_the_table():
    scheduler = make_table("DDIM", rescale=True)
    scheduler.alphas_cumprod[-1] = 2**-24
    assert float(read(scheduler).schedule.alpha_bar[-1]) == 0
    assert float(scheduler.alphas_cumprod[-1]) == 2**-24


def test_a_subclass_is_read_as_its_base():
    class Mine(diffusers.DDIMScheduler):
        pass

    assert isinstance(read(Mine(**SD)).schedule, Discrete)


# Tables of ᾱ_t: what a step takes for the clean sample, and where a step leads


def clean_of_step(name, scheduler, output, t, sample):
    """x̂_0 as the scheduler has it inside its step."""
    if name in SOLVERS:
        scheduler._init_step_index(t)
        return scheduler.convert_model_output(output, sample=sample)
    if name in EXPLODING:
        scheduler.scale_model_input(sample, t)
    return scheduler.step(output, t, sample).pred_original_sample


@pytest.mark.parametrize(
    ("name", "rescale", "kind"),
    [
        (name, rescale, kind)
        for name, rescale in TABLE_CASES
        for kind in KINDS
        if name != "PNDM" and not (kind == "sample" and name in ("LMSDiscrete", "EulerAncestralDiscrete"))
    ],
)
@pytest.mark.parametrize("t", [40, 500, 990])
def test_the_clean_sample_of_a_step_is_ours(name, rescale, kind, t):
    """For any output, not only the perfect one."""
    scheduler = make_table(name, rescale, prediction_type=kind)
    process = read(scheduler)
    clean, noise = batch(2)
    index = torch.full((2,), t)
    x_t, output = ours(process, clean, noise, index), torch.randn_like(clean)
    alpha = float(process.schedule(index)[0][0])
    sample = x_t / alpha if name in EXPLODING else x_t
    theirs = clean_of_step(name, scheduler, output, timestep_of(scheduler, index)[0], sample)
    system = System.of(process.schedule, parameterizations.get(kind), index)
    near(theirs, recover(x_t, output, system)[0], FLOAT64 if name in INDEXED else FLOAT32)


def step_case(name, kind, rescale=False):
    return pytest.param(name, kind, rescale, id=f"{name}-{kind}{'-rescaled' * rescale}")


@pytest.mark.parametrize(
    ("name", "kind", "rescale"),
    [
        *(step_case("DDIM", kind, rescale) for kind in KINDS for rescale in (False, True)),
        *(step_case("PNDM", kind) for kind in ("epsilon", "v_prediction")),
        *(step_case("LMSDiscrete", kind) for kind in ("epsilon", "v_prediction")),
        *(step_case("EulerDiscrete", kind, rescale) for kind in KINDS for rescale in (False, True)),
        *(step_case(name, kind) for name in SOLVERS for kind in KINDS),
    ],
)
def test_a_step_from_our_x_t_with_our_target_leads_to_our_x_at_the_earlier_time(name, kind, rescale):
    """Every deterministic first step is exact where the model is; for DDIM at eta 0 that is Song et al. 2021, eq. 12."""
    scheduler = make_table(name, rescale, steps=50, prediction_type=kind)
    process = read(scheduler)
    clean, noise = batch(3)
    at = 0 if name == "LMSDiscrete" else 20  # its later steps want the history of the earlier ones
    now, then = scheduler.timesteps[at], scheduler.timesteps[at + 1]
    t, earlier = (time.round().long().expand(3) for time in (now, then))
    assert float(now) == int(t[0]) > int(earlier[0])
    scales = [process.schedule(time)[0][:, None, None] if name in EXPLODING else 1 for time in (t, earlier)]
    sample = ours(process, clean, noise, t) / scales[0]
    scheduler.scale_model_input(sample, now)
    if name in SOLVERS:
        scheduler.set_begin_index(at)
    moved = scheduler.step(target(process, clean, noise, t), now, sample).prev_sample
    near(moved * scales[1], ours(process, clean, noise, earlier), FLOAT64 if name in INDEXED else FLOAT32)


def test_the_first_step_of_a_rescaled_schedule_starts_at_pure_noise():
    """Lin et al. 2024: from t = 999 at zero terminal SNR; a v-prediction gives the clean sample back there."""
    scheduler = make_table("DDIM", rescale=True, steps=50, prediction_type="v_prediction")
    process = read(scheduler)
    clean, noise = batch(3)
    t, earlier = torch.full((3,), 999), torch.full((3,), 979)
    assert torch.equal(ours(process, clean, noise, t), noise)
    moved = scheduler.step(target(process, clean, noise, t), 999, noise)
    near(moved.pred_original_sample, clean, FLOAT64)
    near(moved.prev_sample, ours(process, clean, noise, earlier), FLOAT64)


# Where diffusers is off, and ours is not


def clean_error_of_a_perfect_prediction(process, x_t, clean, noise, t):
    """Root mean square of x̂_0 − x_0 by time, where the model's output is the exact target."""
    wide = clean.double(), noise.double()
    system = System.of(process.schedule, parameterizations.get("v_prediction"), t)
    clean_hat, _ = recover(x_t.double(), mix(*wide, system.a, system.b), system)
    return (clean_hat - wide[0]).square().mean(1).sqrt()


@pytest.mark.parametrize("rescale", [False, True])
def test_bf16_add_noise_loses_the_noise_of_early_times_and_ours_does_not(rescale):
    scheduler = make("DDIM", **SD, rescale_betas_zero_snr=rescale, prediction_type="v_prediction")
    process = read(scheduler)
    clean, noise = (torch.randn(1000, 64).bfloat16() for _ in range(2))
    t = torch.arange(1000)
    theirs, mine = scheduler.add_noise(clean, noise, t), ours(process, clean, noise, t)
    assert theirs.dtype == mine.dtype == torch.bfloat16
    lost = (theirs.double() - clean.double()).abs().amax(1)[:2]
    assert (lost < 0.02).all()  # sigma is rounded to 0: x_t is x_0, but for the rounding
    worst = clean_error_of_a_perfect_prediction(process, theirs, clean, noise, t).max()
    assert 0.03 < float(worst) < 0.05
    exact = mix(clean.double(), noise.double(), *process.schedule(t))
    assert ((mine.double() - exact).abs() <= 0.00392 * exact.abs() + 1e-6).all()  # half a unit in the last place
    assert float(clean_error_of_a_perfect_prediction(process, mine, clean, noise, t).max()) < 0.003


@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep"])
def test_the_end_of_a_rescaled_table_is_exactly_0(name):
    """Some schedulers put 2⁻²⁴ there for their own divisions; a model trained at T has seen pure noise."""
    scheduler = make_table(name, rescale=True)
    assert float(scheduler.alphas_cumprod[-1]) == 2**-24
    schedule = read(scheduler).schedule
    assert [float(scale) for scale in schedule(torch.tensor([999]))] == [0, 1]


def test_eulers_get_velocity_is_of_another_time_and_our_target_is_not():
    """It looks up the rising table with the index of the falling timesteps: t becomes 999 − t."""
    scheduler = make("EulerDiscrete", **SD, prediction_type="v_prediction")
    clean, noise = batch(4)
    t = torch.tensor([0, 100, 700, 999])
    theirs = scheduler.get_velocity(clean, noise, t.float())
    process = read(scheduler)
    near(target(process, clean, noise, 999 - t), theirs, FLOAT32)
    right = make("DDPM", **SD).get_velocity(clean, noise, t)
    near(target(process, clean, noise, t), right, FLOAT64)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solvers_add_noise_before_set_timesteps_is_of_another_time_and_ours_is_not(name):
    scheduler = make(name, **{key: value for key, value in SD.items() if key != "timestep_spacing"})
    clean, noise = batch(3)
    t = torch.tensor([100, 700, 998])
    near(ours(read(scheduler), clean, noise, 999 - t), scheduler.add_noise(clean, noise, t.float()), FLOAT32)
    near(ours(read(scheduler), clean, noise, t), make("DDPM", **SD).add_noise(clean, noise, t), FLOAT64)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_timesteps_of_flow_matching_are_1000_sigma_whatever_the_shift(shift):
    """The shift re-times the sampling; a model at timestep t sees sigma = t / 1000."""
    scheduler = make("FlowMatchEulerDiscrete", shift=shift)
    _, sigma = read(scheduler).schedule(scheduler.timesteps)
    torch.testing.assert_close(sigma, scheduler.sigmas.double(), rtol=2e-7, atol=0)


def test_ten_integer_timesteps_have_no_sigma_in_diffusers_and_all_have_one_here():
    scheduler = make("FlowMatchEulerDiscrete")
    clean, noise = torch.randn(1, 2), torch.randn(1, 2)
    missing = []
    for t in range(1, 1001):
        try:
            scheduler.scale_noise(clean, torch.tensor([float(t)]), noise)
        except IndexError:
            missing.append(t)
    assert len(missing) == 10
    schedule = read(scheduler).schedule
    schedule.check("t", torch.tensor(missing), 10)
    t = torch.arange(1, 1001)
    alpha, sigma = schedule(t)
    torch.testing.assert_close(sigma, t.double() / 1000, rtol=1e-15, atol=0)
    torch.testing.assert_close(alpha, 1 - t.double() / 1000, rtol=0, atol=1e-15)


# Flow matching


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_read_as_the_straight_path_in_timesteps(name, shift):
    process = read(make(name, shift=shift))
    assert isinstance(process.schedule, Linear)
    assert (process.schedule.shift, process.schedule.scale) == (1.0, 1000.0)
    assert process.prediction == "flow_prediction"
    assert process.t == Uniform(shift=shift)
    assert process.model_input is None


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("index", [0, 1, 333, 990, 999])
def test_x_t_is_the_flow_schedulers_scale_noise(name, shift, index):
    scheduler = make(name, shift=shift)
    clean, noise = batch(2)
    t = scheduler.timesteps[index].expand(2)
    x_t = scheduler.scale_noise(clean, t if name == "FlowMatchEulerDiscrete" else t[0], noise)
    near(x_t, ours(read(scheduler), clean, noise, t), FLOAT32)


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("index", [0, 7, 18])
def test_a_flow_step_with_our_target_leads_to_our_x_at_the_earlier_time(name, shift, index):
    scheduler = make(name, shift=shift)
    process = read(scheduler)
    scheduler.set_timesteps(20)
    clean, noise = batch(2)
    times = scheduler.timesteps.unique().flip(0)  # Heun's hold each time twice
    now, then = times[index], times[index + 1]
    scheduler.set_begin_index(int((scheduler.timesteps == now).nonzero()[-1]))
    moved = scheduler.step(
        target(process, clean, noise, now.expand(2)), now, ours(process, clean, noise, now.expand(2))
    )
    near(moved.prev_sample, ours(process, clean, noise, then.expand(2)), FLOAT32)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_times_are_spread_as_the_schedulers_own_timesteps(shift):
    """Drawing one of its 1000 timesteps at random is what training loops do."""
    scheduler = make("FlowMatchEulerDiscrete", shift=shift)
    process = read(scheduler)
    drawn = process.t(process.schedule, torch.zeros(20_000), t=None, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(drawn.quantile(levels), scheduler.timesteps.quantile(levels), rtol=0, atol=12)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [((1, 1024, 64), 1024), ((1, 16, 64, 64), 1024), ((1, 16, 32, 96), 768), ((1, 8, 3, 32, 32), 768)],
)
def test_dynamic_shifting_is_the_schedulers_time_shift_for_the_number_of_tokens(kind, shape, tokens):
    config = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    scheduler = make("FlowMatchEulerDiscrete", shift=3.0, use_dynamic_shifting=True, time_shift_type=kind, **config)
    mu = 0.5 + (tokens - 256) / (4096 - 256) * (1.15 - 0.5)  # calculate_shift of diffusers' Flux pipeline
    process = read(scheduler)
    assert process.schedule.shift == 1.0
    rank = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    shift = process.t.shift(torch.zeros(shape))
    torch.testing.assert_close(shift * rank / (1 + (shift - 1) * rank), scheduler.time_shift(mu, 1.0, rank))


def test_dynamic_shifting_without_a_number_has_that_of_the_pipelines():
    scheduler = make("FlowMatchEulerDiscrete", use_dynamic_shifting=True, max_shift=None)
    assert read(scheduler).t.shift(torch.zeros(1, 4096, 64)) == pytest.approx(math.exp(1.15))


def test_another_number_of_timesteps_scales_the_unit_of_time():
    process = read(make("FlowMatchEulerDiscrete", num_train_timesteps=500))
    assert process.schedule.high == 500
    assert float(process.schedule(torch.tensor([250.0]))[1]) == 0.5


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_with_flow_sigmas_is_read_as_flow_matching(name):
    scheduler = make(name, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    process = read(scheduler)
    assert isinstance(process.schedule, Linear)
    assert process.prediction == "flow_prediction"
    assert process.t == Uniform(shift=3.0)
    scheduler.set_timesteps(20)
    clean, noise = batch(2)
    scheduler.set_begin_index(5)
    t = (1000 * scheduler.sigmas[5]).expand(2)  # its timesteps are these, cut to whole numbers
    earlier = (1000 * scheduler.sigmas[6]).expand(2)
    x_t = ours(process, clean, noise, t)
    moved = scheduler.step(target(process, clean, noise, t), scheduler.timesteps[5], x_t).prev_sample
    near(moved, ours(process, clean, noise, earlier), FLOAT32)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_flow_sigmas_do_not_change_what_the_model_predicts(kind):
    """A solver can run a noise-predicting model along the straight path: its config says which."""
    process = read(make("DPMSolverMultistep", prediction_type=kind, use_flow_sigmas=True))
    assert isinstance(process.schedule, Linear)
    assert process.prediction == kind


# EDM


@pytest.mark.parametrize("name", KARRAS)
def test_edm_is_read_with_its_own_numbers(name):
    process = read(make(name, sigma_min=0.01, sigma_max=50.0, sigma_data=0.7))
    assert isinstance(process.schedule, EDM)
    assert (process.schedule.sigma_min, process.schedule.sigma_max) == (0.01, 50.0)
    assert process.t == Uniform()


@pytest.mark.parametrize("name", KARRAS)
def test_x_t_of_edm_is_the_schedulers(name):
    scheduler = make(name)
    clean, noise = batch(3)
    indices = torch.tensor([0, 500, 999])
    x_t = scheduler.add_noise(clean, noise, scheduler.timesteps[indices])
    near(x_t, ours(read(scheduler), clean, noise, scheduler.sigmas[indices]), FLOAT64)


@pytest.mark.parametrize("name", KARRAS)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_model_input_of_edm_is_the_schedulers_preconditioning(name, sigma_data):
    scheduler = make(name, sigma_data=sigma_data)
    sigma = torch.tensor([0.002, 0.5, 3.0, 80.0])
    x_t, _ = batch(4)
    given, c_noise = read(scheduler).model_input(x_t, sigma)
    near(given, scheduler.precondition_inputs(x_t, sigma.double()[:, None, None]), FLOAT64)
    torch.testing.assert_close(c_noise, scheduler.precondition_noise(sigma))
    assert c_noise.dtype == torch.float32


def test_the_model_input_of_edm_keeps_the_structure_and_dtype_of_a_nested_sample():
    sample = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": (torch.ones(2),)}
    given, _ = read(make("EDMEuler")).model_input(sample, torch.tensor([1.0, 2.0]))
    assert given["a"].dtype == torch.bfloat16
    torch.testing.assert_close(given["b"][0], torch.tensor([1.25**-0.5, 4.25**-0.5]))


@pytest.mark.parametrize("name", KARRAS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_prediction_of_edm_is_the_schedulers_preconditioning(name, kind, sigma_data):
    """diffusers' v_prediction is F with its sign turned."""
    scheduler = make(name, prediction_type=kind, sigma_data=sigma_data)
    process = read(scheduler)
    clean, noise = batch(4)
    sigma = torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=torch.float64)
    x_t, output = ours(process, clean, noise, sigma), torch.randn_like(clean)
    theirs = scheduler.precondition_outputs(x_t, output, sigma[:, None, None])
    near(recover(x_t, output, System.of(process.schedule, process.prediction, sigma))[0], theirs, FLOAT64)
    perfect = scheduler.precondition_outputs(x_t, target(process, clean, noise, sigma), sigma[:, None, None])
    near(perfect, clean, 1e-10)


@pytest.mark.parametrize("name", KARRAS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_an_edm_step_with_our_target_leads_to_our_x_at_the_smaller_sigma(name, kind):
    scheduler = make(name, prediction_type=kind)
    process = read(scheduler)
    scheduler.set_timesteps(20)
    clean, noise = batch(2)
    now, then = scheduler.sigmas[8].expand(2), scheduler.sigmas[9].expand(2)
    x_t = ours(process, clean, noise, now)
    t = scheduler.timesteps[8]
    near(scheduler.scale_model_input(x_t, t), process.model_input(x_t, now)[0], FLOAT32)
    assert float(process.model_input(x_t, now)[1][0]) == pytest.approx(float(t), rel=1e-6)
    moved = scheduler.step(target(process, clean, noise, now), t, x_t)
    near(moved.prev_sample, ours(process, clean, noise, then), FLOAT32)


# Refusals name what to pass


@pytest.mark.parametrize(
    "thing", [object(), "ddpm", None, diffusers.DDPMScheduler, {"prediction_type": "epsilon"}, torch.nn.Linear(1, 1)]
)
def test_what_is_no_scheduler_is_refused(thing):
    with pytest.raises(
        TypeError, match=r"`schedule` is an? .*diffusers scheduler or a schedule of perceptual_diffusion"
    ):
        read(thing)


def test_a_model_has_a_config_but_is_no_scheduler():
    with pytest.raises(TypeError, match=r"`schedule` is an? UNet2DModel"):
        read(unet())


def test_the_shift_is_the_one_in_force_not_the_one_configured():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_shift(5.0)
    assert read(scheduler).t.shift == 5.0
