"""The teacher of LoRA training: the gradient of an own copy of the base, without holding one."""

import copy
import logging
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from algorithm1 import algorithm1, freeze
from models import TOLERANCE, ConvNet, conditional_unet, distance
from paper import PaperObjective
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from zoo import B, build, normal

from perceptual_diffusion import schedules
from perceptual_diffusion.lora import LoraTeacher

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning"),  # two of torch's attention
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*eva:UserWarning"),
]

EXACT = TOLERANCE[torch.float32]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FAMILIES = ["UNet2DConditionModel", "DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"]


def config(**options):
    return peft.LoraConfig(**{"r": 2, "target_modules": ATTENTION} | options)


def add_adapter(model, *configs):
    """As diffusers' training scripts do; of several adapters all are active."""
    if not hasattr(model, "add_adapter"):  # the DiT
        return peft.inject_adapter_in_model(*configs or [config()], model)
    for i, one in enumerate(configs or [config()]):
        model.add_adapter(one, adapter_name=f"adapter{i}")
    if len(configs) > 1:
        model.set_adapters([f"adapter{i}" for i in range(len(configs))])
    return model


def get_peft_model(model, *configs):
    return peft.get_peft_model(model, *configs or [config()])


def perturb(model, seed=1, words=""):
    """Move whatever trains, so that no factor of an adapter is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and words in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


class Setup:
    """A LoRA student, its objective, that of an own deep copy of the base made before the adapter, and a batch."""

    def __init__(self, name="UNet2DConditionModel", adapt=add_adapter, merge=None, **options):
        base, tiny = build(name)
        self.cond, self.clean, self.noise = tiny.cond, tiny.clean, normal(*tiny.clean.shape, seed=5)
        options |= {"prediction": tiny.prediction, "schedule": tiny.scheduler()}
        self.expected = PaperObjective.wrap(base, teacher=freeze(base), **options)
        self.student = adapt(base).train()
        perturb(self.student, words="lora_")
        if merge is not None:
            merge(self.student)
        self.objective = PaperObjective.wrap(self.student, teacher="lora", **options)
        self.teacher = self.objective.teacher
        self.t, self.t_prime = (self.objective.schedule.at(torch.tensor(q)) for q in ([0.2, 0.5, 0.8], [0.7, 0.1, 0.4]))

    def to(self, dtype):
        """Move the student, and the deep copy with it; the LoRA teacher has to follow by itself."""
        self.student.to(dtype)
        self.expected.to(dtype)
        self.clean, self.noise = self.clean.to(dtype), self.noise.to(dtype)
        self.cond = {key: x.to(dtype) if x.is_floating_point() else x for key, x in self.cond.items()}

    def loss(self, objective, output):
        batch = {"clean": self.clean, "noise": self.noise, "t": self.t, "t_prime": self.t_prime, "cond": self.cond}
        return objective.loss(output, **batch)

    def step(self, objective):
        """The gradient to the prediction, and to each weight that trains; dropout is drawn from one seed."""
        torch.manual_seed(3)
        self.student.zero_grad()
        x_t = objective.add_noise(self.clean, self.noise, self.t).requires_grad_()  # reentrant checkpointing wants that
        output = objective.call(self.student, x_t, self.t, self.cond)
        raw = output.sample
        raw.retain_grad()
        self.loss(objective, output).backward()
        return raw.grad, {n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None}

    def gradient(self, objective):
        """The gradient to a prediction that is given."""
        prediction = normal(*self.clean.shape, seed=7).to(self.clean.dtype).requires_grad_()
        return torch.autograd.grad(self.loss(objective, prediction), prediction)[0]

    def check(self, tolerance=EXACT):
        """The gradients, of the prediction and of the student's weights, are those of the deep copy."""
        actual, weights = self.step(self.objective)
        expected, own = self.step(self.expected)
        assert distance(actual, expected) < tolerance
        assert weights.keys() == own.keys()
        assert all(grad.norm() > 0 for name, grad in own.items() if "lora_" in name)
        flat = [torch.cat([grad.flatten() for grad in grads.values()]) for grads in (weights, own)]
        assert distance(*flat) < tolerance

    def check_given(self, tolerance=EXACT):
        """The same where the student trains nothing, to a prediction that is given."""
        assert distance(self.gradient(self.objective), self.gradient(self.expected)) < tolerance


