"""Teachers: a frozen copy that is right in gradient, holds little, and leaves the student as it was."""

import hashlib
import threading

import pytest
import torch
from algorithm1 import algorithm1, freeze
from models import MLP, TOLERANCE, ConvNet, conditional_unet, distance, dit, unet
from paper import PaperObjective
from torch import nn
from torch.utils.checkpoint import checkpoint

from perceptual_diffusion import schedules
from perceptual_diffusion.teachers import CopyTeacher, ModuleTeacher

LABELS = {"class_labels": torch.tensor([1, 2])}
TEXT = {"encoder_hidden_states": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))}
FAMILIES = {
    "unet": (unet, 3, LABELS, "mid_block"),
    "conditional_unet": (conditional_unet, 4, TEXT, "mid_block"),
    "dit": (dit, 4, LABELS, "transformer_blocks.1"),
}


def call(model, x, t, cond):
    return model(x, timestep=t, **cond).sample[:, : x.shape[1]]


def sha(model):
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy(force=True).tobytes())
    return digest.hexdigest()


class Setup:
    """A student of a family, its objective, and a batch."""

    def __init__(self, family="unet", student=None, layers=None, dtype=torch.float32, **options):
        torch.manual_seed(0)
        make, channels, self.cond, layer = FAMILIES[family]
        self.student = make().eval() if student is None else student  # in train mode the DiT drops labels at random
        self.layers = layers or [layer]
        self.objective = PaperObjective.wrap(
            self.student, schedules.Discrete.scaled_linear(), prediction="v_prediction", layers=self.layers,
            call=call, **options,
        )  # fmt: skip
        torch.manual_seed(1)
        self.clean, self.noise, self.prediction = torch.randn(3, 2, channels, 8, 8, dtype=dtype)
        self.t, self.t_prime = torch.tensor([200, 700]), torch.tensor([600, 100])

    @property
    def teacher(self):
        return self.objective.teacher

    def loss(self, prediction, **options):
        batch = {"clean": self.clean, "noise": self.noise, "t": self.t, "t_prime": self.t_prime, "cond": self.cond}
        return self.objective.loss(prediction, **batch | options)

    def gradient(self, **options):
        prediction = self.prediction.clone().requires_grad_()
        self.loss(prediction, **options).backward()
        return prediction.grad

    def expected_gradient(self, frozen):
        prediction = self.prediction.clone().requires_grad_()
        bar = schedules.Discrete.scaled_linear().alpha_bar
        at = {
            name: (bar[t].sqrt(), (1 - bar[t]).sqrt()) for name, t in (("at_t", self.t), ("at_t_prime", self.t_prime))
        }
        loss = algorithm1(
            frozen, self.layers, call, self.cond, clean=self.clean, noise=self.noise, model_output=prediction,
            t_prime=self.t_prime, kind="v_prediction", **at,
        ).mean()  # fmt: skip
        return torch.autograd.grad(loss, prediction)[0]


def student_gradient(setup):
    """Of the whole of Algorithm 1 to the student's parameters, as one vector, for a student that has moved a little."""
    with torch.no_grad():
        for parameter in setup.student.parameters():
            parameter.mul_(1.1)
    setup.objective(
        setup.student, setup.clean, noise=setup.noise, t=setup.t, t_prime=setup.t_prime, cond=setup.cond
    ).backward()
    return torch.cat([p.grad.flatten() for p in setup.student.parameters() if p.grad is not None])


# --- the copy ---------------------------------------------------------------------------------------------------------


def test_the_copy_is_frozen_in_eval_and_free_of_hooks_and_gradients():
    student = unet().train()
    student.mid_block.register_forward_hook(lambda m, args, out: out)
    student.conv_in.register_forward_pre_hook(lambda m, args: None)
    student.conv_out.register_full_backward_hook(lambda m, inputs, outputs: None)
    student(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), **LABELS).sample.sum().backward()
    copied = CopyTeacher(student, layers=["mid_block"], call=call).module
    for module in copied.modules():
        assert not module.training
        tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        assert not any(tables)
    for parameter in copied.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
    own = {p.data_ptr() for p in student.parameters()}
    assert not any(p.data_ptr() in own for p in copied.parameters())


