"""Distances between features: value, zero, gradient, shapes, one value per sample, names."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from perceptual_diffusion import distances

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Relative error against numpy in float64, by the dtype computed in."""

names = pytest.mark.parametrize("name", distances.NAMED)
shapes = st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple)


def pair(*shape, dtype=torch.float64, scale=1.0):
    return scale * torch.randn(shape, dtype=dtype), scale * torch.randn(shape, dtype=dtype)


def as_vectors(feature):
    """A feature in numpy as one row of channels per position, shape (positions, C)."""
    if feature.ndim == 2:  # tokens (N, C) of one sample
        return feature
    return np.moveaxis(feature, 0, -1).reshape(-1, feature.shape[0])  # (C, ...) of one sample


def reference(name, predicted, true):
    """The distance of one sample, in numpy and float64, by its textbook formula."""
    p, t = predicted.double().numpy(), true.double().numpy()
    error = np.abs(p - t)
    if name == "mse":
        return (error**2).mean()
    if name == "mae":
        return error.mean()
    if name == "huber":
        return np.where(error <= 1, error**2 / 2, error - 0.5).mean()
    if name == "cosine":
        return 1 - (p * t).sum() / np.sqrt((p**2).sum() * (t**2).sum())
    p, t = as_vectors(p), as_vectors(t)
    cosines = (p * t).sum(1) / np.sqrt((p**2).sum(1) * (t**2).sum(1))
    return (2 - 2 * cosines).mean()


@names
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 7), (3, 5, 4), (3, 4, 2, 5), (2, 3, 2, 2, 5), (3, 3, 3, 3), (1, 1, 2, 2)])
def test_a_distance_is_its_formula(name, shape, dtype):
    predicted, true = pair(*shape, dtype=dtype, scale=2.0)  # both branches of huber
    value = distances.NAMED[name](predicted, true)
    expected = torch.tensor([reference(name, p, t) for p, t in zip(predicted, true, strict=True)])
    torch.testing.assert_close(value.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert value.dtype == dtype


@names
@pytest.mark.parametrize("dtype", TOLERANCE)
@given(shape=shapes, seed=st.integers(0, 9), scale=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e4]))
@example(shape=(2, 0, 4, 4), seed=0, scale=1.0)
@example(shape=(0, 3, 4), seed=0, scale=1.0)
@example(shape=(4,), seed=0, scale=1.0)
def test_equal_features_are_at_distance_exactly_0(name, dtype, shape, seed, scale):
    feature = scale * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    value = distances.NAMED[name](feature, feature.clone())
    assert value.shape == shape[:1]
    assert value.dtype == dtype
    assert (value == 0).all()


@names
@given(shape=shapes)
@example(shape=(3,))
def test_a_distance_gives_one_finite_value_per_sample(name, shape):
    value = distances.NAMED[name](*pair(*shape))
    assert value.shape == shape[:1]
    assert value.isfinite().all()
    assert (value >= 0).all()


@names
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 3, 2, 2), (2, 2, 1, 2, 2)])
def test_gradcheck(name, shape):
    predicted, true = pair(*shape, scale=2.0)
    assert torch.autograd.gradcheck(distances.NAMED[name], (predicted.requires_grad_(), true.requires_grad_()))


@names
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4), (2, 3, 2, 2)])
def test_the_gradient_at_equal_features_is_finite(name, shape):
    """A student that matches its teacher, or a dead feature, must not poison the step with NaN."""
    for feature in (torch.randn(shape), torch.zeros(shape)):
        predicted = feature.clone().requires_grad_()
        distances.NAMED[name](predicted, feature).sum().backward()
        assert predicted.grad.isfinite().all()


@names
@pytest.mark.parametrize("shape", [(4, 6), (4, 4, 4), (4, 4, 4, 4), (4, 2, 3, 2, 2)])
def test_permuting_the_batch_permutes_the_values(name, shape):
    predicted, true = pair(*shape)
    order = torch.tensor([2, 0, 3, 1])
    value = distances.NAMED[name](predicted, true)
    torch.testing.assert_close(distances.NAMED[name](predicted[order], true[order]), value[order], rtol=1e-12, atol=0)
    assert len(value.unique()) == 4


