"""Every scheduler class of diffusers: read as its own arithmetic has it, or refused by name, with the way out.

Those that `test_schedulers.py` checks at length are here for completeness only.
"""

import copy
import importlib.util
import inspect
import math
import pickle
from pathlib import Path

import diffusers
import diffusers.schedulers
import pytest
import torch
from scheduling import FLOAT32, FLOAT64, batch, clean_hat, make, near, ours, target

from perceptual_diffusion.adapters import read
from perceptual_diffusion.adapters.schedulers import SCHEDULERS
from perceptual_diffusion.parameterizations import SCORE, System, edm, get
from perceptual_diffusion.schedules import EDM, Cosine, Discrete, Linear
from perceptual_diffusion.timesteps import Uniform

pytestmark = [
    # diffusers 0.42 turns torch tensors to numpy the old way under numpy 2
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have tb<=t1:UserWarning"),  # torchsde, of a sigma rounded by diffusers
]

OWN = {name for package in (diffusers, diffusers.schedulers) for name in dir(package) if name.endswith("Scheduler")}
"""The scheduler classes of the installed diffusers."""

WANTED = {
    "AmusedScheduler": {"mask_token_id": 0},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "SCMScheduler": {"prediction_type": "other"},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
}
"""What constructors ask for, and what makes a default the exception."""

CASES = [
    pytest.param(name, case, id="-".join([name, *(f"{key}={value}" for key, value in case.when.items())]))
    for name, cases in SCHEDULERS.items()
    for case in cases
]
READ = [param for param in CASES if param.values[1].read is not None]
REFUSED = [param for param in CASES if param.values[1].read is None]


def of_case(name, case):
    """A scheduler whose config holds a case's settings; those its constructor knows not as `from_config` leaves them."""
    settings = WANTED.get(name, {}) | dict(case.when)
    known = inspect.signature(getattr(diffusers.schedulers, name).__init__).parameters if name in OWN else settings
    scheduler = make(name.removesuffix("Scheduler"), **{k: v for k, v in settings.items() if k in known})
    scheduler.register_to_config(**settings)
    return scheduler


# All classes


def test_every_scheduler_of_diffusers_is_read_or_refused_by_name():
    assert OWN - set(SCHEDULERS) == set()
    if diffusers.__version__.startswith("0.42."):
        assert set(SCHEDULERS) - OWN == set()


@pytest.mark.parametrize("cases", SCHEDULERS.values(), ids=SCHEDULERS)
def test_the_last_case_of_a_class_holds_whatever_the_settings(cases):
    assert [not case.when for case in cases] == [False] * (len(cases) - 1) + [True]


@pytest.mark.parametrize(("name", "case"), READ)
def test_what_is_read_can_be_trained_on(name, case):
    """Its times are its schedule's own, and there the pair of schedule and prediction is regular and finite."""
    process = read(of_case(name, case))
    generator = torch.Generator().manual_seed(0)
    t = process.t(process.schedule, torch.zeros(2000, 4), t=None, generator=generator)
    process.schedule.check("t", t, 2000)
    system = System.of(process.schedule, get(process.prediction), t)
    ok = system.determinant.isfinite() & (system.determinant.abs() > 1e-9)
    assert ok.all()
    assert t.unique().numel() > 600
    if process.model_input is not None:
        x, time = process.model_input(torch.ones(2000, 1), t)
        assert x.isfinite().all()
        assert time.isfinite().all()
        assert time.dtype == torch.float32


@pytest.mark.parametrize(("name", "case"), READ)
def test_what_is_read_can_be_copied_and_pickled(name, case):
    process = read(of_case(name, case))
    t = process.t(process.schedule, torch.zeros(4, 4), t=None, generator=torch.Generator().manual_seed(0))
    for twin in (copy.deepcopy(process), pickle.loads(pickle.dumps(process))):
        for scale, other in zip(process.schedule(t), twin.schedule(t), strict=True):
            assert torch.equal(scale, other)
        rows = (get(p.prediction).row(p.schedule, t) for p in (process, twin))
        assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
        assert twin.t == process.t
        assert (twin.model_input is None) == (process.model_input is None)


@pytest.mark.parametrize(("name", "case"), REFUSED)
def test_what_is_refused_is_named_with_the_reason_and_the_way_out(name, case):
    scheduler = of_case(name, case)
    with pytest.raises(ValueError, match=rf"^{name}.* cannot be read: ") as error:
        read(scheduler)
    reason, way_out = case.refused
    assert str(error.value).endswith(f" cannot be read: {reason}. {way_out}.")
    assert all(f"{key}={value!r}" in str(error.value) for key, value in case.when.items())


