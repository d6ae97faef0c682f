"""Thousands of steps: memory, hooks and teacher stay as they are, no graph lives on, and the host hardly waits."""

import copy
import ctypes
import gc
import sys
import weakref

import pytest
import torch
from steady import LAYER, batch, build, digest, hooks, loss_of
from torch import is_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from perceptual_diffusion import teachers
from perceptual_diffusion.features import Captured, Part

psutil = pytest.importorskip("psutil")
pytest.importorskip("peft")

SIZE, TOKENS, WIDTH = 8, 64, 32
ACTIVATION = SIZE * TOKENS * WIDTH * 4
"""Bytes of what one block gives."""
WARM = 20
"""Steps after which the allocator has what it needs."""
CELLS = [
    ("copy", False, "whole"), ("copy", True, "drop-in"), ("lora", False, "drop-in"), ("lora", True, "whole"),
    ("module", False, "whole"), ("module", True, "drop-in"),
]  # fmt: skip
FEW = [("copy", True, "whole"), ("lora", False, "drop-in"), ("module", True, "drop-in")]


def resident():
    gc.collect()
    if sys.platform == "linux":  # what earlier tests freed goes back to the system, so that a leak does not hide in it
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    return psutil.Process().memory_info().rss


class Kept:
    """A tensor that a graph holds."""

    def __init__(self, tensor):
        self.tensor = tensor


def run(teacher, checkpointing, form, steps, leak=None):
    """Train, and give by how many bytes the process has grown since it was warm; every step is looked at on the way."""
    model, objective = build(teacher, width=WIDTH, checkpointing=checkpointing)
    clean, noise, t = batch(SIZE, TOKENS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    held, ends = weakref.WeakSet(), []

    def keep(tensor):
        kept = Kept(tensor.detach())
        held.add(kept)
        return kept

    def step():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
            if form == "whole":
                loss = objective(model, clean)
                ends[:] = [weakref.ref(loss)]
            else:
                prediction = model(objective.add_noise(clean, noise, t), t)
                loss = loss_of(objective, prediction, (clean, noise, t))
                ends[:] = [weakref.ref(loss), weakref.ref(prediction)]
        assert held, "nothing is watched"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if leak is not None:
            leak.append(torch.ones(SIZE, TOKENS, WIDTH))

    for _ in range(WARM):
        step()
    before = hooks(model), hooks(objective.teacher.module), digest(objective.teacher.module)
    memory = resident()
    gc.disable()  # nothing may wait for it
    try:
        for _ in range(steps):
            step()
            assert not any(end() is not None for end in ends), "an output lives on"
            assert not held, "a graph lives on"
    finally:
        gc.enable()
    assert (hooks(model), hooks(objective.teacher.module), digest(objective.teacher.module)) == before
    assert not [p for p in objective.teacher.module.parameters() if p.grad is not None]
    return resident() - memory


def bound(steps):
    return steps * ACTIVATION // 4


@pytest.mark.parametrize(("teacher", "checkpointing", "form"), FEW)
def test_memory_hooks_and_teacher_stay_flat_and_no_graph_lives_on(teacher, checkpointing, form):
    assert run(teacher, checkpointing, form, 150) < bound(150)


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "checkpointing", "form"), CELLS)
def test_memory_hooks_and_teacher_stay_flat_over_2000_steps(teacher, checkpointing, form):
    assert run(teacher, checkpointing, form, 2000) < bound(2000)


def test_a_leak_of_one_activation_per_step_would_be_noticed():
    assert run("copy", False, "drop-in", 60, leak=[]) > 2 * bound(60)


def test_an_output_or_a_graph_that_is_kept_would_be_noticed():
    kept = []
    model, objective = build()
    data = batch()

    class Keeping(type(objective)):
        def loss(self, prediction, **options):
            kept.append(prediction)
            return super().loss(prediction, **options)

    objective.__class__ = Keeping
    prediction = model(data[0], data[2])
    end = weakref.ref(prediction)
    loss_of(objective, prediction, data).backward()
    del prediction
    assert end() is not None
    kept.clear()
    assert end() is None


# --- what the host waits for ------------------------------------------------------------------------------------------

