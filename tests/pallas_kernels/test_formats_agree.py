"""Every format gives the same layer on any pattern of activity:
random ones, and those that are worst for each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import call
from worst_patterns import check, layer, worst

from pallas_kernels import Auto, FFNOptions, Hybrid, Panel, Twell

TOKENS, WIDTH = 40, 48
OPTIONS = {
    "dense": FFNOptions(format="dense"),
    "twell": FFNOptions(Twell(tile=32, compression=8, backup_rows=3), backend="interpret"),
    "hybrid": FFNOptions(Hybrid(tile=32, width=4, backup_rows=3), backend="interpret"),
    "panel": FFNOptions(Panel(tokens=16), backend="interpret"),
    "panel with room for all": FFNOptions(Panel(tokens=16, capacity=1.0), backend="interpret"),
    "auto": FFNOptions(Auto(tokens=16), backend="interpret"),
}


WORST = worst(TOKENS, WIDTH, panel=16)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("pattern", WORST)
def test_worst_patterns(pattern, name):
    check(WORST[pattern], OPTIONS[name])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rates=st.lists(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]), min_size=TOKENS, max_size=TOKENS),
    seed=st.integers(0, 2**31),
)
def test_any_pattern(rates, seed):
    active = np.random.default_rng(seed).random((TOKENS, WIDTH)) < np.asarray(rates)[:, None]
    counted = {name: check(active, OPTIONS[name]) for name in OPTIONS}
    for name, stats in counted.items():
        np.testing.assert_array_equal(stats.neuron_hits, counted["dense"].neuron_hits, err_msg=name)
        assert stats.max_nnz == counted["dense"].max_nnz, name


def test_a_panel_call_without_room_counts_its_tokens():
    """At a quarter of the room a full batch takes the dense path when it is differentiated, and says so."""
    assert check(WORST["everything"], OPTIONS["panel"]).overflow_rows == TOKENS
    assert check(WORST["everything"], OPTIONS["panel with room for all"]).overflow_rows == 0
    assert check(WORST["nothing"], OPTIONS["panel"]).overflow_rows == 0
    inputs = jax.tree.map(jnp.asarray, layer(WORST["everything"]))
    _, stats = call(inputs, OPTIONS["panel"])
    assert stats.overflow_rows == 0, "without a gradient to compute there is room for all"
