"""Bounds of low-precision gates: no active neuron is ever excluded; small cases are what a hand computes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.activations import RELU
from train.bench import gate_bounds
from train.bench.gate_bounds import SCHEMES, Scheme

PANEL, D, F = 4, 256, 48
ROWS = Scheme("int8")
NAMED = {scheme.name: scheme for scheme in SCHEMES}


def bf16(rows):
    with np.errstate(all="ignore"):
        return np.asarray(rows, np.float32).astype(jnp.bfloat16).astype(np.float32)


def gates(x, weight):
    """g (N, F) f64 up to its rounding, and which neurons the layer takes to be active: as XLA sums,
    and in f32 one by one from either end."""
    active = [
        np.asarray(
            RELU.active(reference.project(jnp.asarray(x, "bfloat16"), jnp.asarray(weight, "bfloat16")))
        )
    ]
    with np.errstate(all="ignore"):
        products = x[:, None] * weight
        for each in (products, products[..., ::-1]):
            total = np.cumsum(each, axis=2, dtype=np.float32)[..., -1]
            active.append(~(bf16(total) <= 0))
        return x.astype(np.float64) @ weight.astype(np.float64).T, np.any(active, axis=0)


def some_rows(rng, count):
    """Rows of many kinds: random, with outliers, of one entry, zero, subnormal, tiny, huge."""
    rows = rng.standard_normal((count, D))
    rows[1::8] *= np.where(rng.random(D) < 0.02, 300.0, 1.0)
    rows[2::8] = np.where(np.arange(D) == 5, 3.0, 0.0)
    rows[3::8] = 0.0
    rows[4::8] *= 1e-39
    rows[5::8] *= 1e-20
    rows[6::8] *= 1e18
    rows[7::8] += 40.0
    return bf16(rows)


def check(scheme, x, weight):
    """That the bound holds; returns low, bound and g."""
    directions = gate_bounds.directions_of(np.where(np.abs(x) < 1e6, x, 0))
    low, bound = gate_bounds.approximate(scheme, x, weight, panel=PANEL, directions=directions)
    g, active = gates(x, weight)
    assert not np.any(active & ~gate_bounds.candidates(low, bound, 0.0))
    assert not np.any(gate_bounds.decided_active(low, bound, RELU.last_inactive(jnp.bfloat16)) & ~active)
    close = np.isfinite(bound)
    assert (np.abs(g - low)[close] <= bound[close]).all()
    return low, bound, g


@pytest.mark.parametrize("name", NAMED)
def test_the_bound_holds_on_rows_of_every_kind(name):
    """Within a panel of one kind, and of all kinds."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x, weight = some_rows(rng, 32), some_rows(rng, F)
        check(NAMED[name], x, weight)
        _, bound, _ = check(NAMED[name], np.repeat(x[:8], PANEL, axis=0), weight)
        assert np.isfinite(bound[0, 0]), "an ordinary token in a panel of its kind"


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("of", ["x", "weight"])
def test_the_bound_holds_where_all_errors_add_up(name, of):
    """One side is the other's rounding error, of a panel of equal tokens as much as of a mixed one: then g is
    far above its approximation, and Cauchy-Schwarz is an equality."""
    rng = np.random.default_rng(0)
    rows = bf16(rng.standard_normal((16, D)))
    with np.errstate(all="ignore"):
        short = gate_bounds._low_precision(rows, NAMED[name].type, D)
    errors = bf16(100 * (rows - short))
    for sign in (1, -1):
        x, weight = (sign * errors, rows) if of == "weight" else (rows, sign * errors)
        check(NAMED[name], x, weight)


def test_cauchy_schwarz_is_reached_by_rows_that_are_errors():
    rows = bf16(np.random.default_rng(0).standard_normal((PANEL, D)))
    errors = bf16(rows - gate_bounds._low_precision(rows, "int8", D))
    _, bound, g = check(ROWS, rows, errors)
    distance = np.diag(g) - np.diag(gate_bounds.approximate(ROWS, rows, errors, panel=PANEL)[0])
    assert (distance > 0.5 * np.diag(bound)).all()


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_tokens_that_may_overflow_keep_all_their_neurons(name, bad):
    rng = np.random.default_rng(0)
    x, weight = bf16(rng.standard_normal((2 * PANEL, D))), bf16(rng.standard_normal((F, D)))
    x[1, 3] = bad
    basis = gate_bounds.directions_of(x[PANEL:])
    low, bound = gate_bounds.approximate(NAMED[name], x, weight, panel=PANEL, directions=basis)
    left = gate_bounds.candidates(low, bound, 0.0)
    assert left[1].all()
    assert not left[PANEL:].all(), "the other panel is as it was"


def test_no_bound_where_a_sum_is_near_the_largest_number():
    x = np.zeros((1, 8), np.float32)
    x[0, 0] = 2.0**64
    assert np.isfinite(gate_bounds.approximate(ROWS, x, x / 2**8, panel=1)[1])
    assert np.isinf(gate_bounds.approximate(ROWS, x, x / 4, panel=1)[1])


