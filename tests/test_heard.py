"""A student whose reentrant checkpoint would lose a gradient is refused; what is not about that stays as it was."""

import functools
import threading
import warnings

import pytest
import torch
from paper import PaperObjective
from torch import nn
from torch.utils.checkpoint import checkpoint

from perceptual_diffusion import schedules

CLEAN = torch.linspace(-1, 1, 2 * 16).reshape(2, 1, 4, 4)
REENTRANT = {"use_reentrant": True}
WAYS = {  # how trainers hand a block to a checkpoint
    "the module": lambda block, x: checkpoint(block, x, **REENTRANT),
    "its call": lambda block, x: checkpoint(block.__call__, x, **REENTRANT),
    "a closure": lambda block, x: checkpoint(lambda h: block(h), x, **REENTRANT),
    "a partial": lambda block, x: checkpoint(functools.partial(block), x, **REENTRANT),
}


class Net(nn.Module):
    def __init__(self, way=None):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)
        self.way, self.said = way, None

    def forward(self, x, t):
        if self.said:
            warnings.warn(self.said, UserWarning, stacklevel=2)
        hidden = self.way(self.first, x) if self.way and self.training else self.first(x)
        return self.last(torch.tanh(self.middle(hidden)))


def wrap(model):
    return PaperObjective.wrap(
        model, schedules.Linear(), prediction="flow_prediction", layers="middle", seed=0,
        call=lambda model, x, t, cond: model(x, t),
    )  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_trained_part_that_would_get_no_gradient_is_refused(way):
    model = Net(WAYS[way])
    objective = wrap(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="what is trained inside would get none"):
            objective(model, CLEAN)
    objective(model.eval(), CLEAN).backward()
    assert model.first.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_frozen_part_may_be_checkpointed_so(way):
    def gradients(of):
        model = Net(of)
        model.load_state_dict(weights)
        model.first.requires_grad_(False)
        wrap(model)(model, CLEAN).backward()
        return [p.grad for p in (*model.middle.parameters(), *model.last.parameters())]

    weights = Net().state_dict()
    for one, other in zip(gradients(WAYS[way]), gradients(None), strict=True):
        assert torch.equal(one, other)
        assert one.abs().sum() > 0


def test_a_warning_of_the_models_own_stays_what_it_was():
    model = Net()
    objective, model.said = wrap(model), "something of the user's own"
    with pytest.warns(UserWarning, match="of the user's own"):
        objective(model, CLEAN)
    objective = wrap(model.eval())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="of the user's own"):
            objective(model, CLEAN)


def test_threads_leave_the_filters_of_warnings_as_they_were():
    """One leaves while the other is inside; each would put back what it found."""
    inside, both = threading.Event(), threading.Event()
    model = Net()
    objective = wrap(model)

    def run(x, t):
        if threading.current_thread().name == "one":
            inside.set()
            both.wait(10)
        else:
            both.set()
            first.join(10)
        return Net.forward(model, x, t)

    model.forward = run
    before = list(warnings.filters), warnings.showwarning
    first = threading.Thread(target=lambda: objective(model, CLEAN), name="one")
    second = threading.Thread(target=lambda: inside.wait(10) and objective(model, CLEAN), name="other")
    for thread in (first, second):
        thread.start()
    for thread in (first, second):
        thread.join(20)
    assert (list(warnings.filters), warnings.showwarning) == before
