"""Teachers in half precision and with quantised weights: what they are given is not rounded, and the gradient is close."""

import copy

import pytest
import torch
from diffusers import DDPMScheduler
from models import conditional_unet, distance, dit
from paper import PaperObjective
from torch import nn
from zoo import NO_CPU_BACKWARD, ROWS, B, build, normal

from perceptual_diffusion import adapters, schedules
from perceptual_diffusion._shapes import leaves, map_leaves
from perceptual_diffusion.checks import SetupError, check
from perceptual_diffusion.precision import Precision, is_held
from perceptual_diffusion.teachers import ModuleTeacher

BF16, FP16 = torch.bfloat16, torch.float16
CLOSE = {BF16: 5e-2, FP16: 1e-2}
"""Relative error allowed of a gradient with fixed differences of the features."""


def teacher_of(model, dtype=torch.float32):
    """A teacher of a known family, by its adapter."""
    adapter = adapters.find(model)
    module = copy.deepcopy(model).to(dtype)
    return ModuleTeacher(
        module, layers=adapter.layers, call=adapter.call, select=adapter.select, prepare=adapter.prepare
    )


def gradient(teacher, x, t, cond):
    """To the sample, of a fixed sum over the features."""
    x = map_leaves(lambda v: v.detach().clone().requires_grad_(), x)
    generator = torch.Generator().manual_seed(0)
    total = sum(
        (leaf.double() * torch.randn(leaf.shape, generator=generator)).sum()
        for feature in teacher(x, t, cond)
        for leaf in leaves(feature)
    )
    with torch.autocast("cpu", enabled=False):  # where a backward belongs
        return torch.cat([g.double().flatten() for g in torch.autograd.grad(total, list(leaves(x)))])


def entering(module):
    """What a module is given in later passes."""
    seen = []
    module.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    return seen


# --- conditions are not rounded ---------------------------------------------------------------------------------------

SIZES = torch.tensor([[1023.0, 769, 3, 517, 1023, 769]] * B)
"""Original size, crop and target size: none but 3 is a number of bfloat16."""
ROUND = SIZES.bfloat16().float()


TIMES = torch.tensor([100.5, 500.25, 999.75])


def sdxl():
    """Weights that listen to the sizes."""
    model, tiny = build("UNet2DConditionModel.sdxl")
    with torch.no_grad():
        for parameter in model.add_embedding.parameters():
            parameter.mul_(3)
    return model, tiny


def sized(tiny, sizes):
    return tiny.cond | {"added_cond_kwargs": tiny.cond["added_cond_kwargs"] | {"time_ids": sizes}}


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_sizes_and_crops_reach_a_half_precision_teacher_unrounded(dtype):
    model, tiny = sdxl()
    full, half = teacher_of(model), teacher_of(model, dtype)
    seen = entering(half.module.add_time_proj)
    errors = []
    for sizes in (SIZES, ROUND):
        cond = sized(tiny, sizes)
        errors.append(distance(gradient(half, tiny.clean, TIMES, cond), gradient(full, tiny.clean, TIMES, cond)))
        assert seen
        assert all(torch.equal(args[0], sizes.flatten()) for args, _ in seen)
        seen.clear()
    assert max(errors) < CLOSE[dtype]
    assert errors[0] < 2 * errors[1]


def test_rounded_sizes_would_be_noticed():
    model, tiny = sdxl()
    full = teacher_of(model)
    exact, rounded = (gradient(full, tiny.clean, TIMES, sized(tiny, sizes)) for sizes in (SIZES, ROUND))
    assert distance(rounded, exact) > 0.2


def test_coordinates_reach_a_half_precision_flux_unrounded():
    model, tiny = build("FluxTransformer2DModel")
    cond = tiny.cond | {"img_ids": tiny.cond["img_ids"] + torch.tensor([0.0, 1023.0, 1021.0])}
    full, half = teacher_of(model), teacher_of(model, BF16)
    seen = entering(half.module.pos_embed)
    t = torch.tensor([0.12, 0.48, 0.87])
    assert distance(gradient(half, tiny.clean, t, cond), gradient(full, tiny.clean, t, cond)) < CLOSE[BF16]
    assert seen
    given = torch.cat([cond["txt_ids"], cond["img_ids"]])
    assert all(torch.equal(args[0], given) for args, _ in seen)


