"""Model families: what is found for a model, and objectives wrapped with a diffusers scheduler, end to end."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from algorithm1 import algorithm1, freeze
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from models import TOLERANCE, ConvNet, conditional_unet, distance, dit, unet
from paper import PaperObjective
from torch import nn

from perceptual_diffusion import adapters, schedules
from perceptual_diffusion.adapters import Adapter, _registry, find, register

# diffusers 0.42 turns torch tensors to numpy the old way under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

LABELS = {"class_labels": torch.tensor([1, 2, 3])}
TEXT = {"encoder_hidden_states": torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(_registry, "_factories", dict(_registry._factories))


# --- what is found ----------------------------------------------------------------------------------------------------

NO_MIDDLE = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "mid_block_type": None,
}
FOUND = {
    "unet": (unet, {}, "UNet2DModel", ("mid_block",)),
    "conditional unet": (conditional_unet, {}, "UNet2DConditionModel", ("mid_block",)),
    "unet without a middle": (unet, NO_MIDDLE, "UNet2DModel", ("down_blocks.1",)),
    "conditional unet without a middle": (conditional_unet, NO_MIDDLE, "UNet2DConditionModel", ("down_blocks.1",)),
    "dit of 3": (dit, {}, "DiTTransformer2DModel", ("transformer_blocks.1",)),
    "dit of 4": (dit, {"num_layers": 4}, "DiTTransformer2DModel", ("transformer_blocks.2",)),
}


@pytest.mark.parametrize(("make", "config", "family", "layers"), FOUND.values(), ids=FOUND)
def test_find_knows_the_middle_of_a_family(make, config, family, layers):
    adapter = find(make(**config))
    assert (adapter.family, adapter.layers) == (family, layers)


def test_find_looks_into_a_compiled_model():
    assert find(torch.compile(unet(), backend="eager")).family == "UNet2DModel"


def test_find_knows_a_subclass_of_a_known_class():
    class MyUNet(UNet2DModel):
        pass

    assert find(MyUNet(**unet().config)).family == "UNet2DModel"


@pytest.mark.parametrize("model", [None, "unet", unet, {"unet": 1}])
def test_find_refuses_what_is_no_module(model):
    with pytest.raises(TypeError, match=r"`model` is an? \w+, expected a torch.nn.Module. Pass `pipeline.unet`"):
        find(model)


def test_an_unknown_class_says_what_to_pass():
    with pytest.raises(
        ValueError,
        match=r"middle of ConvNet cannot be told.*candidates: stem, norm, dropout, body, head.*adapters.register",
    ):
        find(ConvNet())


# --- end to end -------------------------------------------------------------------------------------------------------


def table(scheduler):
    bar = scheduler.alphas_cumprod.double()
    return lambda t: (bar[t].sqrt(), (1 - bar[t]).sqrt())


def plain(model, x, t, cond):
    return model(x, t, **cond).sample


def preconditioned(model, x, t, cond):
    """EDM's c_in and c_noise with sigma_data = 0.5 (Karras et al. 2022, table 1)."""
    return model(x / (t.view(-1, 1, 1, 1) ** 2 + 0.25).sqrt(), t.log() / 4, **cond).sample


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO = SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
INDEX, SIGMA = torch.tensor([[100, 500, 800], [700, 20, 999]]), torch.tensor([[0.1, 1.0, 5.0], [0.7, 0.02, 20.0]])
PROCESSES = {
    "DDPM": (lambda: DDPMScheduler(), table, plain, "epsilon", INDEX),
    "DDPM sample": (lambda: DDPMScheduler(prediction_type="sample"), table, plain, "sample", INDEX),
    "DDIM v, zero terminal SNR": (lambda: DDIMScheduler(**ZERO), table, plain, "v_prediction", INDEX.flip(0)),
    "Euler": (lambda: EulerDiscreteScheduler(**SD), table, plain, "epsilon", INDEX),
    "EDMEuler": (
        lambda: EDMEulerScheduler(sigma_data=0.5), lambda s: lambda t: (torch.ones_like(t), t), preconditioned,
        "edm", SIGMA,
    ),
    "FlowMatchEuler": (
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0), lambda s: lambda t: (1 - t / 1000, t / 1000), plain,
        "flow_prediction", INDEX.float(),
    ),
}  # fmt: skip
MODELS = {"unet": (unet, 3, LABELS), "conditional unet": (conditional_unet, 4, TEXT)}