@names
@pytest.mark.parametrize("shape", [(3, 6), (3, 3, 3), (3, 3, 3, 3), (3, 2, 3, 2, 2)])
def test_a_value_does_not_depend_on_the_other_samples(name, shape):
    predicted, true = pair(*shape)
    value = distances.NAMED[name](predicted, true)
    predicted[1:] *= 100
    torch.testing.assert_close(distances.NAMED[name](predicted, true)[0], value[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(distances.NAMED[name](predicted[:1], true[:1])[0], value[0], rtol=1e-12, atol=0)


@names
def test_a_distance_is_symmetric(name):
    predicted, true = pair(3, 4, 2, 2)
    distance = distances.NAMED[name]
    torch.testing.assert_close(distance(predicted, true), distance(true, predicted), rtol=1e-12, atol=0)


# Each distance


@pytest.mark.parametrize("shape", [(5, 12), (5, 4, 3), (5, 4, 3, 3)])
def test_cosine_is_one_minus_the_cosine_similarity(shape):
    predicted, true = pair(*shape)
    similarity = torch.nn.functional.cosine_similarity(predicted.flatten(1), true.flatten(1))
    torch.testing.assert_close(distances.cosine(predicted, true), 1 - similarity, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("factor", "expected"), [(3.0, 0.0), (-0.5, 2.0)])
def test_cosine_sees_the_direction_only(factor, expected):
    feature = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    value = distances.cosine(feature, factor * feature)
    torch.testing.assert_close(value, torch.full((3,), expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_cosine_resolves_a_small_angle_in_float32():
    """1 − cos in float32 is lost below 1e-7; the squared distance of the unit vectors is not."""
    angle = 1e-5
    true, predicted = torch.tensor([[1.0, 0.0]]), torch.tensor([[np.cos(angle), np.sin(angle)]], dtype=torch.float32)
    assert float(distances.cosine(predicted, true)) == pytest.approx(angle**2 / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "channel"),
    [((2, 5), 1), ((2, 5, 3), 2), ((2, 3, 5, 4), 1), ((2, 3, 5, 4, 2), 1)],
    ids=["vectors", "tokens", "maps", "volumes"],
)
def test_normalised_is_blind_to_the_length_of_channel_vectors_and_to_no_other(shape, channel):
    predicted, true = pair(*shape)
    value = distances.normalised(predicted, true)
    for dim in range(1, len(shape)):
        stretch = torch.rand([1 if d == dim else n for d, n in enumerate(shape)], dtype=torch.float64) + 0.5
        per_position = distances.normalised(predicted * stretch, true)
        assert torch.allclose(per_position, value, rtol=1e-10) == (dim == channel)


def test_normalised_is_lpips_without_weights():
    """Zhang et al. 2018, eq. 1: unit vectors over channels, squared difference summed over them, mean over positions."""
    predicted, true = pair(2, 3, 4, 5)
    unit = torch.nn.functional.normalize
    expected = (unit(predicted, dim=1) - unit(true, dim=1)).square().sum(1).mean((1, 2))
    torch.testing.assert_close(distances.normalised(predicted, true), expected, rtol=1e-12, atol=0)


def test_normalised_is_not_ruled_by_a_channel_of_huge_value_that_both_share():
    predicted, true = pair(2, 8, 4, 4)
    huge = torch.zeros(1, 8, 1, 1, dtype=torch.float64)
    huge[:, 0] = 1000.0
    assert (distances.normalised(huge + predicted, huge + true) < 1e-4).all()
    assert (distances.normalised(1000 * predicted, 1000 * true) > 0.1).all()


@pytest.mark.parametrize("delta", [0.5, 1.0, 2.0])
def test_huber_turns_linear_at_delta(delta):
    errors = torch.tensor([0.0, delta / 2, delta, 3 * delta], dtype=torch.float64)
    value = distances.huber(errors[:, None], torch.zeros(4, 1, dtype=torch.float64), delta=delta)
    expected = torch.tensor([0, delta**2 / 8, delta**2 / 2, delta * (3 * delta - delta / 2)], dtype=torch.float64)
    torch.testing.assert_close(value, expected)


def test_mse_and_mae_do_not_depend_on_the_size_of_the_feature():
    for size in (2, 50):
        ones, threes = torch.ones(2, 3, size, size), torch.full((2, 3, size, size), 3.0)
        assert torch.equal(distances.mse(ones, threes), torch.full((2,), 4.0))
        assert torch.equal(distances.mae(ones, threes), torch.full((2,), 2.0))


# Names


def test_the_documented_names_exist():
    assert {"mse", "mae", "huber", "cosine"} <= set(distances.NAMED)


@names
def test_get_gives_the_distance_of_a_name(name):
    assert distances.get(name) is getattr(distances, name)


def test_get_passes_a_callable_through():
    def mine(predicted, true):
        return (predicted - true).flatten(1).sum(1)

    assert distances.get(mine) is mine


KNOWN = "expected one of 'mse', 'mae', 'huber', 'cosine', 'normalised', or a callable."


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown distance") as error:
        distances.get("lpips")
    assert str(error.value) == f"unknown distance 'lpips', {KNOWN}"


@pytest.mark.parametrize("value", [3, None, ["mse"], type])
def test_what_is_neither_a_name_nor_callable_is_refused(value):
    with pytest.raises(TypeError) as error:
        distances.get(value)
    assert str(error.value) == f"`distance` is {value!r}, {KNOWN}"