def train(setup, steps=3):
    optimizer = torch.optim.AdamW([p for p in setup.student.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        setup.step(setup.objective)
        optimizer.step()


CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}


def checkpointed(model, reentrant):
    if reentrant is not None:
        inner = model.base_model.model if isinstance(model, peft.PeftModel) else model
        inner.enable_gradient_checkpointing(lambda module, *args: checkpoint(module, *args, use_reentrant=reentrant))
    return model


# --- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", CHECKPOINTING.values(), ids=CHECKPOINTING)
@pytest.mark.parametrize("adapt", [add_adapter, get_peft_model])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_a_deep_copy_of_the_base(family, adapt, reentrant):
    setup = Setup(family, lambda model: checkpointed(adapt(model), reentrant))
    setup.check()
    train(setup)
    setup.check()
    assert setup.teacher.parameters_held == 0


def test_the_gradient_is_that_of_algorithm_1_on_the_base():
    torch.manual_seed(0)
    student = conditional_unet()
    base, layers, bar = freeze(student), ["mid_block"], schedules.Discrete.scaled_linear().alpha_bar
    perturb(add_adapter(student))

    def call(model, x, t, cond):
        return model(x, t, **cond).sample

    objective = PaperObjective.wrap(
        student, schedules.Discrete.scaled_linear(), prediction="v_prediction", layers=layers, call=call, teacher="lora"
    )
    clean, noise = torch.randn(2, B, 4, 8, 8)
    prediction, t, t_prime = (
        torch.randn(B, 4, 8, 8, requires_grad=True),
        *torch.tensor([[20, 500, 900], [700, 300, 60]]),
    )
    batch = {"clean": clean, "noise": noise, "t_prime": t_prime}
    cond = {"encoder_hidden_states": normal(B, 5, 8)}
    at = {key: (bar[x].sqrt(), (1 - bar[x]).sqrt()) for key, x in (("at_t", t), ("at_t_prime", t_prime))}
    loss = algorithm1(base, layers, call, cond, model_output=prediction, kind="v_prediction", **batch, **at).mean()
    expected = torch.autograd.grad(loss, prediction)[0]
    actual = torch.autograd.grad(objective.loss(prediction, t=t, cond=cond, **batch), prediction)[0]
    assert distance(actual, expected) < EXACT


KINDS = {
    "two adapters, both active": [config(), config(r=3)],
    "rank-stabilised, with convolutions": [
        config(use_rslora=True, target_modules=[*ATTENTION, "conv1", "conv_shortcut"])
    ],
    "DoRA": [config(use_dora=True, target_modules=[*ATTENTION, "conv1"])],
    "dropout": [config(lora_dropout=0.3)],
    "a bias in LoRA": [config(lora_bias=True, target_modules=["to_out.0"])],
    "all biases": [config(bias="all")],
    "biases of LoRA layers": [config(bias="lora_only")],
    "modules to save": [config(modules_to_save=["conv_in", "norm1"])],
    "LoHa": [peft.LoHaConfig(r=2, target_modules=ATTENTION)],
    "OFT": [peft.OFTConfig(r=0, oft_block_size=2, target_modules=["to_q", "to_k"])],
    "IA3": [peft.IA3Config(target_modules=ATTENTION, feedforward_modules=[])],
}


@pytest.mark.parametrize("reentrant", [None, True], ids=["none", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_leaves_the_gradient_that_of_the_base(kind, reentrant):
    ways = [add_adapter] if len(KINDS[kind]) > 1 else [get_peft_model]
    setup = Setup(adapt=lambda model: checkpointed(ways[0](model, *KINDS[kind]), reentrant))
    setup.check()
    train(setup)
    setup.check()


def test_one_of_two_adapters_is_active_and_then_the_other():
    setup = Setup(adapt=lambda model: add_adapter(model, config(), config(r=3)))
    for active in ("adapter0", "adapter1", ["adapter0", "adapter1"]):
        setup.student.set_adapter(active)
        setup.check()
    setup.student.disable_adapters()
    setup.check_given()
    setup.student.enable_adapters()
    setup.check()


def test_a_compiled_student_and_parts_that_checkpoint_themselves_are_unwrapped():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def adapt(model):
        add_adapter(model)
        model.down_blocks[0] = checkpoint_wrapper(model.down_blocks[0])
        model.mid_block.attentions[0] = torch.compile(model.mid_block.attentions[0], backend="eager")
        return model

    setup = Setup(adapt=adapt)
    setup.check_given()
    teacher = LoraTeacher(
        torch.compile(setup.student), layers=["mid_block"], call=setup.objective.call, select=setup.teacher.select
    )
    features = [t(setup.clean, setup.t, setup.cond)[0] for t in (teacher, setup.teacher)]
    assert torch.equal(*features)


# torch.compile looks at the gradient of its inputs, and hides its own warning unless warnings are errors
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("options", [{"backend": "eager"}, {"backend": "aot_eager"}], ids=["eager", "aot_eager"])
def test_a_compiled_teacher_gives_the_same_gradient_also_after_a_merge(options):
    setup = Setup()
    teacher = LoraTeacher(
        setup.student,
        layers=setup.teacher.layers,
        call=setup.objective.call,
        select=setup.teacher.select,
        compile=options,
    )
    setup.objective.teacher = teacher
    for _ in range(3):
        setup.check_given()
    setup.student.fuse_lora()
    setup.check_given()


def test_the_check_of_the_objective_passes():
    setup = Setup()
    setup.objective.check(setup.student, setup.clean, cond=setup.cond)


# --- what is held -----------------------------------------------------------------------------------------------------


class Allocated(TorchDispatchMode):
    """Counts the bytes of memory that operations make anew."""

    def __init__(self, model):
        super().__init__()
        self.storages = {s.data_ptr(): s for t in (*model.parameters(), *model.buffers()) if (s := t.untyped_storage())}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.storages:
                    self.bytes += storage.nbytes()
                    self.storages[storage.data_ptr()] = storage  # alive, so that its address is not given again
        return out


@pytest.mark.parametrize("adapt", [add_adapter, get_peft_model])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_is_allocated_not_even_for_a_moment(family, adapt):
    base, _ = build(family)
    buffers = sum(b.untyped_storage().nbytes() for b in base.buffers())
    student = adapt(base)
    with Allocated(student) as allocated:
        teacher = LoraTeacher(student, layers=[], call=None)
    assert allocated.bytes <= buffers + 16
    assert teacher.parameters_held == 0
    mine = {p.data_ptr() for p in student.parameters()}
    assert all(p.data_ptr() in mine for p in teacher.module.parameters())
    assert not any("lora" in name for name, _ in teacher.module.named_modules())
    with Allocated(student) as allocated:
        freeze(student)
    assert allocated.bytes > buffers + 16  # the count sees a copy


def test_what_trains_in_place_is_copied_and_counted():
    base, _ = build("UNet2DConditionModel")
    biases = sum(p.numel() for name, p in base.named_parameters() if name.endswith("bias"))
    for adapt, held in (
        (lambda model: get_peft_model(model, config(bias="all")), biases),
        (lambda model: get_peft_model(model, config(modules_to_save=["conv_in"])), 0),
        (lambda model: model.conv_in.requires_grad_(True) and model, 0),
    ):
        student = adapt(copy.deepcopy(base))
        if held:
            assert LoraTeacher(student, layers=[], call=None).parameters_held == held
    student = add_adapter(copy.deepcopy(base))
    student.conv_in.requires_grad_(True)
    teacher = LoraTeacher(student, layers=[], call=None)
    assert teacher.parameters_held == sum(p.numel() for p in student.conv_in.parameters())
    assert student.conv_in.weight.requires_grad
    assert not teacher.module.conv_in.weight.requires_grad


def unfrozen(model):
    add_adapter(model)
    for name in ("conv_in", "time_embedding"):
        getattr(model, name).requires_grad_(True)
    return model


def test_layers_that_were_unfrozen_stay_in_the_teacher_as_they_were():
    setup = Setup(adapt=unfrozen)
    before = setup.student.conv_in.weight.clone()
    train(setup)
    assert distance(setup.student.conv_in.weight, before) > 1e-3
    setup.check()


def test_statistics_of_norms_do_not_move_with_the_students():
    torch.manual_seed(0)
    base = ConvNet(norm=True)
    reference = freeze(base)
    student = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["body", "stem"])).train()
    teacher = LoraTeacher(student, layers=["head"], call=lambda m, x, t, c: m(x, t))
    x, t = torch.randn(4, 3, 6, 6), torch.rand(4)
    before = student.base_model.model.norm.running_mean.clone()
    for _ in range(3):
        student(x + 2, t)
    assert distance(student.base_model.model.norm.running_mean, before + 1e-9) > 1
    assert torch.equal(teacher(x, t, {})[0], reference(x, t))
    assert student.training
    assert student.base_model.model.norm.training
    student.to(torch.float64)
    assert distance(teacher(x.double(), t.double(), {})[0], reference.double()(x.double(), t.double())) < 1e-9


class Positions(ConvNet):
    """With a table too large to be copied."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.linspace(0, 1, 2**16 + 36))

    def forward(self, x, t):
        return super().forward(x + self.table[-36:].view(6, 6), t)


def test_large_tables_are_shared_and_followed_and_a_write_into_one_is_told(caplog):
    torch.manual_seed(0)
    base = Positions()
    reference = freeze(base)
    student = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["body"]))
    teacher = LoraTeacher(student, layers=["head"], call=lambda m, x, t, c: m(x, t))
    x, t = torch.randn(4, 3, 6, 6), torch.rand(4)
    assert teacher.module.table is base.table
    assert torch.equal(teacher(x, t, {})[0], reference(x, t))
    student.double()
    assert teacher(x.double(), t.double(), {})[0].dtype == torch.float64
    assert teacher.module.table is base.table
    assert not caplog.records
    base.table.zero_()
    with caplog.at_level("INFO", logger="perceptual_diffusion"):
        for _ in range(2):
            teacher(x.double(), t.double(), {})
    assert [record.message for record in caplog.records] == [
        "the buffer 'table' of `model`, which the teacher shares, was written into"
    ]


# --- the student stays as it is ---------------------------------------------------------------------------------------


def test_modes_adapters_flags_hooks_and_random_numbers_of_the_student_stay_as_they_are():
    def adapt(model):
        add_adapter(model, config(lora_dropout=0.2), config(r=3))
        model.set_adapter("adapter1")
        model.conv_out.register_forward_hook(lambda module, args, out: out)
        return checkpointed(model, False)

    def state():
        modules = [
            (name, m.training, vars(m).get("gradient_checkpointing"), vars(m).get("merged_adapters"), len(m._forward_hooks),
             vars(m).get("_active_adapter"), vars(m).get("_disable_adapters"), type(m))
            for name, m in student.named_modules()
        ]  # fmt: skip
        tensors = [
            (name, id(p), p.requires_grad, p._version, p.data_ptr(), p.sum().item())
            for name, p in student.named_parameters()
        ]
        return modules, tensors, list(student.peft_config.items()), torch.get_rng_state().tolist()

    setup = Setup(adapt=adapt)
    student = setup.student
    student.mid_block.eval()
    assert any(vars(m).get("gradient_checkpointing") for m in student.modules())
    assert not any(vars(m).get("gradient_checkpointing") for m in setup.teacher.module.modules())
    before = state()
    setup.gradient(setup.objective)
    setup.gradient(setup.objective)
    assert state() == before
    assert not any(m.training or m._forward_hooks for m in setup.teacher.module.modules())


def test_adapters_that_are_saved_and_loaded_do_not_reach_the_teacher():
    setup = Setup()
    saved = peft.get_peft_model_state_dict(setup.student, adapter_name="adapter0")
    before = setup.gradient(setup.objective)
    train(setup)
    peft.set_peft_model_state_dict(setup.student, saved, adapter_name="adapter0")
    setup.check()
    assert torch.equal(setup.gradient(setup.objective), before)


# --- merged adapters --------------------------------------------------------------------------------------------------


MERGE = {
    "PEFT": (get_peft_model, lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()),
    "PEFT, safe": (get_peft_model, lambda m: m.merge_adapter(safe_merge=True), lambda m: m.unmerge_adapter()),
    "diffusers": (add_adapter, lambda m: m.fuse_lora(lora_scale=0.7), lambda m: m.unfuse_lora()),
    "DoRA": (
        lambda m: get_peft_model(m, config(use_dora=True, target_modules=[*ATTENTION, "conv1"])),
        lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter(),
    ),
    "two": (lambda m: add_adapter(m, config(), config(r=3)), lambda m: m.fuse_lora(), lambda m: m.unfuse_lora()),
    "biases": (
        lambda m: get_peft_model(m, config(lora_bias=True, target_modules=["to_out.0"])),
        lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MERGE)
def test_merged_adapters_do_not_reach_the_teacher(kind):
    adapt, merge, unmerge = MERGE[kind]
    setup = Setup(adapt=adapt, merge=merge)
    tuned = sum(
        p.numel() for m in setup.student.modules() if hasattr(m, "base_layer") for p in m.base_layer.parameters()
    )
    for _ in range(2):
        setup.check_given()
        assert setup.teacher.parameters_held == tuned > 0
        unmerge(setup.student)
        setup.check()
        assert setup.teacher.parameters_held == 0
        train(setup)
        merge(setup.student)


def test_adapters_merged_for_good_do_not_reach_the_teacher():
    setup = Setup(adapt=get_peft_model)
    before = setup.gradient(setup.objective)
    merged = setup.student.merge_and_unload()
    assert not any(hasattr(m, "base_layer") for m in merged.modules())
    assert distance(setup.gradient(setup.objective), before) < EXACT


def test_an_adapter_added_later_and_merged_does_not_reach_the_teacher():
    setup = Setup()
    setup.student.add_adapter(config(target_modules=[*ATTENTION, "conv1"]), adapter_name="later")
    perturb(setup.student, words="later")
    setup.check()
    setup.student.fuse_lora(adapter_names=["later"])
    setup.check_given()
    setup.student.unfuse_lora()
    setup.student.delete_adapters("later")
    setup.student.set_adapter("adapter0")
    setup.check()


class Attends(nn.Module):
    """Attention of torch's, whose LoRA layer puts new weights into the base in every pass."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 8)

    def forward(self, x, t):
        return self.last(self.attention(x, x, x, need_weights=False)[0] + t[:, None, None])


@pytest.mark.parametrize("merged", [False, True])
def test_attention_of_torch_is_copied_since_its_lora_makes_the_base_anew(merged):
    torch.manual_seed(0)
    base = Attends()
    reference = freeze(base)
    student = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False))
    if merged:
        student.merge_adapter()
    teacher = LoraTeacher(student, layers=["last"], call=lambda m, x, t, c: m(x, t))
    x, t = torch.randn(3, 4, 8), torch.rand(3)
    assert teacher.parameters_held == sum(p.numel() for p in reference.attention.parameters())
    for _ in range(3):
        student(x, t)
        assert distance(teacher(x, t, {})[0], reference(x, t)) < EXACT
    assert distance(student(x, t), reference(x, t)) > 0.01


