"""The rows of the zoo are true by themselves: each runs by hand, and its feature is the noisy sample's."""

import pytest
import torch
from zoo import NO_CPU_BACKWARD, ROWS, build


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in (value.values() if isinstance(value, dict) else value) for t in tensors(item)]


def like(clean, function):
    if isinstance(clean, torch.Tensor):
        return function(clean)
    if isinstance(clean, dict):
        return {key: like(value, function) for key, value in clean.items()}
    return [like(value, function) for value in clean]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_runs_by_hand_and_its_feature_depends_on_the_sample(name):
    model, tiny = build(name)
    model.requires_grad_(False)
    if name in NO_CPU_BACKWARD:
        pytest.skip("FlexAttention has no backward on a CPU")
    x = like(tiny.clean, lambda c: c.clone().requires_grad_())
    caught = []
    hook = dict(model.named_modules())[tiny.middle].register_forward_hook(lambda m, a, out: caught.append(out))
    cond = {key: value for key, value in tiny.cond.items() if key != "concat"}
    output = model(**tiny.given(x, tiny.t), **tiny.time(tiny.t), **cond)
    hook.remove()
    predicted = tiny.predicted(output)
    assert [t.shape for t in tensors(predicted)] == [t.shape for t in tensors(tiny.clean)]
    feature = tensors(tiny.feature(caught[0]))
    assert all(f.is_floating_point() and f.isfinite().all() for f in feature)
    assert all(len(f) == len(tiny.t) for f in feature)
    for f in feature:
        grads = torch.autograd.grad(f.square().sum(), tensors(x), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in grads)
