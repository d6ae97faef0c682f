"""One of the two processes: `python -m matrix RANK FOLDER` runs the jobs that the folder lists, and writes a line for each."""

import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from torch import distributed

from matrix import apart
from matrix.cells import Cell
from matrix.distributing import distribute, shard, wrap
from matrix.nets import BATCH, STEPS, batch, build
from matrix.oracle import autocast, far, reference, update

REFUSALS = (ValueError, TypeError, RuntimeError)


def half():
    if not distributed.is_initialized():
        return slice(None)
    size, rank = BATCH // distributed.get_world_size(), distributed.get_rank()
    return slice(rank * size, (rank + 1) * size)


def of_cell(cell):
    """Train, and compare how the weights have changed with Algorithm 1."""
    before, expected, rate = reference(cell.kind, cell.lora, "fp32")
    base, student = build(cell)
    objective = wrap(cell, base, student)
    if cell.sharding != "whole":
        shard(objective.teacher.module, cell.sharding)
    part = slice(None) if cell.launcher == "one process" else half()
    model, step, full = distribute(cell, student, rate)
    for number in range(STEPS):
        clean, noise, t, t_prime, cond = batch(cell.kind, number, part)
        with autocast(cell):
            loss = objective(model, clean, noise=noise, t=t, t_prime=t_prime, cond=cond)
        step(loss)
    bound = 1e-5
    if cell.precision == "bf16":  # the halves of a batch are summed and rounded in another order
        bound = 1.5 * far(reference(cell.kind, cell.lora, "bf16")[1], expected)
    apart = far(update(before, full()), expected)
    return {"what": "equal" if apart <= bound else "wrong", "apart": apart, "bound": bound}


def draws(cell):
    """Each process draws times of its own, and a saved state of the generator continues them."""
    base, student = build(cell)
    objective, again = wrap(cell, base, student, seed=3), wrap(cell, base, student, seed=3)
    model, step, _ = distribute(cell, student, 1e-3)
    clean, *_, cond = batch(cell.kind, 0, half())

    def drawn(of):
        step(of(model, clean, cond=cond))
        return torch.stack([of.times["t"], of.times["t_prime"]]).double()

    both = [torch.empty(2, len(clean), dtype=torch.float64) for _ in range(distributed.get_world_size())]
    distributed.all_gather(both, drawn(objective))
    apart = all((of_one[0] != of_other[0]).all() for of_one, of_other in zip(*both, strict=True))
    state = objective.rng_state()
    following = drawn(objective)
    again.set_rng_state(state)
    continued = torch.equal(following, drawn(again)) and torch.equal(objective.rng_state(), again.rng_state())
    return {"what": "equal" if apart and continued else "wrong", "why": f"apart: {apart}, continued: {continued}"}


def unequal(micro_batch):
    """Processes whose batches differ in size, with a teacher whose weights they hold in parts."""
    cell = Cell("one process", sharding="blocks")
    base, student = build(cell)
    whole = wrap(cell, base, student, micro_batch=None)
    objective = wrap(cell, base, student, micro_batch=micro_batch)
    shard(objective.teacher.module, cell.sharding)
    apart = 0.0
    for step, size in enumerate(((2, 3, 1), (2, 2, 4))[distributed.get_rank()]):
        clean, noise, t, t_prime, cond = batch(cell.kind, step, slice(size))
        given = {"noise": noise, "t": t, "t_prime": t_prime, "cond": cond}
        of_each = [
            torch.autograd.grad(of(student, clean, **given), student.conv_in.weight)[0] for of in (objective, whole)
        ]
        apart = max(apart, far(*of_each))
    return {"what": "equal" if apart <= 1e-5 else "wrong", "apart": apart}


def given_apart(name):
    apart.CASES[name]()
    return {"what": "equal"}


KINDS = {"cell": of_cell, "draws": draws, "unequal": unequal, "apart": given_apart}


def outcome(job):
    """What became of a job: equal, refused by the package, wrong, or failed."""
    torch._dynamo.reset()
    kind, *given = job
    try:
        return KINDS[kind](Cell(*given) if kind in ("cell", "draws") else given[0])
    except REFUSALS as error:
        own = f"{os.sep}perceptual_diffusion{os.sep}" in traceback.extract_tb(error.__traceback__)[-1].filename
        return {"what": "refused" if own else "failed", "why": str(error) if own else traceback.format_exc()}
    except Exception:
        return {"what": "failed", "why": traceback.format_exc()}


def worker(rank, folder):
    """Run the cells that a file lists, and write a line for each."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    jobs = json.loads((folder / "jobs.json").read_text())
    with (folder / f"{rank}.jsonl").open("w") as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for job in jobs:
            started = time.perf_counter()
            found = outcome(job)
            out.write(json.dumps(found | {"seconds": round(time.perf_counter() - started, 2)}) + "\n")
            out.flush()
            distributed.barrier()
    os._exit(0)  # DeepSpeed's exit is slow


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