def test_the_student_keeps_its_modes_hooks_gradients_and_requires_grad():
    student = unet().train()
    student.mid_block.eval()
    student.conv_in.requires_grad_(False)
    student.conv_out.register_forward_hook(lambda m, args, out: out)
    student(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), **LABELS).sample.sum().backward()

    def state():
        return [
            *(
                (name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
                for name, m in student.named_modules()
            ),
            *(
                (name, p.requires_grad, None if p.grad is None else p.grad.sum())
                for name, p in student.named_parameters()
            ),
        ]

    before, weights, setup = state(), sha(student), Setup(student=student)
    setup.gradient()
    setup.gradient()
    assert state() == before
    assert sha(student) == weights


def test_the_teacher_does_not_move_while_the_student_trains():
    setup = Setup(truncate=False)
    setup.gradient()
    optimizer = torch.optim.AdamW(setup.student.parameters(), lr=0.1)
    before, student_before, gradient = sha(setup.teacher.module), sha(setup.student), setup.gradient()
    for _ in range(3):
        loss = setup.objective(setup.student, setup.clean, cond=setup.cond)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sha(setup.student) != student_before
    assert sha(setup.teacher.module) == before
    assert all(p.grad is None for p in setup.teacher.module.parameters())
    assert torch.equal(setup.gradient(), gradient)


def test_batchnorm_statistics_move_by_the_students_pass_only():
    student = ConvNet(norm=True).train()
    objective = PaperObjective.wrap(student, schedules.Linear(), prediction="v_prediction", layers="body")
    clean, noise, t, t_prime = *torch.randn(2, 4, 3, 6, 6), torch.rand(4), torch.rand(4)
    expected = freeze(student).train()
    expected(objective.add_noise(clean, noise, t), t)
    objective(student, clean, noise=noise, t=t, t_prime=t_prime)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(student.norm, name), getattr(expected.norm, name))
    assert objective.teacher.module.norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    "wrap", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.spectral_norm], ids=["parametrized", "hooked"]
)
def test_computed_weights_are_copied_with_what_computes_them(wrap):
    student = ConvNet().eval()
    student.body = wrap(student.body)
    x, t = torch.randn(2, 3, 6, 6), torch.rand(2)
    with torch.no_grad():
        student(x, t)
        for parameter in student.body.parameters():
            parameter.add_(torch.rand_like(parameter))  # the weight that was computed of it is now out of date
        (feature,) = CopyTeacher(student, layers=["head"], call=lambda m, x, t, c: m(x, t))(x, t, {})
        assert torch.equal(feature, student(x, t))


# --- what the copy holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_drops_what_its_first_pass_does_not_run_and_nothing_changes(family):
    cut, whole = Setup(family), Setup(family, truncate=False)
    everything = sum(p.numel() for p in cut.student.parameters())
    assert cut.teacher.parameters_held == everything
    first, second = cut.gradient(), cut.gradient()
    assert torch.equal(first, second)
    assert torch.equal(first, whole.gradient())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in cut.teacher.module.modules())
    assert cut.teacher.parameters_held < 0.8 * everything
    assert whole.teacher.parameters_held == everything


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_same_before_and_after_the_cut(family):
    setup = Setup(family)
    passes = [setup.teacher(setup.clean, setup.t, setup.cond) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*passes, strict=True))


def test_a_pass_that_fails_drops_nothing():
    setup = Setup()
    held = setup.teacher.parameters_held
    with pytest.raises(ValueError, match="class_labels should be provided"):
        setup.loss(setup.prediction, cond={})
    assert setup.teacher.parameters_held == held
    assert distance(setup.gradient(), setup.expected_gradient(freeze(setup.student))) < TOLERANCE[torch.float32]


