"""Teachers whose weights are sharded or offloaded: the right gradient, and nothing stays gathered."""

import copy

import pytest
import torch
from models import STREAMS, TOLERANCE, distance, unet
from torch import nn

from perceptual_diffusion import taps
from perceptual_diffusion.teachers import CopyTeacher, ModuleTeacher

LABELS, T = {"class_labels": torch.tensor([1, 2])}, torch.tensor([200, 700])


def call(model, x, t, cond):
    return model(x, timestep=t, **cond).sample


def gradient(teacher, seed=0):
    generator = torch.Generator().manual_seed(seed)
    true, x = torch.randn(2, 2, 3, 8, 8, generator=generator)
    with torch.no_grad():
        expected = teacher(true, T, LABELS)
    x.requires_grad_()
    features = teacher(x, T, LABELS)
    sum((f - g).square().mean() for f, g in zip(features, expected, strict=True)).backward()
    return x.grad


def is_right(teacher, model, layers):
    plain = ModuleTeacher(copy.deepcopy(model), layers=layers, call=call)
    return all(distance(gradient(teacher, s), gradient(plain, s)) < TOLERANCE[torch.float32] for s in range(3))


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def shard(model, mesh, whole=False, **root):
    from torch.distributed.fsdp import fully_shard

    for block in [] if whole else [*model.down_blocks, model.mid_block, *model.up_blocks]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh, **root)


def gathered(model):
    """Names of the modules whose weights are whole: not DTensors but what FSDP2 gathers."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters()
        if isinstance(module, FSDPModule) and not isinstance(parameter, DTensor)
    ]


@STREAMS
@pytest.mark.parametrize("layers", [["mid_block"], ["mid_block.resnets.0"], ["down_blocks.0", "mid_block"]])
@pytest.mark.parametrize(
    "options", [{}, {"reshard_after_forward": True}, {"whole": True, "reshard_after_forward": True}]
)
def test_a_teacher_sharded_by_fsdp2_gives_the_gradient_and_is_sharded_again(mesh, layers, options):
    model = unet().eval()
    teacher = ModuleTeacher(shard(copy.deepcopy(model), mesh, **options), layers=layers, call=call)
    assert not taps.may_stop(teacher.module, layers)
    assert is_right(teacher, model, layers)
    assert gathered(teacher.module) == []


@STREAMS
def test_left_early_a_sharded_teacher_would_stay_gathered(mesh):
    model = shard(unet().eval(), mesh, whole=True)
    teacher = ModuleTeacher(model, layers=["mid_block"], call=call, stop=True)
    gradient(teacher)
    assert gathered(model) != []


@STREAMS
@pytest.mark.parametrize("when", ["before its first pass", "after it"])
def test_a_copy_may_be_sharded(mesh, when):
    model = unet().eval()
    teacher = CopyTeacher(model, layers=["mid_block"], call=call)
    if when == "after it":
        gradient(teacher)
    held = teacher.parameters_held
    shard(teacher.module, mesh)
    assert is_right(teacher, model, ["mid_block"])
    assert gathered(teacher.module) == []
    assert teacher.parameters_held == held


@pytest.mark.filterwarnings("ignore")  # of FSDP on one process
def test_a_teacher_in_fsdp1_gives_the_gradient(mesh):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = unet().eval()
    wrapped = FullyShardedDataParallel(copy.deepcopy(model), device_id=torch.device("cpu"))
    teacher = ModuleTeacher(wrapped, layers=["mid_block"], call=call)
    assert not taps.may_stop(wrapped, ["mid_block"])
    assert is_right(teacher, model, ["mid_block"])


# --- offloaded --------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A model with a weight of its own beside its layers."""

    def __init__(self):
        super().__init__()
        self.scale, self.net = nn.Parameter(torch.ones(())), unet()

    def forward(self, x, timestep, **cond):
        return self.net(x * self.scale, timestep, **cond)


def offloaded(model):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")


def test_a_teacher_offloaded_by_accelerate_gives_the_gradient_and_is_offloaded_again():
    model = Scaled().eval()
    teacher = ModuleTeacher(offloaded(model), layers=["net.mid_block"], call=call)
    assert is_right(teacher, model, ["net.mid_block"])
    assert {p.device.type for p in teacher.module.parameters()} == {"meta"}


def test_left_early_an_offloaded_teacher_would_keep_a_weight():
    teacher = ModuleTeacher(offloaded(Scaled().eval()), layers=["net.mid_block"], call=call, stop=True)
    gradient(teacher)
    assert [name for name, p in teacher.module.named_parameters() if p.device.type != "meta"] == ["scale"]


def test_a_teacher_dispatched_by_accelerate_gives_the_gradient():
    accelerate = pytest.importorskip("accelerate")
    model = unet().eval()
    spread = accelerate.dispatch_model(
        copy.deepcopy(model), device_map={name: "cpu" for name, _ in model.named_children()}, force_hooks=True
    )
    teacher = ModuleTeacher(spread, layers=["mid_block"], call=call)
    assert not taps.may_stop(spread, ["mid_block"])
    assert is_right(teacher, model, ["mid_block"])


@STREAMS
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize(
    "kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_a_teacher_offloaded_in_groups_by_diffusers_gives_the_gradient(kind, disk, tmp_path):
    model, cpu = unet().eval(), torch.device("cpu")
    grouped = copy.deepcopy(model)
    where = {"offload_to_disk_path": str(tmp_path)} if disk else {}  # takes the weights away before the backward
    grouped.enable_group_offload(onload_device=cpu, offload_device=cpu, **kind, **where)
    teacher = ModuleTeacher(grouped, layers=["mid_block"], call=call)
    assert not taps.may_stop(grouped, ["mid_block"])
    assert is_right(teacher, model, ["mid_block"])


def test_a_model_that_zero_3_partitions_is_not_left_early():
    model = unet().eval()
    assert taps.may_stop(model, ["mid_block"])
    for parameter in model.parameters():
        parameter.ds_id = 1  # DeepSpeed's mark
    assert not taps.may_stop(model, ["mid_block"])


def test_hooks_that_are_added_later_count_from_the_next_pass():
    model = unet().eval()
    teacher, ran = ModuleTeacher(model, layers=["mid_block"], call=call), []
    model.conv_out.register_forward_hook(lambda *args: ran.append(1))
    gradient(teacher)
    assert not ran
    model.conv_in._hf_hook = None  # accelerate's mark
    gradient(teacher)
    assert ran