def test_rotary_tables_reach_a_half_precision_teacher_unrounded():
    model, tiny = build("CogVideoXTransformer3DModel.i2v")
    full, half = teacher_of(model), teacher_of(model, BF16)
    seen = entering(half.module.transformer_blocks[0])
    t = torch.tensor([120.0, 480.0, 870.0])
    assert distance(gradient(half, tiny.clean, t, tiny.cond), gradient(full, tiny.clean, t, tiny.cond)) < CLOSE[BF16]
    for args, kwargs in seen:
        tables = kwargs.get("image_rotary_emb", args[3] if len(args) > 3 else None)
        assert all(map(torch.equal, tables, tiny.cond["image_rotary_emb"]))
    assert seen


# --- every model ------------------------------------------------------------------------------------------------------

LEAST = {
    "SanaTransformer2DModel.sprint": 0.9,  # float32 weights under autocast: 0.92
    "UNet1DModel.planner": 0.96,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # Krea2's norm, also as a student
@pytest.mark.parametrize("name", sorted(set(ROWS) - NO_CPU_BACKWARD))
def test_every_model_runs_as_a_bfloat16_teacher_of_a_float32_student(name):
    model, tiny = build(name)
    index = adapters.find(model).time == "timestep" or tiny.t.max() < 10
    t = tiny.t.float() if index else tiny.t / 1000
    half = teacher_of(model, BF16)
    rounded, exact = (gradient(teacher, tiny.clean, t, tiny.cond) for teacher in (half, teacher_of(model)))
    assert rounded.isfinite().all()
    assert torch.cosine_similarity(rounded, exact, 0) > LEAST.get(name, 0.98)
    for feature in half(tiny.clean, t, tiny.cond):
        assert all(leaf.isfinite().all() for leaf in leaves(feature))


# --- which dtype meets which ------------------------------------------------------------------------------------------

TEXT = {"encoder_hidden_states": normal(2, 5, 8)}
LABELS = {"class_labels": torch.tensor([1, 2])}
T = torch.tensor([200.5, 700.25])


def by_hand(model, x, t, cond):
    return model(x, timestep=t, **cond).sample


def unets(dtype, **options):
    """A float32 teacher, and one in another dtype with the same weights rounded."""
    torch.manual_seed(0)
    model = conditional_unet()
    options = {"layers": ["mid_block"], "call": by_hand} | options
    return ModuleTeacher(copy.deepcopy(model), **options), ModuleTeacher(copy.deepcopy(model).to(dtype), **options)


def test_values_are_held_by_a_dtype_that_rounds_none():
    assert is_held(BF16, torch.float32)
    assert is_held(FP16, FP16)
    assert not is_held(torch.float32, BF16)
    assert not is_held(FP16, BF16)
    assert not is_held(BF16, FP16)


@pytest.mark.parametrize("given", [BF16, FP16])
def test_a_wider_teacher_gets_a_half_precision_sample_in_its_own_dtype(given):
    full, _ = unets(BF16)
    x, cond = normal(2, 4, 8, 8).to(given), {"encoder_hidden_states": TEXT["encoder_hidden_states"].to(given)}
    exact = {"encoder_hidden_states": cond["encoder_hidden_states"].float()}
    assert torch.equal(full(x, T, cond)[0], full(x.float(), T, exact)[0])


def test_student_and_teacher_in_bfloat16_run_as_before():
    """What is given in float32 goes to the teacher as it goes to the student."""
    model, tiny = sdxl()
    model = model.to(BF16)
    objective = PaperObjective.wrap(model, tiny.scheduler())
    clean = tiny.clean.to(BF16)
    cond = {
        "encoder_hidden_states": tiny.cond["encoder_hidden_states"].to(BF16),
        "added_cond_kwargs": {"text_embeds": tiny.cond["added_cond_kwargs"]["text_embeds"].to(BF16), "time_ids": SIZES},
    }
    noise, t, t_prime = torch.randn_like(clean), torch.tensor([100, 500, 900]), torch.tensor([700, 200, 300])
    seen, expected = entering(objective.teacher.module.add_time_proj), []
    handle = model.mid_block.register_forward_hook(lambda m, args, out: expected.append(out))
    with torch.no_grad():
        model(objective.add_noise(clean, noise, t_prime), t_prime, **cond)
    handle.remove()
    with torch.no_grad():
        (feature,) = objective.teacher(objective.add_noise(clean, noise, t_prime), t_prime, cond)
    assert torch.equal(feature, expected[0])
    objective(model, clean, noise=noise, t=t, t_prime=t_prime, cond=cond).backward()
    assert all(torch.equal(args[0], SIZES.flatten()[: len(args[0])]) for args, _ in seen)  # of one sample or more
    assert model.conv_in.weight.grad.isfinite().all()
    assert model.conv_in.weight.grad.abs().sum() > 0


def test_weights_of_several_dtypes_run_on_a_float32_sample():
    full, _ = unets(BF16)
    mixed = copy.deepcopy(full)
    mixed.module.down_blocks.to(BF16)
    mixed.module.time_embedding.to(FP16)
    x = normal(2, 4, 8, 8)
    mixed = ModuleTeacher(mixed.module, layers=["mid_block"], call=by_hand)
    assert distance(gradient(mixed, x, T, TEXT), gradient(full, x, T, TEXT)) < CLOSE[BF16]


def test_a_first_layer_in_float32_brings_a_transformer_closer():
    """Its residual stream then stays in float32; near t' the difference of the two passes is small."""
    student = loud_dit()
    objective = PaperObjective.wrap(student, DDPMScheduler(prediction_type="v_prediction"))
    x, cond = normal(4, 4, 8, 8), {"class_labels": torch.tensor([1, 2, 3, 4])}
    near, t = x + 0.03 * normal(4, 4, 8, 8, seed=2), torch.tensor([100, 300, 600, 900])

    def difference(teacher):
        with torch.no_grad():
            return teacher(near, t, cond)[0].double() - teacher(x, t, cond)[0].double()

    errors = []
    for keep in (False, True):
        module = copy.deepcopy(student).to(BF16)
        if keep:
            module.pos_embed.float()
        half = ModuleTeacher(module, layers=objective.teacher.layers, call=objective.call)
        errors.append(distance(difference(half), difference(objective.teacher)))
    assert errors[1] < 0.7 * errors[0]


def test_the_copy_in_half_precision_is_given_unrounded_sizes():
    model, tiny = sdxl()
    full, half = (
        PaperObjective.wrap(model, tiny.scheduler(), teacher_dtype=dtype, truncate=False).teacher
        for dtype in (None, BF16)
    )
    seen, cond = entering(half.module.add_time_proj), sized(tiny, SIZES)
    assert half.module.conv_in.weight.dtype == BF16
    assert distance(gradient(half, tiny.clean, TIMES, cond), gradient(full, tiny.clean, TIMES, cond)) < CLOSE[BF16]
    assert seen
    assert all(torch.equal(args[0], SIZES.flatten()) for args, _ in seen)


@pytest.mark.parametrize("autocast", [BF16, FP16])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_inside_the_users_autocast_a_half_precision_teacher_runs_in_its_own_dtype(dtype, autocast):
    _, half = unets(dtype)
    x = normal(2, 4, 8, 8)
    expected = gradient(half, x, T, TEXT)
    assert half(x, T, TEXT)[0].dtype == dtype
    with torch.autocast("cpu", autocast):
        assert torch.equal(gradient(half, x, T, TEXT), expected)
        assert half(x, T, TEXT)[0].dtype == dtype
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == autocast


def test_inside_the_users_autocast_a_float32_teacher_is_left_to_it():
    full, _ = unets(BF16)
    with torch.autocast("cpu", BF16):
        assert full(normal(2, 4, 8, 8), T, TEXT)[0].dtype == BF16


class Turned(nn.Module):
    """Mixes dtypes where no layer is: a matrix product with a float32 table, as some attentions do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x, t, turn):
        return self.last(torch.tanh(self.first(x)) @ turn)


def test_a_model_that_mixes_dtypes_itself_runs_under_autocast():
    torch.manual_seed(0)
    model = Turned()
    run = lambda m, x, t, cond: m(x, t, **cond)  # noqa: E731
    full = ModuleTeacher(copy.deepcopy(model), layers=["last"], call=run)
    half = ModuleTeacher(copy.deepcopy(model).to(BF16), layers=["last"], call=run)
    x, cond = normal(4, 5), {"turn": normal(7, 7)}
    exact = gradient(full, x, T, cond)
    assert distance(gradient(half, x, T, cond), exact) < CLOSE[BF16]
    assert half._precision.autocast
    passes = []
    half.module.register_forward_pre_hook(lambda m, args, kwargs: passes.append(1), with_kwargs=True)
    gradient(half, x, T, cond)
    assert len(passes) == len(full(x, T, cond)), "once known, the pass that fails is not tried again"


def test_an_error_that_is_no_matter_of_precision_is_the_models_own():
    _, half = unets(BF16)
    with pytest.raises(RuntimeError, match="channels"):
        half(normal(2, 3, 8, 8), T, TEXT)
    assert not half._precision.autocast


@pytest.mark.parametrize("fault", [KeyError("deep"), RuntimeError("deep")], ids=lambda error: type(error).__name__)
def test_what_a_half_precision_teacher_fails_with_is_the_cause_as_in_float32(fault):
    passes = []

    class Failing(Turned):
        def forward(self, x, t, turn):
            passes.append(1)
            raise fault

    objective = PaperObjective.wrap(
        Failing(), schedules.Linear(), prediction="flow_prediction", layers="last", teacher_dtype=BF16, truncate=False,
        call=lambda model, x, t, cond: model(x, t, **cond),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="deep") as caught:
        objective.teacher(normal(4, 5), T, {"turn": normal(7, 7)})
    assert caught.value.__cause__ is fault
    assert len(passes) == (1 if isinstance(fault, KeyError) else 2), "only what may be of dtypes is tried again"


def kept(teacher, x):
    """Bytes that the graph of a pass keeps beside the weights."""
    own, found = {p.untyped_storage().data_ptr() for p in teacher.module.parameters()}, {}

    def pack(value):
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), value)
        return value

    teacher(x, T, TEXT)  # the first pass looks for the noisy sample's part
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        (feature,) = teacher(x, T, TEXT)
    assert feature.requires_grad
    return sum(size for size, _ in found.values())


def test_the_graph_keeps_half_as_much_and_no_weight_again():
    full, half = unets(BF16)
    x = normal(2, 4, 8, 8).requires_grad_()
    assert kept(half, x) < 0.6 * kept(full, x)


def test_layers_that_cast_for_themselves_are_left_alone():
    class Careful(nn.LayerNorm):
        def forward(self, x):
            seen.append(x.dtype)
            return nn.functional.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float())

    seen = []
    module = nn.Sequential(Careful(5), nn.Linear(5, 5)).to(BF16)
    (given,), run = Precision(module)(normal(2, 5))
    assert run(lambda: module(given)).dtype == BF16
    assert seen == [torch.float32]


def test_a_module_without_floating_weights_is_given_what_there_is():
    x = normal(2, 5)
    (given,), run = Precision(nn.Identity())(x)
    assert given is x
    assert run(lambda: 3) == 3


# --- quantised weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def ao():
    return pytest.importorskip("torchao.quantization", exc_type=ImportError)


def loud_dit():
    """A DiT whose linear layers do much beside its residual stream."""
    torch.manual_seed(0)
    model = dit().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def quantised(ao, config, dtype=torch.float32):
    """A student, its objective, the one with a quantised teacher, and a batch."""
    student = loud_dit()
    module = copy.deepcopy(student).to(dtype)
    ao.quantize_(module, getattr(ao, config)())
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    objectives = [PaperObjective.wrap(student, scheduler, teacher=given) for given in ("copy", module)]
    return student, objectives, {"clean": normal(4, 4, 8, 8), "cond": {"class_labels": torch.tensor([1, 2, 3, 4])}}


def slope(objective, batch):
    prediction = normal(4, 4, 8, 8, seed=3).requires_grad_()
    t, t_prime = torch.tensor([100, 300, 600, 900]), torch.tensor([800, 700, 200, 100])
    objective.loss(prediction, noise=normal(4, 4, 8, 8, seed=5), t=t, t_prime=t_prime, **batch).backward()
    return prediction.grad


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
@pytest.mark.parametrize(("config", "most"), [("Int8WeightOnlyConfig", 0.05), ("Float8WeightOnlyConfig", 0.15)])
def test_a_teacher_with_quantised_weights_gives_a_close_gradient(ao, config, most, dtype):
    student, (exact, rounded), batch = quantised(ao, config, dtype)
    assert distance(slope(rounded, batch), slope(exact, batch)) < most
    assert check(rounded, student, batch["clean"], cond=batch["cond"]).loss > 0


def test_quantised_activations_lose_the_gradient_and_the_check_says_so(ao):
    student, (exact, rounded), batch = quantised(ao, "Int8DynamicActivationInt8WeightConfig")
    assert distance(slope(rounded, batch), slope(exact, batch)) > 0.3
    with pytest.raises(SetupError, match="Quantise its weights only") as caught:
        check(rounded, student, batch["clean"], cond=batch["cond"])
    assert caught.value.fault == "gradient"


def test_weights_stored_in_eight_bits_by_diffusers_give_a_close_gradient():
    full, _ = unets(BF16)
    module = copy.deepcopy(full.module).to(BF16)
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=BF16)
    stored = ModuleTeacher(module, layers=["mid_block"], call=by_hand)
    x = normal(2, 4, 8, 8)
    assert distance(gradient(stored, x, T, TEXT), gradient(full, x, T, TEXT)) < 0.15