class Optional(nn.Module):
    """A model with parts that only some conditions use, each in its own way."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.called, self.blocks, self.embedding = nn.Linear(3, 3), nn.ModuleList([nn.Linear(3, 3)]), nn.Embedding(4, 3)

    def forward(self, x, timestep, use=None):
        x = self.stem(x)
        if use == "called":
            x = self.called(x)
        if use == "blocks":
            for block in self.blocks:
                x = block(x)
        if use == "embedding":
            x = x + self.embedding.weight[0]
        return self.head(self.middle(x))


@pytest.mark.parametrize("use", ["called", "blocks", "embedding"])
def test_a_later_pass_that_needs_a_dropped_module_names_it_and_what_to_do(use):
    model, x, t = Optional(), torch.randn(2, 3), torch.rand(2)
    teacher = CopyTeacher(model, layers=["middle"], call=lambda m, x, t, c: m(x, t, **c))
    teacher(x, t, {})
    with pytest.raises(ValueError, match=f"'{use}.*`truncate=False`"):
        teacher(x, t, {"use": use})


@pytest.mark.parametrize("use", ["called", "blocks", "embedding"])
def test_what_the_first_pass_used_in_any_way_is_kept(use):
    model, x, t = Optional(), torch.randn(2, 3), torch.rand(2)
    cut, whole = (
        CopyTeacher(model, layers=["middle"], call=lambda m, x, t, c: m(x, t, **c), truncate=cut)
        for cut in (True, False)
    )
    for cond in ({"use": use}, {}, {"use": use}):
        assert torch.equal(cut(x, t, cond)[0], whole(x, t, cond)[0])
    assert cut.parameters_held < whole.parameters_held


def test_without_truncation_a_later_pass_may_use_anything():
    model, x, t = Optional(), torch.randn(2, 3), torch.rand(2)
    teacher = CopyTeacher(model, layers=["middle"], call=lambda m, x, t, c: m(x, t, **c), truncate=False)
    for use in (None, "called", "blocks", "embedding"):
        assert teacher(x, t, {"use": use})[0].isfinite().all()


# --- gradient checkpointing -------------------------------------------------------------------------------------------

INNER = {
    "conditional_unet": ["down_blocks.0.resnets.0", "mid_block.resnets.0", "mid_block"],
    "dit": ["transformer_blocks.0", "transformer_blocks.1.attn1", "transformer_blocks.1"],
}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("family", ["conditional_unet", "dit"])
def test_checkpointing_of_the_student_does_not_change_the_gradient(family, several):
    layers = INNER[family] if several else None
    torch.manual_seed(0)
    student = FAMILIES[family][0]().eval()
    student.enable_gradient_checkpointing()
    plain, saving = Setup(family, layers=layers), Setup(family, student=student, layers=layers)
    for _ in range(2):  # before and after the cut
        assert distance(saving.gradient(), plain.gradient()) < TOLERANCE[torch.float32]
    assert distance(*(student_gradient(s) for s in (saving, plain))) < TOLERANCE[torch.float32]


REENTRANT = [
    ("conditional_unet", ["mid_block"], True),
    ("conditional_unet", INNER["conditional_unet"], True),
    ("conditional_unet", ["down_blocks.1.resnets.0.conv1", "mid_block"], False),
    ("dit", ["transformer_blocks.1"], False),
    ("dit", ["proj_out_2"], True),
]
"""A layer strictly inside what is checkpointed runs under no_grad, and so does one at which the pass is left."""


def reentrant(family):
    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    model.enable_gradient_checkpointing(lambda module, *args: checkpoint(module, *args, use_reentrant=True))
    return model


@pytest.mark.parametrize(("family", "layers", "right"), REENTRANT)
def test_under_reentrant_checkpointing_of_a_given_teacher_the_gradient_is_right_or_refused(family, layers, right):
    setup = Setup(family, teacher=reentrant(family), layers=layers)
    if right:
        assert distance(setup.gradient(), Setup(family, layers=layers).gradient()) < TOLERANCE[torch.float32]
    else:
        with pytest.raises(ValueError, match=r"gives no gradient to the sample.*reentrant checkpointing"):
            setup.gradient()


@pytest.mark.parametrize(("family", "layers"), [case[:2] for case in REENTRANT])
def test_the_copy_of_a_reentrantly_checkpointed_student_gives_the_right_gradient_at_any_layer(family, layers):
    setup, plain = Setup(family, student=reentrant(family), layers=layers), Setup(family, layers=layers)
    for _ in range(2):  # before and after the cut
        assert distance(setup.gradient(), plain.gradient()) < TOLERANCE[torch.float32]


def test_checkpointing_that_recomputes_to_the_end_is_right_too():
    torch.manual_seed(0)
    other = dit().eval()
    other.enable_gradient_checkpointing()
    setup, plain = Setup("dit", teacher=other), Setup("dit")
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        assert distance(setup.gradient(), plain.gradient()) < TOLERANCE[torch.float32]


# --- wrappers, dtypes, other teachers ---------------------------------------------------------------------------------


def test_a_compiled_student_is_unwrapped():
    torch.manual_seed(0)
    plain = unet().eval()
    setup = Setup(student=torch.compile(plain, backend="eager"))
    assert "_orig_mod" not in dict(setup.teacher.module.named_modules())
    assert torch.equal(setup.gradient(), Setup(student=plain).gradient())


def test_a_student_in_ddp_is_unwrapped(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = unet().eval()
        wrapped = nn.parallel.DistributedDataParallel(plain)
        setup = Setup(student=wrapped)
        assert not any(isinstance(m, nn.parallel.DistributedDataParallel) for m in setup.teacher.module.modules())
        assert torch.equal(setup.gradient(), Setup(student=plain).gradient())
        setup.objective(wrapped, setup.clean, cond=setup.cond).backward()
        assert all(p.grad is not None for p in plain.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_work_with_a_float32_teacher(dtype):
    setup = Setup()
    expected = setup.gradient()
    setup.clean, setup.noise, setup.prediction = (x.to(dtype) for x in (setup.clean, setup.noise, setup.prediction))
    gradient = setup.gradient()
    assert gradient.dtype == dtype
    assert distance(gradient, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_teacher_of_another_dtype_takes_float32_latents_and_conditions(dtype):
    setup = Setup("conditional_unet")
    expected = setup.gradient()
    setup.objective.to(dtype)
    gradient = setup.gradient()
    assert gradient.dtype == torch.float32
    assert distance(gradient, expected) < max(TOLERANCE[dtype], TOLERANCE[torch.float32])


def test_features_of_a_half_precision_teacher_are_compared_in_float32():
    student = MLP().half()
    objective = PaperObjective.wrap(student, schedules.Linear(), prediction="v_prediction", layers="last")
    with torch.no_grad():
        objective.teacher.module.last.weight.mul_(20000)
    clean, noise, prediction = torch.randn(3, 4, 5).half()
    loss = objective.loss(prediction, clean=clean, noise=noise, t=torch.rand(4), t_prime=torch.rand(4))
    assert loss.dtype == torch.float32
    assert loss > torch.finfo(torch.float16).max, "the squares would be inf in float16"
    assert loss.isfinite()


def test_under_autocast_the_gradient_reaches_the_student_and_is_close():
    plain = student_gradient(Setup("conditional_unet"))
    with torch.autocast("cpu", torch.bfloat16):
        gradient = student_gradient(Setup("conditional_unet"))
    assert gradient.norm() > 0
    assert distance(gradient, plain) < TOLERANCE[torch.bfloat16]


def test_another_module_may_be_the_teacher():
    torch.manual_seed(9)
    other = unet().train()
    setup = Setup(teacher=other)
    assert setup.teacher.module is other
    assert not other.training
    assert not any(p.requires_grad for p in other.parameters())
    assert distance(setup.gradient(), setup.expected_gradient(freeze(other))) < TOLERANCE[torch.float32]
    assert setup.teacher.parameters_held == sum(p.numel() for p in other.parameters())


def test_a_callable_may_be_the_teacher():
    setup = Setup(teacher=lambda x, t, cond: [x, x.square()])
    prediction = setup.prediction.requires_grad_()
    assert torch.autograd.grad(setup.loss(prediction), prediction)[0].abs().sum() > 0


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_partitioned_model_is_refused():
    student = unet()
    student.mid_block.resnets[0].conv1.weight.ds_id = 3  # DeepSpeed's mark
    with pytest.raises(
        ValueError, match=r"`model` is partitioned \('mid_block.resnets.0.conv1.weight' .*before FSDP or DeepSpeed"
    ):
        CopyTeacher(student, layers=["mid_block"], call=call)


def test_a_student_that_holds_a_graph_cannot_be_copied():
    student = unet()
    student.cache = student.conv_in.weight * 2
    with pytest.raises(ValueError, match=r"`model` cannot be copied.*`teacher=`"):
        CopyTeacher(student, layers=["mid_block"], call=call)


def test_a_student_that_holds_what_cannot_be_copied_is_refused():
    student = unet()
    student.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"`model` cannot be copied.*`teacher=`"):
        CopyTeacher(student, layers=["mid_block"], call=call)


class Trainer:
    """Holds what cannot be copied, and watches a model by a bound method."""

    def __init__(self, model):
        self.lock, self.seen = threading.Lock(), 0
        model.mid_block.register_forward_hook(self.watch)

    def watch(self, module, args, output):
        self.seen += 1


def test_the_students_hooks_are_not_copied_not_even_for_a_moment():
    student = unet().eval()
    trainer = Trainer(student)
    Setup(student=student).gradient()
    assert trainer.seen == 0
    student(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), **LABELS)
    assert trainer.seen == 1


def test_a_teacher_under_no_grad_is_refused():
    student = ConvNet()
    objective = PaperObjective.wrap(
        student,
        schedules.Linear(),
        prediction="v_prediction",
        layers="body",
        call=torch.no_grad()(lambda m, x, t, c: m(x, t)),
    )
    clean, prediction = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6, requires_grad=True)
    with pytest.raises(ValueError, match=r"layer 'body' gives no gradient to the sample.*no_grad"):
        objective.loss(prediction, clean=clean, noise=clean, t=torch.rand(2))


def test_a_layer_that_does_not_see_the_sample_is_refused():
    setup = Setup(layers=["time_embedding"])
    with pytest.raises(
        ValueError, match="layer 'time_embedding' gives no gradient to the sample: it does not depend on it"
    ):
        setup.gradient()


def test_a_missing_layer_is_refused_at_construction():
    for teacher in (
        lambda: ModuleTeacher(unet(), layers=["mid"], call=call),
        lambda: CopyTeacher(unet(), layers=["mid"], call=call),
    ):
        with pytest.raises(ValueError, match="no module 'mid' in UNet2DModel; at its top level: conv_in"):
            teacher()


# --- modules that checkpoint themselves, as ADM's and CompVis' attention does -------------------------------------------


class OwnCheckpoint(torch.autograd.Function):
    """Recomputes in the backward, and asks for the gradient of inputs and parameters at once."""

    @staticmethod
    def forward(ctx, function, count, *values):
        ctx.function, ctx.inputs, ctx.parameters = function, values[:count], values[count:]
        with torch.no_grad():
            return function(*ctx.inputs)

    @staticmethod
    def backward(ctx, gradient):
        inputs = [x.detach().requires_grad_() for x in ctx.inputs]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        return None, None, *torch.autograd.grad(output, (*inputs, *ctx.parameters), gradient, allow_unused=True)


class Attention(torch.nn.Module):
    def __init__(self, own):
        super().__init__()
        self.mix, self.own = torch.nn.Conv2d(6, 6, 1), own

    def forward(self, x):
        if self.own:
            return OwnCheckpoint.apply(lambda x: x + torch.tanh(self.mix(x)), 1, x, *self.parameters())
        return x + torch.tanh(self.mix(x))


class ADM(torch.nn.Module):
    def __init__(self, own):
        super().__init__()
        self.stem, self.head = torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.Conv2d(6, 3, 3, padding=1)
        self.middle_block = torch.nn.Sequential(torch.nn.Conv2d(6, 6, 3, padding=1), Attention(own))

    def forward(self, x, t):
        return self.head(self.middle_block(self.stem(x) + t.view(-1, 1, 1, 1)))


def test_a_module_that_checkpoints_itself_gives_the_gradient_and_keeps_none():
    gradients = []
    for own in (False, True):
        torch.manual_seed(0)
        student = ADM(own)
        objective = PaperObjective.wrap(
            student, schedules.Linear(), prediction="flow_prediction", layers="middle_block"
        )
        generator = torch.Generator().manual_seed(1)
        clean = torch.randn(2, 3, 6, 6, generator=generator)
        for _ in range(2):
            student.zero_grad()
            given = {name: torch.rand(2, generator=torch.Generator().manual_seed(2)) for name in ("t", "t_prime")}
            noise = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))
            objective(student, clean, noise=noise, t=given["t"], t_prime=given["t_prime"].flip(0)).backward()
        gradients.append([p.grad for p in student.parameters()])
        assert all(p.grad is None for p in objective.teacher.module.parameters())
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-7)
    assert any(g.abs().sum() > 0 for g in gradients[0])


class Experts(torch.nn.Module):
    """Routes each sample to one of three linear layers by its time."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.middle, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x, t):
        x = torch.stack([self.experts[int(time * 2.99)](row) for row, time in zip(x, t, strict=True)])
        return self.last(torch.tanh(self.middle(x)))


def test_experts_that_the_first_pass_did_not_take_are_kept():
    teacher = CopyTeacher(Experts(), layers=["middle"], call=lambda m, x, t, c: m(x, t))
    with torch.no_grad():
        teacher(torch.randn(2, 4), torch.tensor([0.1, 0.2]), {})
        teacher(torch.randn(2, 4), torch.tensor([0.5, 0.9]), {})
    assert teacher.parameters_held == 4 * 20  # three experts and the middle, not the last
