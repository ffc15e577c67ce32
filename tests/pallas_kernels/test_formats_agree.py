"""Every format gives the same layer on any pattern of activity: random ones, and those that are worst for each.

The gate's weight is the identity, so that x is the gate and a pattern is whatever x is positive at.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_contract import DL1, call, check_counts, check_gradients, check_values, compiled, cotangent, run

from pallas_kernels import FFNOptions

TOKENS, WIDTH = 40, 48
COMMON = FFNOptions(backend="interpret", tile=32, compression=8, width=4, backup_rows=3, panel=16)
OPTIONS = {
    "dense": FFNOptions(format="dense"),
    "twell": dataclasses.replace(COMMON, format="twell"),
    "hybrid": dataclasses.replace(COMMON, format="hybrid"),
    "panel": dataclasses.replace(COMMON, format="panel"),
    "panel with room for all": dataclasses.replace(COMMON, format="panel", capacity=1.0),
    "auto": dataclasses.replace(COMMON, format="auto"),
}


def layer(active):
    """Arguments of a gated layer whose active neurons are those of ``active`` (M, F)."""
    rng = np.random.default_rng(0)
    magnitude = rng.uniform(0.25, 2, active.shape)
    up, down = rng.standard_normal((2, WIDTH, WIDTH)) / np.sqrt(WIDTH)
    inputs = {
        "x": np.where(active, magnitude, -magnitude),
        "w_gate": np.eye(WIDTH),
        "w_up": up,
        "w_down": down,
    }
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def check(active, name):
    inputs = layer(active)
    dy = cotangent(inputs)
    (y, stats), gradients = run(compiled(OPTIONS[name]), inputs, dy, DL1)
    check_values(y, stats, inputs)
    check_counts(stats, active, int(stats.overflow_rows))
    check_gradients(gradients, inputs, dy, DL1)
    return stats


token, neuron = np.indices((TOKENS, WIDTH))
WORST = {
    "every token disjoint from its neighbours": token == neuron,
    "one neuron active everywhere": neuron == WIDTH - 1,
    "one token with all neurons active": token == 17,
    "empty and full panels in turn": token // 16 % 2 == 1,
    "one neuron of a panel more than a chunk": neuron < 33,
    "nothing": token < 0,
    "everything": token >= 0,
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("pattern", WORST)
def test_worst_patterns(pattern, name):
    check(WORST[pattern], name)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rates=st.lists(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]), min_size=TOKENS, max_size=TOKENS),
    seed=st.integers(0, 2**31),
)
def test_any_pattern(rates, seed):
    active = np.random.default_rng(seed).random((TOKENS, WIDTH)) < np.asarray(rates)[:, None]
    counted = {name: check(active, name) for name in OPTIONS}
    for name, stats in counted.items():
        np.testing.assert_array_equal(stats.neuron_hits, counted["dense"].neuron_hits, err_msg=name)
        assert stats.max_nnz == counted["dense"].max_nnz, name


def test_a_panel_call_without_room_counts_its_tokens():
    """At a quarter of the room a full batch takes the dense path when it is differentiated, and says so."""
    assert check(WORST["everything"], "panel").overflow_rows == TOKENS
    assert check(WORST["everything"], "panel with room for all").overflow_rows == 0
    assert check(WORST["nothing"], "panel").overflow_rows == 0
    inputs = jax.tree.map(jnp.asarray, layer(WORST["everything"]))
    _, stats = call(inputs, OPTIONS["panel"])
    assert stats.overflow_rows == 0, "without a gradient to compute there is room for all"