# --- the base moves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapt", [add_adapter, lambda model: get_peft_model(model, config(bias="all"))])
def test_the_teacher_follows_the_student_to_another_dtype_and_back_and_says_so(adapt, caplog):
    caplog.set_level(logging.INFO, "perceptual_diffusion")
    setup = Setup(adapt=adapt)
    setup.check()
    setup.to(torch.float64)
    setup.check(1e-9)
    assert "the base of the student is now torch.float64 on cpu" in caplog.text
    assert {p.dtype for p in setup.teacher.module.parameters()} == {torch.float64}
    setup.to(torch.float32)
    setup.check()


def test_moving_the_objective_moves_nothing_and_says_what_does(caplog):
    caplog.set_level(logging.INFO, "perceptual_diffusion")
    setup = Setup()
    setup.objective.to(torch.float64)
    assert {p.dtype for p in setup.student.parameters()} == {torch.float32}
    assert "they move with `model.to`" in caplog.text
    setup.check()


def test_a_sample_elsewhere_is_refused_and_the_message_names_the_base():
    setup = Setup()
    with pytest.raises(
        ValueError, match=r"base weights of `model` are on cpu, expected meta.*Call `model.to\('meta'\)`"
    ):
        setup.teacher(setup.clean.to("meta"), setup.t, setup.cond)


