"""Copies hold what a pass up to the tapped layers uses, never allocate the rest, and say so when that is asked for."""

import contextlib
import copy
import functools
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from models import ConvNet, conditional_unet, dit, unet
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from zoo import NO_CPU_BACKWARD, ROWS, build

from perceptual_diffusion import adapters, copies, schedules
from perceptual_diffusion.adapters import _trace
from perceptual_diffusion.adapters.examples import example
from perceptual_diffusion.teachers import CopyTeacher

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Transformer2DModelOutput.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
]

TEXT = {"encoder_hidden_states": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))}
LABELS = {"class_labels": torch.tensor([1, 2])}
X, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([100, 700])


def call(model, x, t, cond):
    return model(x, timestep=t, **cond)


def plain(model, x, t, cond):
    return model(x, t, **cond)


def own(module):
    return [x for x in (*module._parameters.values(), *module._buffers.values()) if x is not None]


def memory(tensor):
    return tensor.untyped_storage()._cdata


def held(model):
    """Bytes of the memory behind a model's parameters and buffers."""
    storages = {memory(x): x.untyped_storage() for module in model.modules() for x in own(module)}
    return sum(storage.nbytes() for storage in storages.values())


class Allocated(TorchDispatchMode):
    """Counts the memory that operations allocate, in all, and on request how much of it was alive at most."""

    supports_higher_order_operators = True

    def __init__(self, *, watch_peak=False):
        super().__init__()
        self.watch_peak, self.total, self.peak = watch_peak, 0, 0
        self.known = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            key = memory(tensor) if isinstance(tensor, torch.Tensor) else None
            if key is None or key in before or (key in self.known and not self.known[key][0].expired()):
                continue
            self.known[key] = StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
            self.total += self.known[key][1]
            if self.watch_peak:
                alive = sum(size for storage, size in self.known.values() if not storage.expired())
                self.peak = max(self.peak, alive)
        return result


# --- every denoiser of diffusers --------------------------------------------------------------------------------------


def parts(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in (value.values() if isinstance(value, dict) else value) for t in parts(item)]


def mapped(function, value):
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(function, item) for key, item in value.items()}
    return type(value)(mapped(function, item) for item in value)


class Case:
    """A row of the zoo and what its copies are made with."""

    def __init__(self, name):
        self.name, (self.model, self.tiny) = name, build(name)
        self.backward = name not in NO_CPU_BACKWARD
        self.options = {
            "layers": [self.tiny.middle], "call": self.call, "prepare": self.prepare,
            "select": lambda output, args, kwargs: self.tiny.feature(output),
        }  # fmt: skip
        self.example = self.tiny.clean, self.tiny.t, self.tiny.cond

    def call(self, model, x, t, cond):
        time = self.tiny.time(t)
        given = {key: value for key, value in cond.items() if key != "concat"}
        given = {key: value(next(iter(time.values()))) if callable(value) else value for key, value in given.items()}
        return model(**self.tiny.given(x, t), **time, **given)

    def prepare(self, model):
        for module in model.modules():
            if type(module).__name__ in self.tiny.awake:
                module.train()

    def copy(self, **more):
        return CopyTeacher(self.model, **self.options, **more)

    @functools.cached_property
    def cut(self):
        return self.copy(example=self.example)

    @functools.cached_property
    def expected(self):
        whole = self.copy(truncate=False)
        assert held(whole.module) == held(self.model)
        return self.answer(whole)

    def answer(self, teacher):
        """Features and gradient of a pass."""
        x = mapped(lambda v: v.clone().requires_grad_(self.backward), self.tiny.clean)
        features = [part for feature in teacher(x, self.tiny.t, self.tiny.cond) for part in parts(feature)]
        if not self.backward:
            return features, []
        loss = sum(feature.float().square().sum() for feature in features)
        gradients = torch.autograd.grad(loss, parts(x), allow_unused=True)
        return [f.detach() for f in features], [g for g in gradients if g is not None]

    def state(self):
        """All that a pass on the model itself could leave in it."""
        return [
            (name, set(vars(m)), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), vars(m).get("forward"),
             [(id(x), x._version, x.requires_grad, x.grad) for x in own(m)])
            for name, m in self.model.named_modules()
        ]  # fmt: skip


