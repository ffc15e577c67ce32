"""The contract on the HybridELL kernels, run by Pallas' interpreter on a CPU, and the format's own tests."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hybrid_path import HybridPath
from op_checks import DL1, DTYPES, LAYERS, check_everything, compiled, cotangent, differentiate, run
from op_checks import call as sparse_call
from op_contract import Contract
from truth import judge, rounding_to

from pallas_kernels import FFNOptions, Hybrid, HybridELL
from pallas_kernels.common.row_config import RowsConfig
from pallas_kernels.common.row_kernel import up_down
from pallas_kernels.hybrid import config as configs
from pallas_kernels.hybrid import pallas_triton_backward as backward
from pallas_kernels.hybrid.layer import gate_stage
from pallas_kernels.reference import project


class TestHybridInterpreted(Contract):
    """At W 30 two whole tiles of 15 fill a row exactly; at W 15 every row of 16 overflows."""

    path = HybridPath(
        FFNOptions(format=Hybrid(tile=32, width=30), backend="interpret"),
        d_model=40,
        d_ff=72,
        many_tokens=301,
        check_vma=False,
        variants=(
            Hybrid(tile=32, width=15, backup_rows=1),
            Hybrid(width=16, tile=64, backup_rows=2),
            Hybrid(tile=32, width=1, backup_rows=3),
            Hybrid(tile=32, width=128),
        ),
        tile=32,
        slots=16,
    )

    def test_a_neuron_of_all_tokens(self):
        """One neuron is active for every token, so one list is as long as the batch."""
        tokens = self.path.many_tokens
        inputs, _ = self.layer("all-zero", tokens, "bfloat16")
        inputs["w_gate"][7] = np.abs(inputs["w_gate"][7]) + 1
        inputs["w_gate"][7, 8:] = 0
        active = np.zeros((tokens, self.path.d_ff), bool)
        active[:, 7] = True
        dy = cotangent(inputs)
        check_everything(run(compiled(self.path.options), inputs, dy, DL1), inputs, dy, active, 0)


PATH = TestHybridInterpreted.path
TOKENS = 33
"""Of a call to look into: its stages compile once a type for all tests."""


def call(inputs, options=PATH.options):
    return sparse_call(inputs, options)


@pytest.fixture
def of_stages(monkeypatch):
    """Sets fields of a stage's config, whatever the call."""
    choose = configs.choose

    def set_fields(**stages):
        def chosen(*arguments, **keywords):
            config = choose(*arguments, **keywords)
            fields = {name: dataclasses.replace(getattr(config, name), **f) for name, f in stages.items()}
            return dataclasses.replace(config, **fields)

        monkeypatch.setattr(configs, "choose", chosen)

    return set_fields


# -- the format --------------------------------------------------------------------------------------------


@jax.jit
def stored(inputs):
    """The residuals of a call, and its gate."""
    x, weight = inputs["x"], inputs.get("w_gate", inputs["w_up"])
    config = configs.choose(x, weight, PATH.options.layout)
    packed, _ = gate_stage(config, "interpret", PATH.options.rule)(x, weight)
    up = inputs["w_up"] if "w_gate" in inputs else None
    rows = up_down(
        packed,
        x,
        up,
        inputs["w_down"],
        width=PATH.options.layout.width,
        keep=True,
        config=config.up_down,
        name="hybrid_up_down",
        interpret=True,
    )
    return rows.ell, project(x, weight), None if up is None else project(x, up)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["all-zero", "exactly-full", "one-over", "uneven"])
def test_residuals_are_the_format(pattern, dtype, kind):
    """The triples are `HybridELL`, twice: rows that fit as `from_dense` has them, the rest empty."""
    inputs, active = PATH.layer(pattern, TOKENS, dtype, kind)
    inputs = jax.tree.map(jnp.asarray, inputs)
    ell, gate, up = stored(inputs)
    expected = HybridELL.from_dense(gate, width=PATH.options.layout.width, backup_rows=0)
    assert (ell.indices.dtype, ell.gate.dtype) == (jnp.uint16, gate.dtype)
    np.testing.assert_array_equal(ell.nnz, expected.nnz)

    def dense(values):
        whole = HybridELL(values, ell.indices, ell.nnz, expected.backup, expected.backup_ids, PATH.d_ff)
        return np.asarray(whole.to_dense(), np.float64)

    np.testing.assert_array_equal(dense(ell.gate), np.asarray(expected.to_dense(), np.float64))
    fits = active.sum(axis=1) <= PATH.options.layout.width
    if up is not None:
        true = np.where(active & fits[:, None], np.asarray(up, np.float64), 0)
        np.testing.assert_allclose(dense(ell.up), true, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-6)
    unused = np.arange(PATH.options.layout.width)[None] >= np.where(fits, active.sum(axis=1), 0)[:, None]
    for leaf in (ell.indices, ell.gate, *([] if ell.up is None else [ell.up])):
        assert not np.asarray(leaf, np.float64)[unused].any()