def test_base_weights_that_are_replaced_are_followed_and_told(caplog):
    setup = Setup()
    state = {name: tensor.clone() for name, tensor in setup.student.state_dict().items()}
    setup.student.load_state_dict(state, assign=True)
    setup.check()
    count = sum("lora_" not in name for name in state)
    assert [r.message for r in caplog.records] == [
        f"{count} base weights of `model` were replaced after `wrap`; the teacher runs the new ones"
    ]
    assert setup.teacher.parameters_held == 0
    setup.student.to(torch.float64)
    assert setup.teacher.module.conv_in.weight is setup.student.conv_in.weight


def replace(change):
    def apply(student):
        weight = student.conv_in.weight
        student.conv_in.weight = nn.Parameter(change(weight.data), requires_grad=False)

    return apply


LATER = {
    "requires grad": (lambda student: student.conv_in.requires_grad_(True), r"'conv_in.weight' .*requires grad now.*Freeze it"),
    "offloaded": (replace(lambda w: w.to("meta")), r"'conv_in.weight' .*on the meta device.*use `teacher='copy'`"),
    "sharded": (replace(lambda w: w[:2]), r"'conv_in.weight' .*was partitioned or replaced after `wrap`.*use `teacher='copy'`"),
    "flattened": (lambda student: delattr(student.conv_in, "weight"), r"'conv_in.weight' .*was partitioned or replaced"),
    "ZeRO-3": (lambda student: setattr(student.conv_in.weight, "ds_id", 0), r"'conv_in.weight' .*was partitioned or replaced"),
    "PiSSA": (
        lambda student: student.add_adapter(config(init_lora_weights="pissa"), adapter_name="later"),
        r"initialised by 'pissa', which alters the base",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LATER)
def test_what_becomes_of_the_base_after_wrap_is_refused_where_it_cannot_be_followed(what):
    setup = Setup()
    setup.check_given()
    change, message = LATER[what]
    change(setup.student)
    with pytest.raises(ValueError, match="(?i)" + message):
        setup.gradient(setup.objective)


def test_offloading_by_accelerate_after_wrap_is_told():
    accelerate = pytest.importorskip("accelerate")
    setup = Setup()
    accelerate.cpu_offload(setup.student, execution_device="cpu")
    with pytest.raises(ValueError, match="is on the meta device, as offloading leaves it"):
        setup.gradient(setup.objective)


# --- refused at construction ------------------------------------------------------------------------------------------


def kasa(model):
    return get_peft_model(model, config(kasa_config=peft.tuners.lora.config.KasaConfig()))


def offloaded(model):
    pytest.importorskip("accelerate").cpu_offload(add_adapter(model), execution_device="cpu")
    return model


def marked(model):
    add_adapter(model).conv_in.weight.ds_id = 0
    return model


REFUSED = {
    "no adapter": (lambda model: model, r"UNet2DConditionModel without LoRA layers.*Add the adapter before `wrap`.*'copy'"),
    "PiSSA": (lambda model: add_adapter(model, config(init_lora_weights="pissa")), r"initialised by 'pissa'.*teacher='copy'"),
    "PiSSA, fast": (lambda model: add_adapter(model, config(init_lora_weights="pissa_niter_4")), r"'pissa_niter_4'"),
    "OLoRA": (lambda model: add_adapter(model, config(init_lora_weights="olora")), r"initialised by 'olora'"),
    "KaSA": (kasa, r"initialised by 'kasa'"),
    "partitioned": (marked, r"`model` is partitioned"),
    "offloaded": (offloaded, r"on the meta device"),
    "layerwise casting": (
        lambda model: add_adapter(model).enable_layerwise_casting(torch.float8_e4m3fn, torch.float32) or model,
        r"has diffusers' hook",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_whose_base_is_not_there_as_it_was_is_refused(what):
    adapt, message = REFUSED[what]
    base, _ = build("UNet2DConditionModel")
    with pytest.raises(ValueError, match=message):
        LoraTeacher(adapt(base), layers=["mid_block"], call=None)


def test_initialisations_that_alter_the_base_are_just_those_that_are_refused():
    """Of those of the PEFT that is installed, without data."""
    for kind in (True, False, "gaussian", "orthogonal", "mica", "eva", "pissa", "olora"):
        base, _ = build("UNet2DConditionModel")
        before = freeze(base)
        student = get_peft_model(base, config(init_lora_weights=kind))
        same = all(
            torch.equal(m.base_layer.weight, before.get_submodule(name.removeprefix("base_model.model.")).weight)
            for name, m in student.named_modules()
            if hasattr(m, "base_layer")
        )
        try:
            LoraTeacher(student, layers=[], call=None)
        except ValueError:
            assert not same, kind
        else:
            assert same, kind


# --- copies of the objective ------------------------------------------------------------------------------------------


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_with_the_student_shares_that_students_base(copied):
    setup = Setup(adapt=get_peft_model)
    student, teacher = copied((setup.student, setup.teacher))
    assert teacher.module.conv_in.weight is student.base_model.model.conv_in.weight
    assert teacher.module.conv_in.weight is not setup.teacher.module.conv_in.weight
    perturb(student)
    student.merge_adapter()
    setup.objective.teacher = teacher
    setup.check_given()
    assert teacher.parameters_held > 0
    assert setup.teacher.parameters_held == 0


def test_a_copy_without_the_student_is_on_its_own():
    setup = Setup(adapt=get_peft_model)
    setup.objective = copy.deepcopy(setup.objective)
    setup.student.merge_adapter()
    with torch.no_grad():
        for parameter in setup.student.parameters():
            parameter.zero_()
    setup.check_given()


# --- quantised bases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_shared_too(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    make = bnb.nn.Linear4bit if bits == 4 else partial(bnb.nn.Linear8bitLt, has_fp16_weights=False)

    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
            self.body = make(64, 64, bias=False)

        def forward(self, x, t):
            return self.last(torch.tanh(self.body(self.first(x) + t[:, None])))

    base = Quantised().to("cpu").eval()
    x, t = torch.randn(3, 64, requires_grad=True), torch.rand(3)
    weight, code = base.body.weight, base.body.weight.data.clone()
    reference = copy.deepcopy(base)
    student = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["body"], init_lora_weights=False)).train()
    with Allocated(student) as allocated:
        teacher = LoraTeacher(student, layers=["last"], call=lambda m, x, t, c: m(x, t))
    assert allocated.bytes < weight.untyped_storage().nbytes() / 4
    assert teacher.module.body.weight is weight
    assert teacher.parameters_held == 0
    for _ in range(2):
        with torch.no_grad():
            teacher(x, t, {})  # the student runs after this as it would have before
        expected, feature = reference(x, t), teacher(x, t, {})[0]
        assert torch.equal(feature, expected)
        grads = [torch.autograd.grad(f.square().sum(), x)[0] for f in (feature, expected)]
        assert distance(*grads) < EXACT
        with student.disable_adapter():
            assert distance(student(x, t), expected) < 0.02  # in train mode bitsandbytes runs other kernels
        student.zero_grad()
        student(x, t).square().sum().backward()
        assert all(p.grad.norm() > 0 for name, p in student.named_parameters() if "lora_" in name)
    assert torch.equal(weight.data, code)


# --- the page about it ------------------------------------------------------------------------------------------------


def test_the_code_of_the_page_runs():
    from diffusers import DDPMScheduler

    page = (Path(__file__).parents[1] / "docs/lora.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    names = {"model": conditional_unet(), "noise_scheduler": scheduler}
    names |= {"latents": torch.randn(2, 4, 8, 8), "text": torch.randn(2, 5, 8)}
    exec(code, names)
    assert any(p.grad is not None for p in names["model"].parameters())
    assert names["objective"].teacher.parameters_held == 0