@pytest.fixture(scope="module", params=ROWS)
def case(request):
    eager = request.param in NO_CPU_BACKWARD  # compiling FlexAttention takes half a minute
    with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
        yield Case(request.param)


def used_bytes(case):
    """Bytes of the modules that run up to the middle or give a tensor to a kernel, seen on a copy made beforehand."""
    model = copy.deepcopy(case.model).eval().requires_grad_(False)
    case.prepare(model)
    ran, given = set(), set()

    class Kernels(TorchDispatchMode):
        supports_higher_order_operators = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            given.update(map(memory, tensors))
            return func(*args, **(kwargs or {}))

    class Reached(BaseException):
        pass

    def stop(module, args, output):
        raise Reached

    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: ran.add(module))
    model.get_submodule(case.tiny.middle).register_forward_hook(stop)
    places = {m: {memory(x) for x in own(m)} for m in model.modules()}
    with torch.no_grad(), contextlib.suppress(Reached), Kernels():
        case.call(model, *case.example)
    needed = {m for m in model.modules() if m in ran or not given.isdisjoint(places[m])}
    for name, module in model.named_modules():
        a_list = isinstance(module, nn.ModuleList | nn.ModuleDict)
        inside = set(module.modules())
        if a_list and not f"{case.tiny.middle}.".startswith(f"{name}.") and needed & inside:
            needed |= inside  # experts
    return sum({memory(x): x.nbytes for m in needed for x in own(m)}.values())


def test_a_copy_of_any_denoiser_holds_what_a_pass_uses_and_gives_the_same_bit_for_bit(case):
    before, stream = case.state(), torch.get_rng_state()
    teacher = case.cut
    assert case.state() == before
    assert torch.equal(torch.get_rng_state(), stream)
    assert held(teacher.module) == used_bytes(case) < held(case.model)
    assert not any(x.is_meta for module in teacher.module.modules() for x in own(module))
    assert not copies.same_storage(case.model, teacher.module)
    for actual, expected in zip(case.answer(teacher), case.expected, strict=True):
        assert len(actual) == len(expected)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_what_is_left_out_of_a_copy_of_any_denoiser_is_never_allocated(case):
    def outside(*args):  # what the pass itself allocates does not count
        with _disable_current_modes():
            return case.call(*args)

    with Allocated() as tables:  # that are neither parameters nor buffers
        copy.deepcopy(case.model, {id(x): x for module in case.model.modules() for x in own(module)})
    with Allocated() as made:
        teacher = CopyTeacher(case.model, **case.options | {"call": outside}, example=case.example)
    buffers = sum({id(x): x.nbytes for x in case.model.buffers()}.values())
    allowed = held(teacher.module) + buffers + 2 * tables.total  # the pass has copies of its own, which go with it
    assert made.total <= allowed
    assert made.total == allowed or tables.total


def test_a_copy_of_any_denoiser_in_bfloat16_runs_and_is_close(case):
    half = case.copy(example=case.example, dtype=torch.bfloat16)
    with torch.no_grad():
        given = [part for feature in half(*case.example) for part in parts(feature)]
    actual, expected = (torch.cat([x.double().flatten() for x in side]) for side in (given, case.expected[0]))
    rounds_its_time = case.name.startswith("Chroma")  # to the dtype of its tokens, before it is multiplied by 1000
    assert (actual - expected).norm() < (0.3 if rounds_its_time else 0.1) * expected.norm()
    share = held(half.module) / held(case.cut.module)
    assert share < (1 if getattr(case.model, "_keep_in_fp32_modules", None) else 0.6)


# --- what is left out -------------------------------------------------------------------------------------------------


def test_the_peak_while_copying_is_what_the_copy_holds_and_the_buffers():
    model = unet()
    with Allocated(watch_peak=True) as made:
        teacher = CopyTeacher(model, layers=["mid_block"], call=skipping, example=(X[:, :3], T, LABELS))
    assert 0 < held(teacher.module) <= made.peak < 0.5 * held(model)


def skipping(*args):
    """A call whose own allocations do not count."""
    with _disable_current_modes():
        return call(*args)


