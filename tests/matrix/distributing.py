"""A model wrapped by the objective and then distributed, as a user does it."""

import torch
from diffusers import DDPMScheduler
from paper import PaperObjective
from torch import distributed, nn

from matrix.nets import BATCH, setting
from matrix.oracle import trained
from perceptual_diffusion import schedules


def wrap(cell, base, student, **options):
    told = setting(cell.kind)
    if cell.kind == "blocks":
        options |= {"prediction": told.kind, "layers": told.layers, "call": told.call}
    schedule = schedules.Linear() if cell.kind == "blocks" else DDPMScheduler()
    teacher = base if cell.teacher == "module" else cell.teacher
    compiled = {"backend": cell.compile} if cell.compile != "off" else False
    return PaperObjective.wrap(student, schedule, teacher=teacher, compile=compiled, **options)


def blocks_of(model):
    return model.blocks if hasattr(model, "blocks") else [*model.down_blocks, model.mid_block, *model.up_blocks]


def shard(model, how, **root):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for block in () if how == "root" else blocks_of(model):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    return model if how == "without root" else fully_shard(model, mesh=mesh, **root)


def distribute(cell, student, rate):
    """The model as the training loop calls it, `step(loss)`, and `full()`, the weights."""

    def step(loss):
        loss.backward()
        if cell.launcher == "FSDP2 without root":  # what lies outside of the blocks is left to the user
            for p in trained(student).values():
                if type(p.grad) is torch.Tensor:
                    distributed.all_reduce(p.grad)
                    p.grad /= distributed.get_world_size()
        optimizer.step()
        optimizer.zero_grad()

    def full():
        return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in trained(student).items()}

    model = student
    if cell.launcher.startswith("ZeRO"):
        return with_deepspeed(cell, student, rate)
    if cell.launcher == "DDP":
        model = nn.parallel.DistributedDataParallel(student)
    elif cell.launcher.startswith("FSDP2"):
        model = shard(student, cell.launcher.removeprefix("FSDP2 "))
    elif cell.launcher == "FSDP1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(student, device_id=torch.device("cpu"), use_orig_params=True)

        def full():
            with FullyShardedDataParallel.summon_full_params(model, writeback=False):
                names = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in trained(model).items()}
                return {name: p.detach().clone() for name, p in names.items()}

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    if cell.compile != "off":
        model = torch.compile(model, backend=cell.compile)
    return model, step, full


def with_deepspeed(cell, student, rate):
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": BATCH // distributed.get_world_size(),
        "zero_optimization": {"stage": int(cell.launcher[-1])},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # by default it is 1
    }
    if cell.precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=rate)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=config)
    if cell.compile != "off":
        engine.compile(backend=cell.compile)

    def step(loss):
        engine.backward(loss)
        engine.step()

    def full():
        weights = trained(student)
        with deepspeed.zero.GatheredParameters(list(weights.values())):
            return {name: p.detach().clone() for name, p in weights.items()}

    return engine, step, full