def test_a_neuron_past_16_bits():
    """Its index takes 32 bits, and its gate a second piece of the packed words."""
    tokens, d_model, d_ff = 2, 16, (1 << 16) + 40
    where = [5, 65535, 65536, d_ff - 1]
    rng = np.random.default_rng(0)
    inputs = {name: np.zeros((d_ff, d_model), np.float32) for name in ("w_gate", "w_up", "w_down")}
    inputs["w_gate"][where, 0] = [1, 2, 3, 4]
    inputs["w_up"][where] = rng.standard_normal((4, d_model))
    inputs["w_down"][where] = rng.standard_normal((4, d_model))
    inputs["x"] = rng.standard_normal((tokens, d_model)).astype(np.float32)
    inputs["x"][:, 0] = 1
    active = np.zeros((tokens, d_ff), bool)
    active[:, where] = True
    options = dataclasses.replace(PATH.options, format=Hybrid(tile=64, width=4))
    dy = cotangent(inputs)
    step = jax.jit(partial(differentiate, apply=partial(call, options=options)))
    check_everything(run(step, inputs, dy, DL1), inputs, dy, active, 0)


# -- the transposed structure ------------------------------------------------------------------------------


def test_lists_by_neuron():
    """Each neuron's tokens in ascending order, those of rows that fit only, the longest list first."""
    inputs, active = PATH.layer("uneven", TOKENS, "bfloat16")
    ell, *_ = stored(jax.tree.map(jnp.asarray, inputs))
    lists = jax.device_get(backward.by_neuron(ell, PATH.d_ff))
    active &= (active.sum(axis=1) <= PATH.options.layout.width)[:, None]
    np.testing.assert_array_equal(lists.counts, active.sum(axis=0))
    for neuron, (start, count) in enumerate(zip(lists.starts, lists.counts, strict=True)):
        rows, slots = np.divmod(lists.places[start : start + count], PATH.options.layout.width)
        np.testing.assert_array_equal(rows, np.flatnonzero(active[:, neuron]))
        assert (np.asarray(ell.indices)[rows, slots] == neuron).all()
    assert sorted(lists.order) == list(range(PATH.d_ff))
    assert (np.diff(lists.counts[lists.order]) <= 0).all()


@jax.jit
def pulled(ell, inputs, dy):
    """The gradients at the non-zeros of a call, and where they stand."""
    gate, up = (inputs["w_up"], None) if ell.up is None else (inputs["w_gate"], inputs["w_up"])
    config = configs.choose(inputs["x"], gate, PATH.options.layout)
    dl1 = jnp.full(1, DL1, jnp.float32)
    rows = backward.pull_rows(ell, dy, dl1, gate, up, inputs["w_down"], config=config.dx, interpret=True)
    return rows, backward.by_neuron(ell, PATH.d_ff)


@pytest.mark.parametrize(
    ("hot", "dtype", "kind"),
    [
        *((hot, "bfloat16", "gated") for hot in (1, 72, 100)),
        *((5, dtype, kind) for dtype in DTYPES for kind in LAYERS),
    ],
)
def test_any_number_of_hot_neurons(hot, dtype, kind):
    """The hottest neurons' weight gradients by a dense product, the others' by lists: one sum, rounded."""
    inputs, active = PATH.layer("uneven", TOKENS, dtype, kind)
    dy = cotangent(inputs).astype(dtype)
    ell, *_ = stored(jax.tree.map(jnp.asarray, inputs))
    rows, lists = pulled(ell, inputs, dy)
    used = active & (active.sum(axis=1) <= PATH.options.layout.width)[:, None]
    coefficients = [rows.d_gate, *([] if rows.d_up is None else [rows.d_up]), rows.h]
    others = np.random.default_rng(1).standard_normal((len(coefficients), PATH.d_ff, PATH.d_model))
    others = others.astype(np.float32)
    config = dataclasses.replace(
        configs.choose(inputs["x"], inputs["w_up"], PATH.options.layout).weights, hot=hot
    )
    step = partial(backward.pull_weights, dtype=jnp.dtype(dtype), config=config, interpret=True)
    found = run(lambda inputs: jax.jit(step)(rows, ell, lists, inputs["x"], dy, list(others)), inputs)
    for values, other, gradient in zip(coefficients, others, found, strict=True):
        dense = np.zeros(used.shape)
        where, slots = np.nonzero(np.arange(PATH.options.layout.width)[None] < used.sum(axis=1)[:, None])
        dense[where, np.asarray(ell.indices)[where, slots]] = np.asarray(values, np.float64)[where, slots]
        assert (dense[~used] == 0).all()
        true = dense.T @ np.asarray(dy if values is rows.h else inputs["x"], np.float64) + other
        judge("gradient", gradient, true, rounding_to(dtype)(true), dtype)


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "gated"), ("float32", "non-gated")])
def test_hot_neurons(of_stages, dtype, kind):
    """The whole layer with both ways at work."""
    of_stages(weights={"hot": 5})
    inputs, active = PATH.layer("uneven", TOKENS, dtype, kind)
    dy = cotangent(inputs)
    result = run(jax.jit(partial(differentiate, apply=call)), inputs, dy, DL1)
    check_everything(result, inputs, dy, active, PATH.overflow_rows(active))


