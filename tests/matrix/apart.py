"""Two processes with one teacher that are given different things: none waits for the other for ever."""

import copy

import accelerate
import torch
from paper import PaperObjective
from torch import distributed

from matrix.distributing import shard
from matrix.nets import Blocks, call_blocks
from matrix.oracle import far
from perceptual_diffusion import Monitor, schedules


def build(change, micro_batch, **options):
    """A student, its objective with a teacher that `change` has sharded or offloaded, and one with the teacher whole."""
    torch.manual_seed(0)
    student, teacher = Blocks(), Blocks()
    options = {"prediction": "flow_prediction", "layers": ["blocks.1"], "call": call_blocks} | options

    def wrap(teacher, size):
        return PaperObjective.wrap(student, schedules.Linear(), teacher=teacher, micro_batch=size, **options)

    whole = wrap(copy.deepcopy(teacher), None)
    change(teacher)
    return student, wrap(teacher, micro_batch), whole


def in_blocks(teacher):
    shard(teacher, "blocks")


def batch(size=2, tokens=6, length=3):
    generator = torch.Generator().manual_seed(7)
    clean, noise = torch.randn(2, size, tokens, 8, generator=generator)
    t, t_prime = 0.1 + 0.8 * torch.rand(2, size, generator=generator)
    text = torch.randn(size, length, 8, generator=generator)
    return {"clean": clean, "noise": noise, "t": t, "t_prime": t_prime, "cond": {"encoder_hidden_states": text}}


def step(student, objective, given):
    student.zero_grad()
    objective(student, **given).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters()])


def check_right(student, objective, whole, given):
    assert far(step(student, objective, given), step(student, whole, given)) < 1e-5


def refused(run):
    try:
        run()
    except ValueError as error:
        return str(error)
    raise AssertionError("not refused")


class Counted:
    """How often the host waits for the other processes inside."""

    def __enter__(self):
        self.number, self.real = 0, distributed.all_reduce
        distributed.all_reduce = self
        return self

    def __call__(self, *args):
        self.number += 1
        return self.real(*args)

    def __exit__(self, *args):
        distributed.all_reduce = self.real


def offloaded():
    """Of an offloaded teacher nothing is gathered: one process may run it alone, and batches may differ."""
    made = build(lambda teacher: accelerate.cpu_offload(teacher, execution_device="cpu"), 1)
    with Counted() as waits:
        check_right(*made, batch(size=2 + distributed.get_rank()))
        if not distributed.get_rank():
            Monitor(made[1]).features(batch(tokens=7)["clean"], cond=batch()["cond"])
    assert not waits.number


def beside():
    """Of the teacher a module is sharded that does not lead to the layer, and one process has a new layout."""
    for micro_batch in ("auto", 1):
        made = build(lambda teacher: shard(teacher.text, "root", reshard_after_forward=True), micro_batch)
        for tokens in (6, 6 + distributed.get_rank(), 6):
            check_right(*made, batch(tokens=tokens))


def layouts():
    """With a number for `micro_batch`, conditions may differ in length, but not in where the samples may lie in them."""
    made = build(in_blocks, 1)
    check_right(*made, batch())
    for other in (5, 4):  # 4 may be two for each sample
        given = batch(length=other if distributed.get_rank() else 3)
        if other == 4:
            assert "conditions of other shapes" in refused(lambda given=given: step(*made[:2], given))
        else:
            check_right(*made, given)
    check_right(*build(in_blocks, 2), batch(length=4 if distributed.get_rank() else 3))  # nothing is split


def tables():
    """A table that all samples share is as long as the batch, and only one process could see that by its features."""

    def call(model, x, t, cond):
        return model(x, t, cond["encoder_hidden_states"][None])

    made, given = build(in_blocks, 1, call=call), batch()
    given["cond"]["encoder_hidden_states"] = torch.ones(2, 8)
    if distributed.get_rank():
        given["cond"]["encoder_hidden_states"][1] = 5
    assert "cannot be split" in refused(lambda: step(*made[:2], given))


def fails():
    """What one process finds wrong in its features is raised on all, and the next step is right."""
    made = build(in_blocks, None)
    check_right(*made, batch())
    given = batch(tokens=6 if distributed.get_rank() else 5)
    if not distributed.get_rank():
        given["cond"]["encoder_hidden_states"].fill_(torch.inf)
    said = refused(lambda: step(*made[:2], given))
    assert ("another process" if distributed.get_rank() else "gives NaN or infinity") in said, said
    check_right(*made, batch())


def waits():
    """Where the layouts are known, a step waits once for the other processes."""
    for formulation, micro_batch in (("joint", "auto"), ("joint", None), ("split", 1)):
        made = build(in_blocks, micro_batch, formulation=formulation)
        check_right(*made, batch())
        with Counted() as of_step:
            step(*made[:2], batch())
        with Counted() as without_grad, torch.no_grad():
            made[1](made[0], **batch())
        assert (of_step.number, without_grad.number) == (1, 1), (formulation, micro_batch)
        check_right(*made, batch(tokens=6 + distributed.get_rank()))


CASES = {case.__name__: case for case in (offloaded, beside, layouts, tables, fails, waits)}