def test_a_class_that_nobody_knows_is_refused_with_what_to_pass():
    class NewScheduler(diffusers.ConfigMixin):
        config_name = "scheduler_config.json"

        def __init__(self):
            self.register_to_config()

    with pytest.raises(
        ValueError, match=r"NewScheduler cannot be read: it is unknown\. Pass a schedule .*`prediction=`"
    ):
        read(NewScheduler())


def test_the_documented_table_is_current():
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("schedulers_table", root / "tools" / "schedulers_table.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = (root / "docs" / "schedulers.md").read_text(encoding="utf-8")
    assert page == tool.page(), "run `python tools/schedulers_table.py > docs/schedulers.md`"
    assert all(f"`{name}`" in page for name in SCHEDULERS)


# Settings that `from_config` leaves in the config of a class that does not heed them


def test_a_flow_prediction_is_of_the_class_not_of_a_config_left_over():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config({"prediction_type": "epsilon", "flow_shift": 7.0})
    assert scheduler.config.prediction_type == "epsilon"
    process = read(scheduler)
    assert process.prediction == "flow_prediction"
    assert process.t == Uniform(shift=1.0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_solver_heeds_flow_shift_not_the_shift_left_over():
    config = {"shift": 3.0, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 8.0}
    assert read(diffusers.UniPCMultistepScheduler.from_config(config)).t == Uniform(shift=8.0)


def test_a_table_that_is_not_rescaled_does_not_end_at_0():
    scheduler = diffusers.LMSDiscreteScheduler.from_config(diffusers.DDIMScheduler(rescale_betas_zero_snr=True).config)
    assert scheduler.config.rescale_betas_zero_snr
    assert float(read(scheduler).schedule.alpha_bar[-1]) == float(scheduler.alphas_cumprod[-1]) > 0


def test_inverted_sigmas_are_not_of_a_class_that_does_not_invert():
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.register_to_config(invert_sigmas=True)
    process = read(scheduler)
    assert not process.schedule.reverse
    assert process.prediction == "flow_prediction"


# Tables


STEPS = 50
TABLES = {
    "DDPMParallel": {"clip_sample": False},
    "DDIMParallel": {"clip_sample": False},
    "DDIMInverse": {"clip_sample": False},
    "CogVideoXDDIM": {"clip_sample": False},
    "CogVideoXDPM": {"clip_sample": False},
    "UnCLIP": {"clip_sample": False},
    "RePaint": {"clip_sample": False},
    "LCM": {},
    "TCD": {},
    "HeunDiscrete": {},
    "KDPM2Discrete": {},
    "KDPM2AncestralDiscrete": {},
    "DPMSolverSDE": {},
    "DEISMultistep": {},
    "SASolver": {},
    "DPMSolverMultistepInverse": {},
}
KINDS = ("epsilon", "v_prediction", "sample")
UNKNOWN_KINDS = {
    "UnCLIP": ("v_prediction",),
    "RePaint": ("v_prediction", "sample"),
    "KDPM2Discrete": ("sample",),
    "KDPM2AncestralDiscrete": ("sample",),
    "DPMSolverSDE": ("sample",),
}
EXPLODING = ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
SOLVERS = ("DEISMultistep", "SASolver", "DPMSolverMultistepInverse")
TABLE_CASES = [(name, kind) for name in TABLES for kind in KINDS if kind not in UNKNOWN_KINDS.get(name, ())]


def make_table(name, kind):
    return make(name, **TABLES[name], **({} if name == "RePaint" else {"prediction_type": kind}))


@pytest.mark.parametrize(("name", "kind"), TABLE_CASES)
def test_a_table_is_read_as_its_alphas_and_its_prediction(name, kind):
    scheduler = make_table(name, kind)
    process = read(scheduler)
    assert isinstance(process.schedule, Discrete)
    assert torch.equal(process.schedule.alpha_bar, scheduler.alphas_cumprod.double())
    assert process.prediction == kind
    assert process.model_input is None


@pytest.mark.parametrize(
    "name", [name for name in TABLES if name not in (*EXPLODING, *SOLVERS, "DDIMInverse", "RePaint")]
)
def test_x_t_of_a_table_is_the_schedulers(name):
    scheduler = make(name, **TABLES[name])
    clean, noise = batch(4)
    t = torch.tensor([0, 100, 700, 999])
    near(scheduler.add_noise(clean, noise, t), ours(read(scheduler), clean, noise, t), FLOAT64)


@pytest.mark.parametrize("name", EXPLODING)
def test_what_a_model_is_given_by_an_exploding_scheduler_is_our_x_t(name):
    scheduler = make(name)
    scheduler.set_timesteps(STEPS)
    process = read(scheduler)
    clean, noise = batch(2)
    time = scheduler.timesteps[0]
    sample = scheduler.add_noise(clean, noise, time[None])
    x_t = ours(process, clean, noise, torch.full((2,), round(float(time))))
    near(scheduler.scale_model_input(sample, time), x_t, FLOAT32)


def clean_of_table(name, scheduler, process, output, x_t, t):
    """x̂_0 as the scheduler has it inside its step from index t, for any output of the model."""
    alpha = float(process.schedule(torch.tensor([t]))[0])
    if name in SOLVERS:
        scheduler._step_index = int((scheduler.timesteps == t).nonzero()[0])
        given = scheduler.convert_model_output(output, sample=x_t)
        if name != "DEISMultistep":
            return given
        sigma = (1 - alpha**2) ** 0.5
        return (x_t - sigma * given) / alpha  # it gives the noise
    if name in EXPLODING:
        scheduler.set_begin_index(0)
        scheduler.scale_model_input(x_t / alpha, scheduler.timesteps[0])
        return scheduler.step(output, scheduler.timesteps[0], x_t / alpha).pred_original_sample
    if name == "RePaint":
        return scheduler.step(output, t, x_t, x_t, torch.zeros_like(x_t)).pred_original_sample
    if name == "CogVideoXDPM":
        return scheduler.step(output, None, t, None, x_t)[1]
    if name == "DDIMInverse":  # its timesteps are those that it leads to
        return scheduler.step(output, t + 1000 // STEPS, x_t).pred_original_sample
    if name == "LCM":
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        return (scheduler.step(output, t, x_t).denoised - c_skip * x_t) / c_out
    return scheduler.step(output, t, x_t).pred_original_sample


@pytest.mark.parametrize(("name", "kind"), [case for case in TABLE_CASES if case[0] != "TCD"])
def test_the_clean_sample_of_a_table_step_is_ours(name, kind):
    """For any output, not only the perfect one."""
    scheduler = make_table(name, kind)
    scheduler.set_timesteps(STEPS)
    process = read(scheduler)
    at = 0 if name in EXPLODING else 5
    t = round(float(scheduler.timesteps[at]))
    clean, noise = batch(2)
    index = torch.full((2,), t)
    x_t, output = ours(process, clean, noise, index), torch.randn_like(clean)
    theirs = clean_of_table(name, scheduler, process, output, x_t, t)
    near(theirs, clean_hat(process, x_t, output, index), 1e-4 if name in EXPLODING else FLOAT32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tcd_step_with_our_target_leads_to_our_x_at_the_earlier_time(kind):
    scheduler = make("TCD", prediction_type=kind)
    scheduler.set_timesteps(STEPS)
    process = read(scheduler)
    clean, noise = batch(2)
    t, earlier = (scheduler.timesteps[i].expand(2) for i in (5, 6))
    moved = scheduler.step(target(process, clean, noise, t), t[0], ours(process, clean, noise, t), eta=0.0)
    near(moved.prev_sample, ours(process, clean, noise, earlier), FLOAT32)


# The straight path


def test_inverted_sigmas_are_the_straight_path_from_noise_to_data():
    """Mochi's: t = 0 is the noise, and the model predicts clean − noise."""
    scheduler = make("FlowMatchEulerDiscrete", invert_sigmas=True, shift=3.0)
    scheduler.set_timesteps(10)
    process = read(scheduler)
    assert repr(process.schedule) == repr(Linear(scale=1000, reverse=True))
    assert process.prediction == "-flow_prediction"
    assert process.t == Uniform(shift=3.0)
    assert process.model_input is None
    clean, noise = batch(2)
    near(target(process, clean, noise, torch.zeros(2)), clean - noise, FLOAT64)
    near(ours(process, clean, noise, torch.zeros(2)), noise, FLOAT64)
    now, then = scheduler.timesteps[3].expand(2), scheduler.timesteps[4].expand(2)
    assert float(now[0]) < float(then[0])
    x_t = ours(process, clean, noise, now)
    moved = scheduler.step(target(process, clean, noise, now), now[0], x_t).prev_sample
    near(moved, ours(process, clean, noise, then), FLOAT32)
    near(clean_hat(process, x_t, target(process, clean, noise, now), now), clean, 1e-6)


def test_inverted_training_times_move_toward_the_noise_with_the_shift():
    def mean(shift, invert):
        process = read(make("FlowMatchEulerDiscrete", shift=shift, invert_sigmas=invert))
        t = process.t(process.schedule, torch.zeros(5000), t=None, generator=torch.Generator().manual_seed(0))
        return float(process.schedule.level(t).mean())

    assert mean(3.0, True) == pytest.approx(mean(3.0, False), abs=0.02)
    assert mean(3.0, True) > 0.6


def test_one_training_timestep_is_a_time_from_0_to_1():
    """OmniGen's."""
    process = read(make("FlowMatchEulerDiscrete", invert_sigmas=True, num_train_timesteps=1))
    assert repr(process.schedule) == repr(Linear(scale=1, reverse=True))


def test_diffusers_scale_noise_puts_the_noise_at_the_datas_end_of_inverted_sigmas():
    """As docs/schedulers.md says: before `set_timesteps` the times are not inverted, after it the mixture is not."""
    scheduler = make("FlowMatchEulerDiscrete", invert_sigmas=True)
    process = read(scheduler)
    clean, noise = batch(1)
    t = scheduler.timesteps[200:201]
    near(scheduler.scale_noise(clean, t, noise), ours(process, clean, noise, 1000 - t), FLOAT32)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[2:3]
    near(scheduler.scale_noise(clean, t, noise), ours(process, noise, clean, t), FLOAT32)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_clean_sample_of_a_flow_lcm_step_is_ours(shift):
    scheduler = make("FlowMatchLCM", shift=shift)
    process = read(scheduler)
    clean, noise = batch(2)
    t = scheduler.timesteps[200].expand(2)
    near(scheduler.scale_noise(clean, t, noise), ours(process, clean, noise, t), FLOAT32)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(3)  # the step after which no noise is left
    t = scheduler.timesteps[3].expand(2)
    x_t = ours(process, clean, noise, t)
    near(scheduler.step(target(process, clean, noise, t), t[0], x_t).prev_sample, clean, FLOAT32)


def test_flow_lcm_takes_the_noise_for_the_clean_sample_where_sigmas_are_inverted():
    scheduler = make("FlowMatchLCM", invert_sigmas=True)
    scheduler.set_timesteps(4)
    clean, noise = batch(2)
    s = float(scheduler.sigmas[2])
    x_t = s * clean + (1 - s) * noise
    near(x_t - s * (clean - noise), noise, FLOAT64)


@pytest.mark.parametrize("name", ["LTXEulerAncestralRF", "FlowMapEulerDiscrete"])
def test_a_flow_step_with_our_target_leads_to_our_x_at_the_earlier_time(name):
    scheduler = make(name, **({"eta": 0.0} if name == "LTXEulerAncestralRF" else {"shift": 3.0}))
    process = read(scheduler)
    scheduler.set_timesteps(10)
    clean, noise = batch(2)
    now, then = scheduler.timesteps[3].expand(2), scheduler.timesteps[4].expand(2)
    moved = scheduler.step(target(process, clean, noise, now), now[0], ours(process, clean, noise, now))
    near(moved.prev_sample, ours(process, clean, noise, then), FLOAT32)
    assert process.schedule.high == 1000


def test_x_t_of_a_flow_map_is_the_schedulers():
    scheduler = make("FlowMapEulerDiscrete", shift=3.0)
    clean, noise = batch(3)
    t = torch.tensor([0.0, 250.0, 1000.0])
    near(scheduler.scale_noise(clean, t, noise), ours(read(scheduler), clean, noise, t), FLOAT64)
    assert read(scheduler).t == Uniform(shift=3.0)


def test_ltx_takes_its_shift_from_the_flow_matching_config_it_was_made_of():
    base = make("FlowMatchEulerDiscrete", shift=3.0)
    make("LTXEulerAncestralRF")
    assert read(diffusers.LTXEulerAncestralRFScheduler.from_config(base.config)).t == Uniform(shift=3.0)


def test_minimax_runs_from_noise_at_0_to_data_at_1():
    scheduler = make("MiniMaxH3")
    process = read(scheduler)
    assert repr(process.schedule) == repr(Linear(reverse=True))
    assert process.t == Uniform(shift=12.0)
    scheduler.set_shift(3.0)
    assert read(scheduler).t == Uniform(shift=3.0)
    scheduler.set_timesteps(10)
    clean, noise = batch(3)
    t = torch.tensor([0.0, 0.3, 1.0])
    near(scheduler.scale_noise(clean, t, noise), ours(process, clean, noise, t), 1e-7)
    now, then = scheduler.timesteps[3].expand(3), scheduler.timesteps[4].expand(3)
    moved = scheduler.step(target(process, clean, noise, now), now[0], ours(process, clean, noise, now))
    near(moved.prev_sample, ours(process, clean, noise, then), FLOAT32)


def test_proteina_runs_from_noise_at_0_to_data_at_1():
    # without rescaling (k = 1), and above t_lim_ode, so without noise
    scheduler = make("RFD4Proteina", schedule_mode="power", noise_mode="tan", tsr_k=1.0, tsr_sigma=1.0, t_lim_ode=0.0)
    process = read(scheduler)
    assert repr(process.schedule) == repr(Linear(reverse=True))
    clean, noise = batch(3)
    t = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    near(scheduler.add_noise(clean, noise, t), ours(process, clean, noise, t), FLOAT64)
    scheduler.set_timesteps(40)
    now, then = scheduler.timesteps[0].expand(3), scheduler.timesteps[1].expand(3)
    moved = scheduler.step(
        target(process, clean, noise, now),
        now[0],
        ours(process, clean, noise, now),
        emit_mask=torch.ones(3, 2, dtype=torch.bool),
    )
    near(moved.prev_sample, ours(process, clean, noise, then), FLOAT32)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_helios_in_one_stage_is_flow_matching(solver):
    scheduler = make("Helios", stages=1, scheduler_type=solver, stage_range=[0, 1])
    process = read(scheduler)
    scheduler.set_timesteps(10)
    clean, noise = batch(2)
    now, then = (torch.tensor(float(scheduler.timesteps[i])).expand(2) for i in (0, 1))
    clean, noise = (x[..., None, None] for x in (clean, noise))
    moved = scheduler.step(target(process, clean, noise, now), scheduler.timesteps[0], ours(process, clean, noise, now))
    if solver == "euler":
        near(moved.prev_sample, ours(process, clean, noise, then), FLOAT32)
    scheduler._step_index = 4
    t = (1000 * scheduler.sigmas[4]).expand(2)
    x_t = ours(process, clean, noise, t)
    near(scheduler.convert_model_output(target(process, clean, noise, t), sample=x_t), clean, FLOAT32)


def test_helios_dmd_in_one_stage_is_flow_matching():
    scheduler = make("HeliosDMD", stages=1, stage_range=[0, 1])
    process = read(scheduler)
    scheduler.set_timesteps(10)
    clean, noise = (x[..., None, None] for x in batch(2))
    t = scheduler.timesteps[3].expand(2)
    tables = {"sigmas": scheduler.sigmas[:-1], "timesteps": scheduler.timesteps}
    x_t = ours(process, clean, noise, t)
    near(scheduler.add_noise(clean, noise, t, **tables), x_t, FLOAT32)
    near(scheduler.convert_flow_pred_to_x0(target(process, clean, noise, t), x_t, t, **tables), clean, FLOAT32)


@pytest.mark.parametrize("name", ["DEISMultistep", "SASolver", "DPMSolverMultistepInverse", "UniPCMultistep"])
@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "sample"])
def test_the_clean_sample_of_a_solver_with_flow_sigmas_is_ours(name, kind):
    scheduler = make(name, prediction_type=kind, use_flow_sigmas=True, flow_shift=3.0)
    process = read(scheduler)
    assert process.prediction == kind
    assert process.t == Uniform(shift=3.0)
    scheduler.set_timesteps(20)
    scheduler._step_index = 6
    clean, noise = batch(2)
    s = float(scheduler.sigmas[6])
    t = torch.full((2,), 1000 * s, dtype=torch.float64)
    x_t, output = ours(process, clean, noise, t), torch.randn_like(clean)
    theirs = scheduler.convert_model_output(output, sample=x_t)
    if name == "DEISMultistep":
        theirs = (x_t - s * theirs) / (1 - s)  # it gives the noise
    near(theirs, clean_hat(process, x_t, output, t), FLOAT32)


def test_the_clean_sample_of_a_solver_with_flow_sigmas_and_v_prediction_is_nobodys():
    """Why it is refused: alpha² + sigma² is not 1 on the straight path."""
    scheduler = make("DPMSolverMultistep", prediction_type="v_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(20)
    scheduler._step_index = 6
    clean, noise = batch(2)
    s = float(scheduler.sigmas[6])
    x_t, v = (1 - s) * clean + s * noise, (1 - s) * noise - s * clean
    near(scheduler.convert_model_output(v, sample=x_t), ((1 - s) ** 2 + s**2) * clean, FLOAT32)


# TrigFlow


@pytest.mark.parametrize("angle", [0.01, 0.7, 1.3, 1.57])
def test_the_model_under_trigflow_predicts_the_flow_of_the_straight_path(angle):
    """Sana-Sprint: the pipeline's change of variables of sample, time and output, then the scheduler's own step."""
    scheduler = make("SCM")
    process = read(scheduler)
    clean, noise = batch(2)
    data = scheduler.config.sigma_data
    scheduler.set_timesteps(1, timesteps=[angle, 0.0], max_timesteps=None, intermediate_timesteps=None)
    tau = scheduler.timesteps[0].double()
    latents = data * (tau.cos() * clean + tau.sin() * noise)  # the scheduler's: all of it times sigma_data

    u = tau.sin() / (tau.cos() + tau.sin())
    length = (u**2 + (1 - u) ** 2).sqrt()
    given = latents / data * length
    t = u.expand(2)
    near(given, ours(process, clean, noise, t), FLOAT64)
    output = target(process, clean, noise, t)
    near(output, noise - clean, FLOAT64)
    angular = ((1 - 2 * u) * given + (1 - 2 * u + 2 * u**2) * output) / length
    denoised = scheduler.step(data * angular, scheduler.timesteps[0], latents).pred_original_sample
    near(denoised / data, clean, 1e-6)


@pytest.mark.parametrize("name", ["ScoreSdeVe", "IPNDM", "DDPMWuerstchen"])
def test_the_model_is_given_the_schedules_own_time_where_its_pipeline_does_so(name):
    process = read(make(name))
    x_t, _ = batch(2)
    given, time = process.model_input(x_t, torch.tensor([0.25, 0.5], dtype=torch.float64))
    assert given is x_t
    assert time.tolist() == [0.25, 0.5]
    assert time.dtype == torch.float32


# EDM's like


@pytest.mark.parametrize("ends", [{}, {"sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True}])
def test_continuous_times_of_v_prediction_are_edm_of_data_of_deviation_1(ends):
    """Stable Video Diffusion."""
    scheduler = make("EulerDiscrete", timestep_type="continuous", prediction_type="v_prediction", **ends)
    scheduler.set_timesteps(20)
    process = read(scheduler)
    assert isinstance(process.schedule, EDM)
    assert process.prediction == -edm(1.0)
    assert (process.schedule.p_mean, process.schedule.p_std) == (0.7, 1.6)
    if ends:
        assert (process.schedule.sigma_min, process.schedule.sigma_max) == (0.002, 700.0)
    else:
        assert process.schedule.sigma_max == pytest.approx(float(make("EulerDiscrete").sigmas[0]))
        assert process.schedule.sigma_min == pytest.approx(float(make("EulerDiscrete").sigmas[-2]), rel=1e-3)
    clean, noise = batch(2)
    now, then = scheduler.timesteps[8], scheduler.timesteps[9]
    sigma, smaller = (scheduler.sigmas[i].expand(2) for i in (8, 9))
    sample = scheduler.add_noise(clean, noise, now.expand(2))
    x_t = ours(process, clean, noise, sigma)
    near(sample, x_t, FLOAT32)
    given, time = process.model_input(x_t, sigma)
    near(given, scheduler.scale_model_input(sample, now), FLOAT32)
    torch.testing.assert_close(time, now.expand(2), rtol=1e-4, atol=1e-5)
    moved = scheduler.step(target(process, clean, noise, sigma), now, x_t)
    near(moved.pred_original_sample, clean, 1e-4)
    near(moved.prev_sample, ours(process, clean, noise, smaller), FLOAT32)
    assert float(then) < float(now)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_continuous_times_of_other_predictions_are_indices_to_diffusers_and_to_us(kind):
    scheduler = make("EulerDiscrete", timestep_type="continuous", prediction_type=kind)
    plain = make("EulerDiscrete", prediction_type=kind)
    assert torch.equal(scheduler.timesteps, plain.timesteps)
    process = read(scheduler)
    assert torch.equal(process.schedule.alpha_bar, read(plain).schedule.alpha_bar)
    assert (process.prediction, process.model_input) == (kind, None)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_cosine_solver_is_edm_with_an_angle_for_a_time(kind, sigma_data):
    """Stable Audio."""
    scheduler = make("CosineDPMSolverMultistep", prediction_type=kind, sigma_data=sigma_data)
    process = read(scheduler)
    sigma = torch.tensor([0.3, 1.0, 500.0], dtype=torch.float64)
    clean, noise = batch(3)
    x_t, output = ours(process, clean, noise, sigma), torch.randn_like(clean)
    wide = sigma[:, None, None]
    near(x_t, clean + wide * noise, FLOAT64)
    near(scheduler.precondition_outputs(x_t, output, wide), clean_hat(process, x_t, output, sigma), FLOAT64)
    given, time = process.model_input(x_t, sigma)
    near(given, scheduler.precondition_inputs(x_t, wide), FLOAT64)
    torch.testing.assert_close(time, scheduler.precondition_noise(sigma.float()))
    perfect = scheduler.precondition_outputs(x_t, target(process, clean, noise, sigma), wide)
    near(perfect, clean, 1e-10)
    t = scheduler.timesteps[[0, 500, 999]]
    near(scheduler.add_noise(clean, noise, t), ours(process, clean, noise, scheduler.sigmas[[0, 500, 999]]), FLOAT64)


def test_the_angle_of_the_cosine_solver_is_drawn_about_evenly():
    process = read(make("CosineDPMSolverMultistep"))
    t = process.t(process.schedule, torch.zeros(20_000), t=None, generator=torch.Generator().manual_seed(0))
    _, time = process.model_input(torch.zeros(20_000), t)
    torch.testing.assert_close(
        time.quantile(torch.linspace(0.1, 0.9, 9)), torch.linspace(0.1, 0.9, 9), atol=0.07, rtol=0
    )


@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep"])
def test_an_edm_scheduler_with_another_prediction_is_refused(name):
    with pytest.raises(ValueError, match=r"prediction_type='sample' of an EDM scheduler .*'epsilon'.*'v_prediction'"):
        read(make(name, prediction_type="sample"))


def test_a_consistency_model_is_read_with_its_boundary_condition():
    scheduler = make("CMStochasticIterative", clip_denoised=False)
    process = read(scheduler)
    scheduler.set_timesteps(20)
    clean, noise = batch(2)
    now = scheduler.timesteps[10]
    sigma = scheduler.sigmas[10].expand(2)
    x_t, output = ours(process, clean, noise, sigma), torch.randn_like(clean)
    near(scheduler.add_noise(clean, noise, now.expand(2)), x_t, FLOAT64)
    given, time = process.model_input(x_t, sigma)
    near(given, scheduler.scale_model_input(x_t, now), FLOAT32)
    torch.testing.assert_close(time.double(), now.expand(2), rtol=1e-5, atol=1e-4)
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma[0].double())
    near(c_out * output + c_skip * x_t, clean_hat(process, x_t, output, sigma), FLOAT64)
    least = torch.tensor(process.schedule.drawn[:1], dtype=torch.float64)  # above sigma_min, where c_out is 0
    assert System.of(process.schedule, process.prediction, least).determinant.abs() < 3


def test_a_one_step_solve_of_a_consistency_model_gives_the_clean_sample():
    scheduler = make("CMStochasticIterative", clip_denoised=False)
    process = read(scheduler)
    scheduler.set_timesteps(1)
    clean, noise = batch(2)
    sigma = scheduler.sigmas[0].expand(2)
    x_t = ours(process, clean, noise, sigma)
    scheduler.scale_model_input(x_t, scheduler.timesteps[0])
    near(scheduler.step(target(process, clean, noise, sigma), scheduler.timesteps[0], x_t).prev_sample, clean, 1e-4)


def test_the_score_of_the_exploding_sde_leads_to_the_clean_sample():
    """The step to sigma 0 takes sigma² times the score: x + sigma² s = x − sigma ε."""
    scheduler = make("ScoreSdeVe")
    process = read(scheduler)
    assert process.prediction is SCORE
    assert process.schedule.drawn == (0.01, 1348.0)
    clean, noise = (x[..., None] for x in batch(3))
    indices = torch.tensor([0, 1000, 1999])
    sigma = scheduler.discrete_sigmas[indices]
    near(scheduler.add_noise(clean, noise, indices), ours(process, clean, noise, sigma), FLOAT64)
    sigma = scheduler.discrete_sigmas[0].expand(3)
    x_t = ours(process, clean, noise, sigma)
    last = scheduler.step_pred(target(process, clean, noise, sigma), 0.0, x_t).prev_sample_mean
    near(last, clean, FLOAT32)


def test_ln_sigma_of_the_exploding_sde_is_drawn_about_evenly():
    process = read(make("ScoreSdeVe"))
    t = process.t(process.schedule, torch.zeros(20_000), t=None, generator=torch.Generator().manual_seed(0))
    place = (t.double() / 0.01).log() / math.log(1348 / 0.01)
    torch.testing.assert_close(
        place.quantile(torch.linspace(0.1, 0.9, 9, dtype=torch.float64)),
        torch.linspace(0.1, 0.9, 9, dtype=torch.float64),
        atol=0.07,
        rtol=0,
    )


def test_karras_ve_runs_a_score_model_of_pixels_in_0_to_1():
    """Its pipeline: model_output = sigma / 2 · model((x + 1) / 2, sigma / 2), and the step adds sigma times that."""
    scheduler = make("KarrasVe")
    process = read(scheduler)
    clean, noise = batch(2)
    sigma = torch.tensor([3.0, 3.0], dtype=torch.float64)
    x_t = ours(process, clean, noise, sigma)
    given, time = process.model_input(x_t, sigma)
    pixels = (clean + 1) / 2
    near(given, pixels + 1.5 * noise, FLOAT64)
    assert time.tolist() == [1.5, 1.5]
    score = target(process, clean, noise, sigma)
    near(score, -(given - pixels) / 1.5**2, FLOAT64)  # ∇ log p of a Gaussian around the pixels
    near(scheduler.step(3.0 / 2 * score, 3.0, 1.0, x_t).pred_original_sample, clean, FLOAT64)


# Continuous variance-preserving paths


def test_pseudo_linear_steps_are_along_the_quarter_circle():
    """Dance Diffusion."""
    scheduler = make("IPNDM")
    scheduler.set_timesteps(20)
    process = read(scheduler)
    assert isinstance(process.schedule, Cosine)
    assert process.prediction == "v_prediction"
    alpha, sigma = process.schedule(scheduler.timesteps)
    torch.testing.assert_close(sigma, scheduler.betas[:-1].double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(alpha, scheduler.alphas[:-1].double(), rtol=0, atol=1e-3)  # theirs: √(1 − β²) in float32
    clean, noise = batch(2)
    now, then = scheduler.timesteps[8].expand(2), scheduler.timesteps[9].expand(2)
    moved = scheduler.step(target(process, clean, noise, now), now[0], ours(process, clean, noise, now)).prev_sample
    near(moved, ours(process, clean, noise, then), FLOAT32)


@pytest.mark.parametrize("scaler", [0.5, 1.0, 2.0])
def test_wuerstchens_schedule_is_its_own(scaler):
    scheduler = make("DDPMWuerstchen", scaler=scaler)
    process = read(scheduler)
    clean, noise = batch(6)
    t = torch.tensor([0.0, 0.001, 0.3, 0.7, 0.9, 1.0])
    near(scheduler.add_noise(clean, noise, t), ours(process, clean, noise, t), 1e-4)  # theirs in float32
    assert torch.equal(process.schedule.level(t), t.double())
    alpha, sigma = process.schedule(torch.tensor([0.0, 1.0]))
    assert (alpha**2).tolist() == pytest.approx([0.9999, 0.0001])
    assert (sigma**2).tolist() == pytest.approx([0.0001, 0.9999])
    with pytest.raises(ValueError, match="no 'flow_prediction'"):
        process.schedule.derivative(t)


def test_wuerstchens_last_step_gives_the_clean_sample():
    """From ᾱ_t to ᾱ = 0.9999 without noise: what is left of the noise is a hundredth."""
    scheduler = make("DDPMWuerstchen")
    process = read(scheduler)
    scheduler.set_timesteps(2)
    clean, noise = batch(2)
    t = scheduler.timesteps[1].expand(2)
    x_t, output = ours(process, clean, noise, t), target(process, clean, noise, t)
    assert torch.equal(output, noise)
    moved = scheduler.step(output, t, x_t).prev_sample
    bar, bar_0 = (float(process.schedule(u[None])[0]) ** 2 for u in scheduler.timesteps[1:])
    # the posterior's mean is √ᾱ_0 clean + (1 − ᾱ_0) √(ᾱ / ᾱ_0 / (1 − ᾱ)) noise for the perfect noise
    left = (1 - bar_0) * (bar / bar_0 / (1 - bar)) ** 0.5
    near(moved, bar_0**0.5 * clean + left * noise, 1e-4)


def test_a_dynamic_shift_without_its_numbers_has_those_of_the_pipelines():
    scheduler = make(
        "UniPCMultistep", use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True
    )
    mu = 0.5 + (1024 - 256) / (4096 - 256) * (1.15 - 0.5)  # calculate_shift of diffusers' pipelines, with its defaults
    assert read(scheduler).t.shift(torch.zeros(1, 1024, 64)) == pytest.approx(math.exp(mu))