@pytest.mark.parametrize("stage", [{"slice_d": 16}, {"entries": 16}, {"slice_d": 32, "entries": 1}], ids=str)
def test_cuts_of_the_weight_gradients(of_stages, stage):
    of_stages(weights=stage, up_down={"entries": 8}, dx={"entries": 1})
    inputs, active = PATH.layer("uneven", TOKENS, "float32")
    dy = cotangent(inputs)
    result = run(jax.jit(partial(differentiate, apply=call)), inputs, dy, DL1)
    check_everything(result, inputs, dy, active, PATH.overflow_rows(active))


# -- the backup --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1, 3, 4, 8])
def test_backup_bounds(bound):
    """Four rows of eight overflow: fewer, as many and more than a round holds."""
    options = dataclasses.replace(
        PATH.options, format=dataclasses.replace(PATH.options.layout, backup_rows=bound)
    )
    inputs, active = PATH.layer("one-over", 8, "bfloat16")
    assert PATH.overflow_rows(active) == 4
    dy = cotangent(inputs)
    step = jax.jit(partial(differentiate, apply=partial(call, options=options)))
    check_everything(run(step, inputs, dy, DL1), inputs, dy, active, 4)


def test_inference_keeps_nothing():
    """Without a gradient to compute, the kernel writes y and statistics only."""
    inputs = jax.tree.map(jnp.asarray, PATH.layer("few", 7, "bfloat16")[0])
    assert "sparse_ffn_gate" not in str(jax.make_jaxpr(call)(inputs))
    assert "sparse_ffn_gate" in str(jax.make_jaxpr(jax.grad(lambda i: call(i)[1].l1))(inputs))


# -- configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RowsConfig(entries=3), "RowsConfig.entries must be a power of two from 1"),
        (lambda: RowsConfig(num_warps=64), "num_warps must be a power of two from 1 to 32; got 64"),
        (lambda: configs.NeuronSumConfig(slice_d=8), "slice_d must be a power of two from 16 to 4096; got 8"),
        (lambda: configs.NeuronSumConfig(hot=-1), "NeuronSumConfig.hot must be at least 0; got -1"),
    ],
)  # fmt: skip
def test_laws_of_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("width", [1, 7, 8, 128, 255, 256, 1000])
@pytest.mark.parametrize("tile", [32, 256])
def test_a_tile_holds_what_a_row_may(tile, width):
    slots = configs.slots(tile, width)
    assert slots - 1 >= min(tile, width)
    assert slots % 8 == 0


def test_hot_neurons_need_many_tokens():
    def hot(tokens, d_ff):
        x, w = (jax.ShapeDtypeStruct((n, 64), jnp.bfloat16) for n in (tokens, d_ff))
        return configs.choose(x, w, Hybrid()).weights.hot

    assert [hot(16384, 5632), hot(64, 5632), hot(16384, 512)] == [256, 0, 0]


def test_a_tuned_entry_replaces_fields(monkeypatch):
    x, w = (jax.ShapeDtypeStruct((n, 64), jnp.bfloat16) for n in (128, 600))
    usual = configs.choose(x, w, Hybrid())
    entries = {"hybrid": {"weights": {"entries": 16}, "dx": {"num_warps": 8}}}
    monkeypatch.setattr(configs.tuning, "lookup", lambda device, op, key: entries.get(op))
    tuned = configs.choose(x, w, Hybrid())
    assert tuned.weights == dataclasses.replace(usual.weights, entries=16)
    assert tuned.dx == dataclasses.replace(usual.dx, num_warps=8)
    assert tuned.up_down == usual.up_down
