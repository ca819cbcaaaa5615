import json
from itertools import chain
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_jax.hooks.layout import Factor, Layout, rearrange, reshape, view_of, view_shape


@st.composite
def journeys(draw):
    """A shape, then transposes and reshapes to shapes of the same size."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)))
    steps, now = [], shape
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            steps.append(("transpose", tuple(draw(st.permutations(range(len(now)))))))
            now = tuple(now[axis] for axis in steps[-1][1])
        else:
            left, sizes = prod(now), []
            while left > 1 and len(sizes) < 4:
                sizes.append(draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
                left //= sizes[-1]
            now = (*sizes, left)
            steps.append(("reshape", now))
    return shape, steps


@settings(max_examples=200, deadline=None)
@given(journeys())
def test_views_follow_numpy(journey):
    shape, steps = journey
    view, array = view_of(shape), np.arange(prod(shape)).reshape(shape)
    for kind, argument in steps:
        if kind == "transpose":
            view, array = tuple(view[axis] for axis in argument), array.transpose(argument)
            continue
        view, array = reshape(view, argument), array.reshape(argument)
        if view is None:
            return  # an axis across factors, which is then no weight
        assert view_shape(view) == argument
    held = tuple(chain.from_iterable(view_of(shape)))
    found = rearrange(jnp.arange(prod(shape), dtype=jnp.int32).reshape(shape), held, view)
    np.testing.assert_array_equal(found, array)


def test_an_axis_that_is_cut_across_factors_has_no_view():
    assert reshape(view_of((4, 6)), (3, 8)) is None
    assert reshape(view_of((4, 6)), (2, 12)) is not None


@pytest.mark.parametrize("stack", [False, True])
def test_a_layout_is_a_matrix_and_back(stack):
    factors = [Factor((axis,), size) for axis, size in enumerate((2, 3, 4, 5))]
    layout = Layout(
        shape=(2, 3, 4, 5),
        dtype="float32",
        stack=(factors[1],) if stack else (),
        inputs=(factors[3], factors[0]),
        outputs=(factors[2],) if stack else (factors[2], factors[1]),
    )
    parameter = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    by_hand = np.einsum("asbc->scab" if stack else "asbc->cabs", parameter)
    matrix = layout.matrix(parameter)
    np.testing.assert_array_equal(matrix, by_hand.reshape((3, 10, 4) if stack else (10, 12)))
    assert layout.matrix_shape == matrix.shape
    np.testing.assert_array_equal(layout.parameter(matrix), parameter)
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