@pytest.mark.parametrize("formulation", ["joint", "split"])
@pytest.mark.parametrize(("make", "channels", "cond"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("scheduler", "scales", "call", "kind", "times"), PROCESSES.values(), ids=PROCESSES)
def test_a_model_and_a_scheduler_equal_algorithm_1(
    scheduler, scales, call, kind, times, make, channels, cond, formulation
):
    student, scheduler = make(), scheduler()
    frozen = freeze(student)
    objective = PaperObjective.wrap(student, scheduler, formulation=formulation)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.05)
    clean, noise = torch.randn(2, 3, channels, 8, 8)
    t, t_prime = times
    at_t, at_t_prime = scales(scheduler)(t), scales(scheduler)(t_prime)
    alpha, sigma = (s.float().view(-1, 1, 1, 1) for s in at_t)

    loss = objective(student, clean, cond=cond, noise=noise, t=t, t_prime=t_prime, reduction="none")
    prediction = call(student, alpha * clean + sigma * noise, t, cond)
    expected = algorithm1(
        frozen, ["mid_block"], call, cond, clean=clean, noise=noise, model_output=prediction, t_prime=t_prime,
        at_t=at_t, at_t_prime=at_t_prime, kind=kind, formulation=formulation,
    )  # fmt: skip
    assert distance(loss, expected) < TOLERANCE[torch.float32]
    gradients = [torch.autograd.grad(x.mean(), list(student.parameters())) for x in (loss, expected)]
    assert distance(*(torch.cat([g.flatten() for g in gradient]) for gradient in gradients)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("make", [unet, conditional_unet])
def test_a_unet_without_a_middle_equals_algorithm_1(make):
    student, cond = make(**NO_MIDDLE), LABELS if make is unet else TEXT
    frozen, scheduler = freeze(student), DDPMScheduler()
    objective = PaperObjective.wrap(student, scheduler)
    clean, noise, prediction = torch.randn(3, 3, student.config.in_channels, 8, 8)
    prediction.requires_grad_()
    t, t_prime = INDEX
    loss = objective.loss(prediction, clean=clean, noise=noise, t=t, t_prime=t_prime, cond=cond)
    expected = algorithm1(
        frozen, ["down_blocks.1"], plain, cond, clean=clean, noise=noise, model_output=prediction, t_prime=t_prime,
        at_t=table(scheduler)(t), at_t_prime=table(scheduler)(t_prime), kind="epsilon",
    ).mean()  # fmt: skip
    assert distance(loss, expected) < TOLERANCE[torch.float32]
    assert distance(*(torch.autograd.grad(x, prediction)[0] for x in (loss, expected))) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("drop_in", [False, True])
def test_the_learned_variance_of_a_dit_is_cut_off(drop_in):
    student = dit().eval()
    frozen, scheduler = freeze(student), DDPMScheduler()
    objective = PaperObjective.wrap(student, scheduler)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.05)
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    t, t_prime = INDEX
    at_t, at_t_prime = table(scheduler)(t), table(scheduler)(t_prime)
    alpha, sigma = (s.float().view(-1, 1, 1, 1) for s in at_t)

    def call(model, x, t, cond):
        return model(x, timestep=t, **cond).sample

    output = call(student, alpha * clean + sigma * noise, t, LABELS)
    assert output.shape == (3, 8, 8, 8)
    batch = {"cond": LABELS, "noise": noise, "t": t, "t_prime": t_prime}
    loss = objective.loss(output, clean=clean, **batch) if drop_in else objective(student, clean, **batch)
    expected = algorithm1(
        frozen, ["transformer_blocks.1"], call, LABELS, clean=clean, noise=noise, model_output=output[:, :4],
        t_prime=t_prime, at_t=at_t, at_t_prime=at_t_prime, kind="epsilon",
    ).mean()  # fmt: skip
    assert distance(loss, expected) < TOLERANCE[torch.float32]
    parameters = list(student.parameters())
    got, want = (torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (loss, expected))
    assert [g is None for g in got] == [g is None for g in want]
    flat = [torch.cat([g.flatten() for g in gradients if g is not None]) for gradients in (got, want)]
    assert distance(*flat) < TOLERANCE[torch.float32]


def test_a_tuple_instead_of_an_output_object_serves_as_well():
    student = unet()
    objective = PaperObjective.wrap(student, DDPMScheduler())
    clean, noise = torch.randn(2, 3, 3, 8, 8)
    losses = [
        objective(student, clean, cond=LABELS | extra, noise=noise, t=INDEX[0], t_prime=INDEX[1])
        for extra in ({}, {"return_dict": False})
    ]
    assert torch.equal(*losses)