USES = {
    "linear": lambda x, m: F.linear(x, m),
    "bias": lambda x, m: F.linear(x, x, m),
    "added": lambda x, m: x + m,
    "first": lambda x, m: m + x,
    "scaled": lambda x, m: 2 * m,
    "norm": lambda x, m: F.layer_norm(x, (3,), m),
    "statistics": lambda x, m: F.batch_norm(x, m, m),
    "row": lambda x, m: m[0],
    "cast": lambda x, m: x.to(m.dtype),
    "listed": lambda x, m: torch.cat([x, m]),
    "own function": lambda x, m: Own.apply(x, m),
    "size": lambda x, m: x[: m.numel()],
    "asked for": lambda x, m: hasattr(m, "quant_state"),
}


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight


@pytest.mark.parametrize("use", USES)
def test_whatever_uses_a_tensor_that_is_not_held_is_told_its_name_and_what_to_do(use):
    with pytest.raises(ValueError, match=r"no longer holds 'up.weight'.*`example`.*first pass.*`truncate=False`"):
        USES[use](torch.randn(2, 3), copies.Missing("up.weight"))


def cut(model, layer, x, t, cond, **options):
    """Two copies: cut before they are made, and by their first pass."""
    early = CopyTeacher(model, layers=[layer], call=call, example=(x, t, cond), **options)
    late = CopyTeacher(model, layers=[layer], call=call, **options)
    late(x, t, cond)
    return early, late


def test_the_tree_and_its_attributes_stay():
    model = unet()
    for teacher in cut(model, "mid_block", X[:, :3], T, LABELS):
        copied = teacher.module
        assert [name for name, _ in copied.named_modules()] == [name for name, _ in model.named_modules()]
        assert all(type(a) is type(b) for a, b in zip(copied.modules(), model.modules(), strict=True))
        assert len(copied.up_blocks) == len(list(copied.up_blocks)) == 2
        assert copied.up_blocks[0].resnets[0].in_channels == model.up_blocks[0].resnets[0].in_channels
        assert hasattr(copied.conv_out, "weight")
        assert repr(copied) == repr(model)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in copied.modules())


def test_both_ways_to_cut_hold_the_same():
    for model, layer, x, cond in (
        (unet(), "mid_block", X[:, :3], LABELS),
        (conditional_unet(), "down_blocks.1", X, TEXT),
        (dit(), "transformer_blocks.0.attn1", X, LABELS),
    ):
        early, late = cut(model, layer, x, T, cond)
        assert set(early.module.state_dict()) == set(late.module.state_dict()) < set(model.state_dict())


class Tied(nn.Module):
    """Its last layer has the weight of its first."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.register_buffer("table", torch.randn(3))
        self.after = nn.Module()
        self.after.register_buffer("table", self.table)
        self.after.register_buffer("other", torch.randn(3))

    def forward(self, x, timestep):
        return self.last(self.middle(self.first(x) + self.table)) + self.after.table + self.after.other


def test_tied_tensors_are_copied_once_and_stay_tied():
    model, x = Tied(), torch.randn(2, 3)
    for teacher in (*cut(model, "middle", x, T, {}), CopyTeacher(model, layers=["middle"], call=call, truncate=False)):
        copied = teacher.module
        assert copied.last.weight is copied.first.weight
        assert copied.after.table is copied.table
    assert teacher.parameters_held == 3 * 3 * 2 + 3 * 3
    for teacher in cut(model, "middle", x, T, {}):
        assert isinstance(teacher.module.last.bias, copies.Missing)
        assert isinstance(teacher.module.after.other, copies.Missing)


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
def test_with_an_example_later_passes_may_use_what_it_uses_and_nothing_else(use):
    model, x, t = Optional(), torch.randn(2, 3), torch.rand(2)
    whole = CopyTeacher(model, layers=["middle"], call=call, truncate=False)
    teacher = CopyTeacher(model, layers=["middle"], call=call, example=(x, t, {"use": use}))
    for cond in ({}, {"use": use}):
        assert torch.equal(teacher(x, t, cond)[0], whole(x, t, cond)[0])
    for other in {"called", "blocks", "embedding"} - {use}:
        with pytest.raises(ValueError, match=f"no longer holds '{other}.*`truncate=False`"):
            teacher(x, t, {"use": other})


def test_without_truncation_an_example_changes_nothing():
    model, x = Optional(), torch.randn(2, 3)
    teacher = CopyTeacher(model, layers=["middle"], call=call, example=(x, T, {}), truncate=False)
    assert held(teacher.module) == held(model)


def test_an_example_that_cannot_be_run_is_refused_with_the_models_own_reason():
    with pytest.raises(ValueError, match=r"cannot be run on `example`: .*class_labels should be provided"):
        CopyTeacher(unet(), layers=["mid_block"], call=call, example=(X[:, :3], T, {}))


class Experts(nn.Module):
    """Routes each sample to one of three linear layers by its time."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, timestep):
        x = torch.stack([self.experts[int(time * 2.99)](row) for row, time in zip(x, timestep, strict=True)])
        return self.last(torch.tanh(self.middle(x)))