def test_the_bound_has_the_roundings_of_directions():
    """Where all of x and the weight is along one direction, hardly anything is left for int8 to get wrong."""
    rng = np.random.default_rng(0)
    along = rng.standard_normal((1, D))
    x, weight = bf16(rng.standard_normal((64, 1)) @ along), bf16(rng.standard_normal((64, 1)) @ along)
    scheme = Scheme("directions", directions=True)
    basis = (along.T / np.linalg.norm(along)).astype(np.float32)
    low, bound = gate_bounds.approximate(scheme, x, weight, panel=PANEL, directions=basis)
    g, _ = gates(x, weight)
    assert (np.abs(g - low) <= bound).all()
    assert (bound < 0.02 * np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weight, axis=1)).all()
    crooked = basis * 1.5 + rng.standard_normal((D, 1)).astype(np.float32) / 64
    low, bound = gate_bounds.approximate(scheme, x, weight, panel=PANEL, directions=crooked)
    assert (np.abs(g - low) <= bound).all(), "directions that are not of length 1 either"


def test_a_small_case_by_hand():
    """x and most weights are whole numbers of their scales; 0.25 of the third token is not."""
    x = np.asarray([[127, 64, 0, 0], [0, 0, 127, 0], [127, 0.25, 0, 0], [-127, 0, 0, 1]], np.float32)
    weight = np.asarray([[1, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, -127]], np.float32)
    low, bound = gate_bounds.approximate(ROWS, x, weight, panel=2)
    want = [[127, -127, 64, 0], [0, 0, 0, 0], [127, -127, 0, 0], [-127, 127, 0, -127]]
    np.testing.assert_allclose(low, want, rtol=1e-6)
    np.testing.assert_allclose(bound[2], [0.25, 0.25, 0.25, 0.25 * 127], rtol=0.01)
    assert (bound[[0, 1, 3]] < 0.1).all()
    left = gate_bounds.candidates(low, bound, 0.0)
    # A gate of exactly 0 is a candidate: the error of an f32 sum could lift it.
    np.testing.assert_array_equal(left[2:], [[True, False, True, True], [False, True, True, False]])
    assert left[0, 0]
    assert left[0, 2]
    assert not left[0, 1]
    decided = gate_bounds.decided_active(low, bound, 0.0)
    np.testing.assert_array_equal(decided[2], [True, False, False, False])


def test_unions_are_those_of_whole_panels():
    mask = np.zeros((4, 5), bool)
    mask[0, 1] = mask[1, 1] = mask[1, 4] = mask[3, 0] = True
    assert gate_bounds.mean_union(mask, 2) == pytest.approx((2 + 1) / 2 / 5)
    assert gate_bounds.mean_union(mask, 4) == pytest.approx(3 / 5)


def test_blocks_and_what_is_taken_apart_tighten_the_bound():
    """Of tokens that share much with their panel, neurons with a common part, and columns of unlike sizes."""
    rng = np.random.default_rng(0)
    shared = np.repeat(rng.standard_normal((4, D)), PANEL, axis=0)
    x = bf16((2 * shared + rng.standard_normal((16, D))) * np.where(np.arange(D) < 128, 8, 1))
    weight = bf16(rng.standard_normal((F, D)) + 0.5)
    median = {name: np.median(check(scheme, x, weight)[1]) for name, scheme in NAMED.items()}
    assert median["int8"] < 0.5 * median["FP8"]
    assert median["int8, x in two terms"] < 0.8 * median["int8"]
    assert median["int8, blocks"] < 0.95 * median["int8"]
    assert median["int8, centred"] < 0.8 * median["int8"]
    assert median["int8, centred, blocks"] < 0.95 * median["int8, centred"]
    assert median["int8, centred, directions"] < 0.95 * median["int8, centred"]


def test_times_of_products_are_those_of_their_flops():
    time = {name: scheme.product_time(2048, 5632, 128) for name, scheme in NAMED.items()}
    assert time["FP8"] == time["int8"] == 0.5
    assert time["int8, x in two terms"] == 1.0
    assert time["int8, blocks"] == 0.5 + 2 / 128
    assert time["int8, centred"] == 0.5 + 1 / 128
    assert time["int8, centred, directions"] == pytest.approx(0.5 + 1 / 128 + 1 / 32 + 2 * 64 / 5632)


def test_what_cannot_be_is_one_sentence():
    x = np.zeros((6, 8), np.float32)
    with pytest.raises(ValueError, match="whole panels of 4 tokens; got 6 tokens"):
        gate_bounds.approximate(ROWS, x, x, panel=4)
    with pytest.raises(ValueError, match="needs directions; got none"):
        gate_bounds.approximate(dataclasses.replace(ROWS, directions=True), x, x, panel=2)