READS = {
    "item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "__contains__",
    "nonzero", "argwhere", "masked_select", "unique", "equal", "allclose", "is_nonzero", "tensor", "as_tensor", "asarray",
}  # fmt: skip
"""Functions of torch that wait for a device, or copy a list to it, which waits too."""
KERNELS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "bincount",
}
"""Operations that do so inside of others, as an index of bools does; they are counted unless the function was."""


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for a GPU: on a CPU these are the same calls.

    Tensors that are made without a `device` or on "cpu" by name, and what is computed of them alone, lie on the host and do not count.
    """

    def __init__(self):
        super().__init__()
        self.names, self.inside, self.hosts = [], False, WeakIdKeyDictionary()
        self.kernels = _Kernels(self)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        given = [x for x in tree_leaves([args, kwargs]) if is_tensor(x)]
        on_host = all(x in self.hosts for x in given) if given else kwargs.get("device") in (None, "cpu")
        copies = name == "to" and any(isinstance(x, str | torch.device) for x in (*args, *kwargs.values()))
        counts = (name in READS or copies) and not self.inside and not on_host
        if counts:
            self.names.append(name)
        outer, self.inside = self.inside, self.inside or counts or on_host
        try:
            result = func(*args, **kwargs)
        finally:
            self.inside = outer
        if on_host and isinstance(result, torch.Tensor):
            self.hosts[result] = True
        return result

    def __enter__(self):
        self.kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.kernels.__exit__(*args)


class _Kernels(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        of_bools = name.startswith("index") and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if is_tensor(x))
        if (name in KERNELS or of_bools) and not self.waits.inside:
            self.waits.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(), lambda x: x.tolist(), lambda x: bool(x[0] > 0), lambda x: float(x[0]), lambda x: x.cpu(),
        lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: torch.tensor([1.0], device=x.device), lambda x: x.numpy(),
        lambda x: torch.equal(x, x), lambda x: x.to("cpu"), lambda x: int(x[0]), lambda x: x.masked_select(x > 0),
    ],
)  # fmt: skip
def test_every_way_to_wait_is_counted_once(wait):
    x = torch.ones(3)
    with Waits() as waits:
        wait(x + 1)
        float(torch.tensor([1.0])[0])  # on the host
    assert len(waits.names) == 1


def waits(objective, model, data, *, whole, steps=3, **options):
    """The waits of a step, once the first ones are over."""
    clean = data[0]
    for _ in range(steps):
        prediction = None if whole else model(clean, data[2])
        with Waits() as found:
            if whole:
                objective(model, clean, **options)
            else:
                loss_of(objective, prediction, data, **options)
    return found.names


OPTIONS = [
    {}, {"teacher": "lora"}, {"teacher": "module"}, {"formulation": "split"}, {"distance": "normalised"},
    {"distance": "cosine"}, {"t_prime": "near"}, {"t_prime": "shifted"}, {"t_prime": "contributing"}, {"t_prime": "clean"},
    {"t": "logit_normal"}, {"weight": "min_snr", "mse_weight": 1.0}, {"micro_batch": 1}, {"micro_batch": None},
    {"teacher_dtype": torch.bfloat16}, {"t_range": (0.01, 0.99)}, {"layers": ["blocks.0", LAYER]},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_whole_step_never_waits_for_the_device_and_a_drop_in_reads_its_times_once(options):
    model, objective = build(**options)
    data = batch()
    assert waits(objective, model, data, whole=True) == []
    assert waits(objective, model, data, whole=False) == ["tolist"]
    assert waits(objective, model, data, whole=False, steps=1, t_prime=data[2]) == ["tolist"]


def test_masks_are_read_until_they_are_known_to_move_nothing():
    model, objective = build()
    data, generator = batch(), torch.Generator().manual_seed(2)
    found = [
        waits(objective, model, data, whole=True, steps=1, cond={"mask": torch.rand(3, 5, generator=generator) > 0.3})
        for _ in range(6)
    ]
    assert found[0]
    assert found[-1] == []


@pytest.mark.parametrize("micro_batch", ["auto", 1])
def test_a_mask_that_stays_is_read_once_and_again_when_it_was_written_into(micro_batch, monkeypatch):
    monkeypatch.setattr(teachers, "ON_HOST", ())  # the CPU stands for a device
    model, objective = build(micro_batch=micro_batch)
    mask = torch.ones(3, 5, dtype=torch.bool)
    parts = 1 if micro_batch == "auto" else 3
    assert waits(objective, model, batch(), whole=True, cond={"mask": mask}) == []
    for there in (False, True):
        mask[0, 1] = there
        assert waits(objective, model, batch(), whole=True, steps=2, cond={"mask": mask}) == []
        assert teachers._contents(mask) == mask.double().numpy().tobytes()
        assert teachers._contents(mask[:1]) == mask[:1].double().numpy().tobytes()
    assert waits(objective, model, batch(), whole=True, steps=1, cond={"mask": mask.clone()}).count("cpu") == parts


def test_what_was_read_of_a_mask_goes_with_it(monkeypatch):
    monkeypatch.setattr(teachers, "ON_HOST", ())
    gc.collect()
    before, mask = len(teachers._read), torch.ones(200, 5, dtype=torch.bool)
    for row in mask:
        teachers._contents(row)
    assert len(teachers._read) == before + 1
    assert len(teachers._read[mask]) == teachers.REMEMBERED
    del mask, row
    assert len(teachers._read) == before


@pytest.mark.parametrize("gaps", [(0, 2), (1, 2, 4)])
def test_places_that_are_no_neighbours_are_copied_to_a_device_once(gaps):
    part = Part(stream=0, batch=0, channel=2, tokens=1, picked=(gaps,))
    feature = torch.randn(3, 5, 4, requires_grad=True)
    layer = Captured((feature,))
    with torch.inference_mode():
        assert torch.equal(part.take(layer, 3), feature[:, list(gaps)])
    with Waits() as found:
        for _ in range(3):
            part.take(layer, 3).sum().backward()
    assert found.names == []
    assert part == Part(stream=0, batch=0, channel=2, tokens=1, picked=(gaps,))
    assert hash(part) == hash(copy.deepcopy(part))


def test_an_index_that_was_made_for_fake_tensors_is_not_kept():
    part = Part(stream=0, batch=0, channel=2, tokens=1, picked=((0, 2),))
    with FakeTensorMode():
        assert part.take(Captured((torch.randn(3, 5, 4),)), 3).shape == (3, 2, 4)
    assert type(part.take(Captured((torch.randn(3, 5, 4),)), 3)) is torch.Tensor