def test_experts_that_the_example_did_not_take_are_kept():
    example = torch.randn(2, 4), torch.tensor([0.1, 0.2]), {}
    teacher = CopyTeacher(Experts(), layers=["middle"], call=call, example=example)
    assert teacher.parameters_held == 4 * 20  # three experts and the middle, not the last
    assert teacher(torch.randn(2, 4), torch.tensor([0.5, 0.9]), {})[0].isfinite().all()


# --- the student ------------------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Draws noise, counts its passes in a buffer, and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.middle = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x, timestep):
        self.passes += 1
        self.last = x = self.norm(self.stem(x)) + torch.randn_like(x)
        return self.middle(x)


def test_the_pass_on_the_example_leaves_no_trace_in_the_student():
    model, x = Restless().train(), torch.randn(4, 3)
    model.norm.eval()
    model.middle.requires_grad_(False)
    model(x, None).sum().backward()
    calls = []
    model.stem.register_forward_hook(lambda *args: calls.append("hook"))
    model.middle.register_forward_pre_hook(lambda *args: calls.append("pre-hook"))
    values = {name: value.clone() for name, value in model.state_dict().items()}
    modes, grads, stream = [m.training for m in model.modules()], model.stem.weight.grad.clone(), torch.get_rng_state()
    last, model.last = model.last, None
    frozen = CopyTeacher(model, layers=["middle"], call=call, example=(x, None, {}))
    assert not calls
    assert model.last is None
    assert last is not None
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False] * 2
    assert torch.equal(model.stem.weight.grad, grads)
    assert torch.equal(torch.get_rng_state(), stream)
    assert frozen.module.passes == values["passes"]
    assert not any(p.requires_grad for p in frozen.module.parameters())


def test_a_compiled_student_and_its_compiled_parts_are_copied_as_they_were_written():
    plain, x = Optional(), torch.randn(2, 3)
    parts_compiled = copy.deepcopy(plain)
    parts_compiled.stem = torch.compile(parts_compiled.stem, backend="eager")
    parts_compiled.head.compile(backend="eager")
    expected = CopyTeacher(plain, layers=["middle"], call=call, truncate=False)(x, T, {})[0]
    for model in (torch.compile(plain, backend="eager"), parts_compiled):
        for teacher in cut(model, "middle", x, T, {}):
            assert not any("_orig_mod" in name for name, _ in teacher.module.named_modules())
            assert teacher.parameters_held == 24
            assert torch.equal(teacher(x, T, {})[0], expected)


# --- dtype ------------------------------------------------------------------------------------------------------------


def test_parameters_are_cast_one_by_one_while_they_are_copied():
    model = conditional_unet()
    with Allocated(watch_peak=True) as made:
        teacher = CopyTeacher(model, layers=["mid_block"], call=call, truncate=False, dtype=torch.bfloat16)
    assert {p.dtype for p in teacher.module.parameters()} == {torch.bfloat16}
    assert made.total == made.peak == held(teacher.module) == held(model) / 2
    for copied, original in zip(teacher.module.parameters(), model.parameters(), strict=True):
        assert torch.equal(copied, original.to(torch.bfloat16))


def test_what_a_class_keeps_in_float32_stays_so_and_so_do_tables_and_statistics():
    model, _ = build("WanTransformer3DModel")
    for name, parameter in copies.frozen_copy(model, dtype=torch.float16).named_parameters():
        pinned = not set(name.split(".")).isdisjoint(model._keep_in_fp32_modules)
        assert parameter.dtype == (torch.float32 if pinned else torch.float16), name
    assert {b.dtype for b in copies.frozen_copy(model, dtype=torch.float16).buffers()} == {torch.float32}
    norm = copies.frozen_copy(ConvNet(norm=True), dtype=torch.float16).norm
    assert {x.dtype for x in own(norm)} == {torch.float32, torch.int64}