def test_flow_matching_draws_times_with_the_schedulers_shift():
    objective = PaperObjective.wrap(unet(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    t = objective.t(objective.schedule, torch.zeros(4000, 1), generator=torch.Generator().manual_seed(0))
    assert abs(t.median() - 750) < 20, "3 u / (1 + 2 u) at u = 1/2 is 3/4"
    t_prime = objective.t_prime(
        objective.schedule, torch.zeros(4000, 1), t=t, generator=torch.Generator().manual_seed(0)
    )
    assert abs(t_prime.median() - 500) < 20


@pytest.mark.parametrize("layers", ["body", ["stem", "body"]])
def test_an_unknown_module_works_with_layers_given(layers):
    student = ConvNet()
    objective = PaperObjective.wrap(student, schedules.Linear(), prediction="flow_prediction", layers=layers)
    loss = objective(student, torch.randn(2, 3, 6, 6))
    loss.backward()
    assert loss > 0
    assert student.stem.weight.grad.abs().sum() > 0


def test_an_explicit_prediction_wins_over_the_schedulers():
    objective = PaperObjective.wrap(unet(), DDPMScheduler(), prediction="v_prediction")
    assert objective.prediction.name == "v_prediction"


@pytest.mark.parametrize("schedule", ["ddpm", DDPMScheduler, nn.Identity(), unet(), {"alphas_cumprod": 1}])
def test_wrap_refuses_what_is_no_scheduler(schedule):
    with pytest.raises(TypeError, match=r"`schedule` is an? .*expected a diffusers scheduler or a schedule of"):
        PaperObjective.wrap(unet(), schedule, prediction="epsilon")


def test_wrap_refuses_a_model_without_a_schedule():
    with pytest.raises(
        ValueError, match=r"`schedule` is missing. Pass a diffusers scheduler, such as `pipeline.scheduler`"
    ):
        PaperObjective.wrap(unet(), prediction="epsilon")


# --- the plug point ---------------------------------------------------------------------------------------------------


class Mine(ConvNet):
    def forward(self, x, t, strength=1.0):
        return {"out": super().forward(x, t) * strength}


def mine(model):
    return Adapter(
        family="mine",
        layers=("body",),
        call=lambda m, x, t, cond: m(x, t, **cond),
        output=lambda output, x_t: output["out"],
    )


class Child(Mine):
    pass


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("key", [Mine, "test_adapters.Mine", "test_adapters.some.module.Mine"])
@pytest.mark.parametrize("cls", [Mine, Child])
def test_a_registered_class_and_its_subclasses_are_found(cls, key):
    with pytest.raises(ValueError, match=f"the middle of {cls.__name__} cannot be told"):
        find(cls())
    register(key, mine)
    student = cls()
    assert find(student).family == "mine"
    objective = PaperObjective.wrap(student, schedules.Linear(), prediction="v_prediction")
    assert objective(student, torch.randn(2, 3, 6, 6), cond={"strength": 0.5}) > 0


@pytest.mark.usefixtures("registry")
def test_a_subclass_may_have_its_own_entry():
    register(Mine, mine)
    register(Child, lambda model: Adapter(family="child", layers=("stem",)))
    assert find(Mine()).family == "mine"
    assert find(Child()).family == "child"


@pytest.mark.usefixtures("registry")
def test_a_class_of_the_same_name_in_another_package_is_not_found():
    register("elsewhere.Mine", mine)
    with pytest.raises(ValueError, match="the middle of Mine cannot be told"):
        find(Mine())


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "`cls` is 3, expected a class or 'package.ClassName'", (3, mine)),
        (TypeError, "`cls` is None, expected a class", (None, mine)),
        (ValueError, "`cls` is 'Mine', expected 'package.ClassName', such as 'diffusers.UNet2DModel'", ("Mine", mine)),
        (TypeError, "`factory` is 'mine', expected a function", (Mine, "mine")),
    ],
)
@pytest.mark.usefixtures("registry")
def test_register_refuses(error, message, arguments):
    with pytest.raises(error, match=message):
        register(*arguments)


@pytest.mark.usefixtures("registry")
def test_a_factory_that_gives_no_adapter_is_named():
    register(Mine, lambda model: ["body"])
    with pytest.raises(TypeError, match=r"factory.*Mine.*Adapter"):
        find(Mine())


PLUGIN = """
    from perceptual_diffusion.adapters import Adapter, register

    def register_all():
        register("tiny_plugin.Tiny", lambda model: Adapter(family="from a plugin", layers=("middle",)))
"""
TINY = """
    import torch

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.middle = torch.nn.Linear(3, 3)
"""


def test_an_entry_point_of_another_package_is_read_when_an_adapter_is_first_looked_for(tmp_path):
    package, info = tmp_path / "tiny_plugin", tmp_path / "tiny_plugin-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(textwrap.dedent(TINY))
    (package / "plugin.py").write_text(textwrap.dedent(PLUGIN))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{_registry.GROUP}]\ntiny = tiny_plugin.plugin:register_all\n")
    code = """
        import sys
        from perceptual_diffusion.adapters import find
        assert "tiny_plugin" not in sys.modules
        from tiny_plugin import Tiny
        print(find(Tiny()).family)
    """
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "from a plugin", done.stderr


def test_the_public_names_are_there():
    assert set(adapters.__all__) == {
        "Adapter", "Checkpoints", "Concat", "DecoderTeacher", "Process", "TimmTeacher", "find", "read", "register",
    }  # fmt: skip
