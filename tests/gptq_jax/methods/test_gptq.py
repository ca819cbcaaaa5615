"""The solver against a float64 GPTQ written from the paper, and against what theory says."""

import itertools

import gptq_numpy as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptq_jax.methods.gptq import GPTQOptions, gptq_solve, solve_layer
from gptq_jax.methods.rtn import round_to_nearest
from gptq_jax.spec import QuantSpec
from gptq_jax.tensor import validate


def make_layer(d_in, d_out, tokens=None, seed=0, decay=0.25):
    """A weight, and the Hessian of correlated inputs whose channels differ in strength."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d_in, d_in)) * (np.arange(1, d_in + 1) ** -decay)[:, None]
    inputs = rng.normal(size=(tokens or 4 * d_in, d_in)) @ mixing
    return rng.normal(size=(d_in, d_out)).astype(np.float32), (inputs.T @ inputs).astype(np.float32)


def relative_loss(weight, tensor, hessian):
    return oracle.proxy_loss(weight, tensor.dequantize(), hessian)


WAYS = [
    *itertools.product(("natural", "activation", "group"), (True, False), ("minmax",)),
    ("activation", True, "mse"),
    ("activation", True, "ldl"),
    ("natural", False, "ldl"),
]


# Every way with every number of bits; both kinds of grid with each way, and with each number of bits.
CASES = [(bits, (i + j) % 2 == 0, *way) for i, way in enumerate(WAYS) for j, bits in enumerate((2, 3, 4, 8))]


@pytest.mark.parametrize(("bits", "symmetric", "order", "static_groups", "grid"), CASES)
def test_loss_equals_the_papers_in_float64(bits, symmetric, order, static_groups, grid):
    check_against_paper(make_layer(150, 40), bits, 64, symmetric, order, static_groups, grid)


@pytest.mark.parametrize("order", ["natural", "activation"])
@pytest.mark.parametrize("group_size", [-1, 32, 150, 1000])
def test_group_sizes(group_size, order):
    check_against_paper(make_layer(150, 40), 3, group_size, False, order, False, "minmax")


@pytest.mark.parametrize("group_size", [128, 1024, 600])
@pytest.mark.parametrize("static_groups", [True, False])
def test_several_chunks_and_blocks(group_size, static_groups):
    """More rows than a chunk, groups larger and smaller than a block, none of them dividing the rows."""
    check_against_paper(make_layer(1300, 8, decay=0.1), 4, group_size, False, "natural", static_groups, "minmax")


def check_against_paper(layer, bits, group_size, symmetric, order, static_groups, grid):
    weight, hessian = layer
    how = {"order": order, "static_groups": static_groups, "grid": grid}
    expected, safe = oracle.gptq(weight, hessian, bits=bits, group_size=group_size, symmetric=symmetric, **how)
    tensor = gptq_solve(weight, hessian, QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric), **how)
    validate(tensor)
    assert safe.sum() >= 2, "the oracle compares too few columns"
    np.testing.assert_allclose(
        oracle.column_losses(weight, tensor.dequantize(), hessian)[safe],
        oracle.column_losses(weight, expected, hessian)[safe],
        rtol=1e-4,
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_worse_on_weights_and_better_on_outputs_than_rounding(bits):
    weight, hessian = make_layer(256, 64, decay=0.5)
    spec = QuantSpec(bits=bits, group_size=64)
    rounded = round_to_nearest(jnp.asarray(weight), spec)
    solved = gptq_solve(weight, hessian, spec, grid="minmax")
    weight_error = [float(np.sum((weight - np.asarray(t.dequantize())) ** 2)) for t in (solved, rounded)]
    assert weight_error[0] > weight_error[1]
    assert relative_loss(weight, solved, hessian) < 0.7 * relative_loss(weight, rounded, hessian)


def test_orders_and_grids_rank_as_published():
    """Strong channels: activation order beats natural, and clipping by the LDL pivots beats plain clipping."""
    weight, hessian = make_layer(512, 64, decay=0.9, seed=3)
    spec = QuantSpec(bits=3, group_size=64, symmetric=False)
    loss = {
        name: relative_loss(weight, gptq_solve(weight, hessian, spec, **options), hessian)
        for name, options in {
            "natural": {"order": "natural", "grid": "minmax"},
            "group": {"order": "group", "grid": "minmax"},
            "activation": {"order": "activation", "grid": "minmax"},
            "mse": {"order": "activation", "grid": "mse"},
            "ldl": {"order": "activation", "grid": "ldl"},
        }.items()
    }
    assert loss["activation"] < loss["group"] < loss["natural"]
    assert loss["ldl"] < loss["mse"] < loss["activation"]


def test_fewer_tokens_than_inputs():
    weight, hessian = make_layer(256, 32, tokens=40)
    spec = QuantSpec(bits=4, group_size=64)
    solved, rounded = gptq_solve(weight, hessian, spec), round_to_nearest(jnp.asarray(weight), spec)
    assert relative_loss(weight, solved, hessian) < 0.5 * relative_loss(weight, rounded, hessian)


def test_inputs_that_never_fire_are_rounded_and_disturb_nobody():
    weight, hessian = make_layer(128, 16)
    dead = [3, 64, 127]
    hessian[dead], hessian[:, dead] = 0, 0
    spec = QuantSpec(bits=4, group_size=-1)
    solved = gptq_solve(weight, hessian, spec, grid="minmax").dequantize()
    rounded = round_to_nearest(jnp.asarray(weight), spec).dequantize()
    np.testing.assert_array_equal(solved[jnp.array(dead)], rounded[jnp.array(dead)])


def test_identity_hessian_is_rounding():
    weight, _ = make_layer(200, 8)
    spec = QuantSpec(bits=3, group_size=64, symmetric=False)
    solved = gptq_solve(weight, np.eye(200, dtype=np.float32), spec, grid="minmax")
    np.testing.assert_array_equal(solved.codes, round_to_nearest(jnp.asarray(weight), spec).codes)


def test_scale_of_the_hessian_does_not_matter():
    weight, hessian = make_layer(128, 16)
    codes = [gptq_solve(weight, hessian * factor, QuantSpec()).codes for factor in (1.0, 2.0**-20, 2.0**10)]
    np.testing.assert_array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(codes[0], codes[2])


def test_damping_is_raised_until_the_hessian_factors():
    weight, hessian = make_layer(64, 8)
    # An eigenvalue of -5% of the mean diagonal: 0.01 is not enough, 0.1 is.
    values, vectors = np.linalg.eigh(hessian.astype(np.float64))
    values[0] = -0.05 * np.trace(hessian) / 64
    indefinite = jnp.asarray((vectors * values) @ vectors.T, jnp.float32)
    solution = solve_layer(jnp.asarray(weight), indefinite, QuantSpec(group_size=32), GPTQOptions())
    assert float(solution.notes["damping"]) == pytest.approx(0.1)
    assert not bool(solution.notes["fell_back"])


def test_a_hessian_that_never_factors_falls_back_to_rounding_and_says_so():
    weight, hessian = make_layer(64, 8)
    hessian[5, 6] = hessian[6, 5] = 1e6 * hessian[5, 5]
    spec = QuantSpec(group_size=32, symmetric=False)  # a symmetric grid's ties may fall either way
    with pytest.warns(UserWarning, match="rounded to nearest"):
        tensor = gptq_solve(weight, hessian, spec, grid="minmax", order="natural")
    rounded = round_to_nearest(jnp.asarray(weight), spec)
    np.testing.assert_array_equal(tensor.codes, rounded.codes)


def test_float16_scales_are_those_the_codes_were_chosen_for():
    weight, hessian = make_layer(128, 16)
    tensor = gptq_solve(weight, hessian, QuantSpec(bits=8, scale_dtype="float16"))
    assert tensor.scales.dtype == jnp.float16
    exact = gptq_solve(weight, hessian, QuantSpec(bits=8))
    late = exact.scales.astype(jnp.float16).astype(jnp.float32)
    rounded_late = type(exact)(**{**vars(exact), "scales": late})
    assert relative_loss(weight, tensor, hessian) < relative_loss(weight, rounded_late, hessian)


def test_one_output_and_one_input():
    weight, hessian = make_layer(32, 1)
    assert gptq_solve(weight, hessian, QuantSpec(group_size=32)).shape == (32, 1)
    assert gptq_solve(np.ones((1, 4), np.float32), np.ones((1, 1), np.float32)).shape == (1, 4)


def test_constant_group_has_no_division_by_zero():
    weight, hessian = make_layer(64, 4)
    weight[:32] = 0
    tensor = gptq_solve(weight, hessian, QuantSpec(group_size=32, symmetric=False), order="natural", grid="minmax")
    assert bool(jnp.all(jnp.isfinite(tensor.scales)))
    np.testing.assert_array_equal(tensor.dequantize()[:32], 0)


def test_vmap_over_experts_is_the_loop_over_them():
    pairs = [make_layer(96, 16, seed=seed) for seed in range(3)]
    weights, hessians = (jnp.stack([jnp.asarray(pair[k]) for pair in pairs]) for k in (0, 1))
    spec = QuantSpec(group_size=32, symmetric=False)
    together = jax.vmap(lambda weight, hessian: gptq_solve(weight, hessian, spec))(weights, hessians)
    assert together.shape == (3, 96, 16)
    for k, (weight, hessian) in enumerate(pairs):
        alone = gptq_solve(weight, hessian, spec)
        one = jax.tree.map(lambda leaf, k=k: leaf[k], together)
        assert relative_loss(weight, one, hessian) == pytest.approx(relative_loss(weight, alone, hessian), rel=1e-3)


def test_second_call_compiles_nothing():
    weight, hessian = make_layer(96, 8)
    gptq_solve(weight, hessian, QuantSpec(group_size=32))
    before = solve_layer._cache_size()
    gptq_solve(weight + 1, hessian * 2, QuantSpec(group_size=32))
    assert solve_layer._cache_size() == before


def test_program_size_does_not_grow_with_the_inputs():
    def lines(d_in):
        shapes = jax.ShapeDtypeStruct((d_in, 64), jnp.float32), jax.ShapeDtypeStruct((d_in, d_in), jnp.float32)
        return solve_layer.lower(*shapes, QuantSpec(), GPTQOptions()).as_text().count("\n")

    assert lines(32768) <= 1.1 * lines(4096)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.full((8, 2), np.nan, np.float32)}, "weight holds NaN"),
        ({"hessian": np.full((8, 8), np.inf, np.float32)}, "hessian holds NaN"),
        ({"hessian": np.zeros((8, 8), np.float32)}, "hessian is zero"),
        ({"hessian": np.eye(2, dtype=np.float32)}, "transpose a torch weight"),
        ({"weight": np.ones(8, np.float32)}, "pass \\(d_in, d_out\\)"),
        ({"order": "random"}, "order='random'"),
        ({"grid": "best"}, "grid='best'"),
        ({"damping": -1.0}, "damping=-1.0"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"weight": np.ones((8, 2), np.float32), "hessian": np.eye(8, dtype=np.float32)}
    with pytest.raises(ValueError, match=message):
        gptq_solve(**{**arguments, **change})