def test_a_norm_with_statistics_in_a_half_precision_copy_runs_with_grad():
    model, x = ConvNet(norm=True), torch.randn(2, 3, 6, 6, requires_grad=True)
    teacher = CopyTeacher(model, layers=["body"], call=plain, dtype=torch.bfloat16)
    whole = CopyTeacher(model, layers=["body"], call=plain)
    features = [t(x, torch.tensor([0.1, 0.9]), {})[0] for t in (teacher, whole)]
    gradients = [torch.autograd.grad(f.float().square().sum(), x)[0] for f in features]
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()


def test_a_dtype_that_is_not_floating_is_refused():
    with pytest.raises(ValueError, match=r"`dtype` is torch.int8, expected a floating dtype"):
        CopyTeacher(ConvNet(), layers=["body"], call=plain, dtype=torch.int8)


# --- checkpointing and offloading of the student ----------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, flag):
        super().__init__()
        self.mix = nn.Linear(3, 3)
        setattr(self, flag, True)


@pytest.mark.parametrize("flag", copies.CHECKPOINTING)
def test_the_copys_gradient_checkpointing_is_off_and_the_students_stays_on(flag):
    model = nn.Sequential(Block(flag), Block("other"))
    copied = copies.frozen_copy(model)
    assert getattr(copied[0], flag) is False
    assert copied[1].other is True
    assert getattr(model[0], flag) is True


class Ran:
    """The modules that run inside, as often as they do."""

    def __init__(self):
        self.modules = []

    def __call__(self, module, args):
        self.modules.append(module)

    @contextlib.contextmanager
    def watching(self, model):
        handles = [module.register_forward_pre_hook(self) for module in model.modules()]
        yield
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("make", [conditional_unet, dit])
def test_the_teacher_of_a_checkpointed_student_recomputes_nothing(make):
    student = make().eval()
    student.enable_gradient_checkpointing()
    layer, cond = ("mid_block", TEXT) if make is conditional_unet else ("transformer_blocks.1", LABELS)
    for teacher in cut(student, layer, X, T, cond):
        x, ran = X.clone().requires_grad_(), Ran()
        with ran.watching(teacher.module):
            (feature,) = teacher(x, T, cond)
            passes = len(ran.modules)
            feature.sum().backward()
        assert len(ran.modules) == passes > 0
        assert x.grad.abs().sum() > 0
    assert student.is_gradient_checkpointing


def test_blocks_inside_torchs_checkpoint_wrapper_are_copied_without_it():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, x = Optional(), torch.randn(2, 3)
    expected = CopyTeacher(model, layers=["middle"], call=call)(x, T, {})[0]
    model.stem, model.middle = checkpoint_wrapper(model.stem), checkpoint_wrapper(model.middle)
    for teacher in cut(model, "middle", x, T, {}):
        assert type(teacher.module.middle) is type(teacher.module.stem) is nn.Linear
        assert torch.equal(teacher(x, T, {})[0], expected)
        assert teacher.parameters_held == 24


def test_accelerates_hooks_stay_with_the_student():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    class Held(AlignDevicesHook):
        calls = 0

        def __init__(self):
            super().__init__(execution_device="cpu")
            self.weights_map = threading.Lock()  # cannot be copied

        def pre_forward(self, module, *args, **kwargs):
            type(self).calls += 1
            return super().pre_forward(module, *args, **kwargs)

    plain_model, x = Optional(), torch.randn(2, 3)
    expected = CopyTeacher(plain_model, layers=["middle"], call=call)(x, T, {})[0]
    for module in (plain_model, plain_model.stem):
        add_hook_to_module(module, Held())
    for teacher in cut(plain_model, "middle", x, T, {}):
        assert torch.equal(teacher(x, T, {})[0], expected)
        assert not {"forward", "_old_forward", "_hf_hook"} & set(vars(teacher.module.stem))
    assert Held.calls == 0
    plain_model(x, T)
    assert Held.calls == 2


def test_a_model_whose_weights_are_offloaded_is_refused():
    from accelerate import cpu_offload

    model = Optional()
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"no values for 'stem.weight': it is on the meta device.*before it is offloaded"
    ):
        CopyTeacher(model, layers=["middle"], call=call)


def test_a_model_on_several_devices_is_refused():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = Optional()
    add_hook_to_module(model.stem, AlignDevicesHook(execution_device="cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.head.weight = nn.Parameter(torch.empty(3, 3, device="cuda"))
    with pytest.raises(ValueError, match=r"dispatched over cpu and cuda:0, expected one device"):
        copies.frozen_copy(model)


@pytest.mark.parametrize("kind", ["group_offloading", "layerwise_casting"])
def test_a_model_with_hooks_of_diffusers_is_refused(kind):
    from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

    model = dit()
    if kind == "layerwise_casting":
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    else:
        apply_group_offloading(model, torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match=rf"diffusers' hook '.*{kind}' at .*cannot be copied.*before it is added"):
        CopyTeacher(model, layers=["transformer_blocks.1"], call=call)


# --- what is done to a copy -------------------------------------------------------------------------------------------


@pytest.fixture(params=["by an example", "by its first pass"])
def teacher(request):
    return cut(conditional_unet(), "mid_block", X, T, TEXT)[request.param == "by its first pass"]


def test_a_cut_copy_moves_is_pickled_and_copied(teacher):
    expected = teacher(X, T, TEXT)[0]
    for other in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert torch.equal(other(X, T, TEXT)[0], expected)
        with pytest.raises(ValueError, match="no longer holds 'up_blocks"):
            other.module(X, T, **TEXT)
        assert other.to(torch.float64)(X.double(), T, TEXT)[0].dtype == torch.float64
        other.to("meta")
        assert all(p.is_meta for p in other.module.parameters())
    assert torch.equal(teacher(X, T, TEXT)[0], expected)


def test_the_state_dict_of_a_cut_copy_holds_what_it_holds_and_is_loaded_into_another(teacher):
    state = teacher.module.state_dict()
    assert set(state) == {name for name, _ in teacher.module.named_parameters()}
    assert sum(x.numel() for x in state.values()) == teacher.parameters_held
    expected = teacher(X, T, TEXT)[0]
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.zero_()
    assert not any(other.module.load_state_dict(state))
    assert torch.equal(other(X, T, TEXT)[0], expected)


def test_a_cut_copy_is_sharded_and_gives_the_same(teacher, tmp_path):
    from torch.distributed.fsdp import fully_shard

    x = X.clone().requires_grad_()
    expected = teacher(x, T, TEXT)[0]
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in (*teacher.module.down_blocks, teacher.module.mid_block):
            fully_shard(block, mesh=mesh)
        fully_shard(teacher.module, mesh=mesh)
        for _ in range(2):
            feature = teacher(x, T, TEXT)[0]
            assert torch.equal(feature, expected)
            assert torch.equal(torch.autograd.grad(feature.square().sum(), x)[0], gradient)
    finally:
        torch.distributed.destroy_process_group()


def test_a_cut_copy_is_compiled(teacher):
    expected = teacher(X, T, TEXT)[0]
    compiled = CopyTeacher(
        conditional_unet(), layers=["mid_block"], call=call, example=(X, T, TEXT), compile={"backend": "eager"}
    )
    compiled.module.load_state_dict(teacher.module.state_dict())
    for _ in range(3):
        assert torch.allclose(compiled(X, T, TEXT)[0], expected, atol=1e-6)


# --- real configurations, without their memory ------------------------------------------------------------------------

SD15 = {"sample_size": 64, "cross_attention_dim": 768}
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
DISCRETE = schedules.Discrete.scaled_linear()


@pytest.mark.parametrize(("config", "most", "parameters"), [(SD15, 0.41, 859_520_964), (SDXL, 0.49, 2_567_463_684)])
def test_stable_diffusion_holds_two_fifths_and_sdxl_half(config, most, parameters):
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = UNet2DConditionModel(**config)
        found = adapters.find(model)
        clean, cond = example(model)
        options = {"layers": found.layers, "call": found.call}
        teacher = CopyTeacher(model, **options, example=(clean, torch.tensor([500]), cond))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert 0.8 * most < teacher.parameters_held / parameters <= most


# --- what is known before there is any data ---------------------------------------------------------------------------


def after(model, *layers, schedule=DISCRETE):
    found = adapters.find(model)
    return _trace.after_layers(model, found.call, schedule, layers or found.layers, least=0)


def test_without_an_example_stable_diffusion_is_cut_before_it_is_copied():
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = UNet2DConditionModel(**SD15)
    behind = after(model)
    assert {model.up_blocks[0], model.up_blocks[3].resnets[2].conv1, model.conv_out} <= behind
    assert not {model, model.conv_in, model.mid_block.resnets[1], model.time_embedding.linear_1} & behind
    with FakeTensorMode(allow_non_fake_inputs=True):
        teacher = CopyTeacher(model, layers=["mid_block"], call=call, without=behind)
    assert teacher.parameters_held / 859_520_964 <= 0.41


@pytest.mark.parametrize("name", ["UNet2DConditionModel.sdxl", "UNetMotionModel", "FluxTransformer2DModel.dev"])
def test_what_runs_behind_the_layers_is_left_out_and_the_pass_is_the_same(name):
    case = Case(name)
    before = case.state()
    behind = after(case.model, schedule=DISCRETE if case.tiny.t.dtype == torch.long else schedules.Linear())
    assert case.state() == before
    teacher = case.copy(without=behind)
    assert held(teacher.module) < 1.1 * held(case.cut.module)
    for actual, expected in zip(case.answer(teacher), case.expected, strict=True):
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert set(teacher.module.state_dict()) == set(case.cut.module.state_dict())


def gated():
    """A UNet of GLIGEN: each transformer block fuses boxes where they are given."""
    torch.manual_seed(0)
    model = conditional_unet(attention_type="gated")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    boxes = {
        "boxes": torch.rand(2, 3, 4), "positive_embeddings": torch.randn(2, 3, 8), "masks": torch.ones(2, 3),
    }  # fmt: skip
    return model, {"cross_attention_kwargs": {"gligen": boxes}}


SWITCHES = {
    "boxes": gated,
    "residuals of a ControlNet": lambda: (
        conditional_unet(),
        {"down_block_additional_residuals": tuple(
            torch.randn(2, *shape) for shape in ((8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4))
        ), "mid_block_additional_residual": torch.randn(2, 16, 4, 4)},
    ),
    "classes": lambda: (conditional_unet(num_class_embeds=5), LABELS),
    "a mask": lambda: (conditional_unet(), {"encoder_attention_mask": torch.tensor([[1, 1, 0, 0, 0]] * 2)}),
}  # fmt: skip
"""Conditions that are not made up, and switch parts of the model on."""


@pytest.mark.parametrize("switch", SWITCHES)
def test_what_is_left_out_beforehand_is_right_for_conditions_that_were_not_made_up(switch):
    model, more = SWITCHES[switch]()
    cond = TEXT | more
    options = {"layers": ["mid_block"], "call": call}
    early = CopyTeacher(model, **options, without=after(model))
    assert early.parameters_held < 0.95 * sum(p.numel() for p in model.parameters())
    whole = CopyTeacher(model, **options, truncate=False)
    for _ in range(2):
        assert torch.equal(early(X, T, cond)[0], whole(X, T, cond)[0])


def test_where_no_inputs_can_be_made_nothing_is_known():
    assert _trace.after_layers(ConvNet(), plain, schedules.Linear(), ["body"], least=0) is None


def test_a_model_that_looks_at_values_tells_nothing():
    model = dit()

    def asks(model, x, t, cond):
        return call(model, x if x.sum() > 0 else -x, t, cond)

    assert after(model) is not None
    assert _trace.after_layers(model, asks, DISCRETE, ["transformer_blocks.1"], least=0) is None


def test_a_small_model_is_not_worth_a_pass():
    model = conditional_unet()
    assert _trace.after_layers(model, call, DISCRETE, ["mid_block"]) is None


# --- functions in the place of a forward ------------------------------------------------------------------------------


def test_a_forward_that_was_compiled_is_the_copys_own_again():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    model.forward = torch.compile(model.forward, backend="eager")
    model[1].forward = torch.compile(model[1].forward, backend="eager")
    copied = copies.frozen_copy(model)
    x = torch.randn(2, 3)
    before = copied(x)
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[1].weight.mul_(2)
    torch.testing.assert_close(copied(x), before)
    assert "forward" in vars(model)


def test_another_function_in_the_place_of_a_forward_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    original = model[1].forward
    model[1].forward = lambda x: 2 * original(x)
    with pytest.raises(ValueError, match="`forward` of '1' is a function that was put there"):
        copies.frozen_copy(model)
