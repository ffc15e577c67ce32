"""The contract on the PanelELL kernels, run by Pallas' interpreter on a CPU."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import on_h200
from op_checks import DL1, call, check_everything, cotangent, differentiate, run
from op_contract import Contract
from panel_path import PanelPath, check_a_batch_of_which_one_has_no_room

from pallas_kernels import FFNOptions, Panel, PanelELL, reference, sparse_ffn
from pallas_kernels.panel import config as configs
from pallas_kernels.panel import layer
from pallas_kernels.panel import pallas_triton as kernels
from pallas_kernels.panel import pallas_triton_lists as lists_kernels
from pallas_kernels.panel import pallas_triton_weights as weights
from pallas_kernels.panel.pallas_triton_backward import panel_dh
from pallas_kernels.panel.pallas_triton_counts import count_active
from pallas_kernels.panel.pallas_triton_gate import gate_panel


class TestPanelInterpreted(Contract):
    path = PanelPath(
        FFNOptions(format=Panel(tokens=16, capacity=1.0), backend="interpret"),
        d_model=40,
        d_ff=72,
        many_tokens=301,
        check_vma=False,
        variants=(
            Panel(tokens=32, capacity=1.0),
            Panel(tokens=16, capacity=0.5),
            Panel(tokens=16, capacity=1e-06),
        ),
        tile=32,
        slots=8,
    )


PANEL = TestPanelInterpreted.path.options.layout.tokens


def listed(gate, d_ff, **sizes):
    """Lists of a gate stage's panels, and how many chunks they need."""
    counts = count_active(gate, d_ff=d_ff, interpret=True)
    lists, _ = lists_kernels.build_lists(counts, tokens=1, interpret=True, **sizes)
    return lists, lists.needed


@jax.jit
def written(x, weight):
    """A call's lists, how many chunks they need, and its values."""
    config = configs.choose(x, weight, PANEL)
    gate = gate_panel(x, weight, panel=config.panel, config=config.gate, interpret=True)
    lists, needed = listed(gate, len(weight), chunk=config.chunk)
    return lists, needed, kernels.panel_up(gate, lists, x, None, config=config.up, interpret=True).h


@pytest.mark.parametrize("tokens", [1, 16, 37])
@pytest.mark.parametrize("pattern", ["uneven", "few", "all-zero", "fully-dense"])
def test_the_kernels_write_the_format(pattern, tokens):
    """Gate stage, lists and the copy over the lists give what `PanelELL.from_dense` makes of
    the reference's gate."""
    inputs, _ = TestPanelInterpreted.path.layer(pattern, tokens, "float32")
    x, weight = jnp.asarray(inputs["x"]), jnp.asarray(inputs["w_gate"])
    config = configs.choose(x, weight, PANEL)
    chunk = config.chunk
    lists, needed, values = written(x, weight)
    expected = PanelELL.from_dense(reference.project(x, weight), panel=config.panel, chunk=chunk)
    used = int(needed) * chunk
    for name in ("offsets", "counts"):
        np.testing.assert_array_equal(getattr(lists, name), getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(lists.neurons[:used], expected.neurons[:used])
    np.testing.assert_allclose(values[:used], expected.values[:used], rtol=1e-6, atol=1e-6)
    packed = dataclasses.replace(expected, values=values, neurons=lists.neurons)
    np.testing.assert_allclose(packed.to_dense(), expected.to_dense(), rtol=1e-6, atol=1e-6)
    listed = np.flatnonzero(np.asarray(lists.slots).ravel() >= 0)
    assert len(listed) == int(lists.counts.sum())
    np.testing.assert_array_equal(
        np.asarray(lists.segments[:used]) > 0, np.any(expected.values[:used] != 0, axis=1)
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"up": configs.StageConfig(128, 16, 4, 2)},
            "up.tile must be chunk=32 or twice that; got 128",
        ),
        ({"dh": configs.StageConfig(16, 16, 4, 2)}, "dh.tile must be chunk=32"),
        ({"down": configs.StageConfig(32, 64, 4, 2)}, "down.tile_k must divide chunk=32"),
        ({"dw": configs.HotConfig(32, 32, 32, 4, 2)}, "dw.tile_k must divide panel=16"),
    ],
)
def test_the_laws_of_a_config(changes, sentence):
    small = configs._for_f32(16)
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(small, **changes)
    with pytest.raises(ValueError, match=r"StageConfig.tile must be a power of two from 16 to 256; got 24"):
        configs.StageConfig(24, 16, 4, 2)


def test_a_batch_of_which_one_has_no_room():
    options = dataclasses.replace(TestPanelInterpreted.path.options, format=Panel(tokens=16, capacity=0.5))
    check_a_batch_of_which_one_has_no_room(options, d_model=40, d_ff=300, tokens=33)


@pytest.mark.parametrize("pattern", ["uneven", "fully-dense", "few"])
def test_stages_over_pairs_of_chunks(pattern, monkeypatch):
    """As on Hopper, whose tiles are two chunks of the lists where a panel has two left."""
    pair = configs.StageConfig(32, 16, 4, 2)
    in_pairs = dataclasses.replace(configs._for_f32(16), chunk=16, up=pair, up_keep=pair, dh=pair)
    monkeypatch.setattr(configs, "heuristic", lambda *arguments: in_pairs)
    # Sizes that no other test has: what was traced for them has these configs.
    path = dataclasses.replace(TestPanelInterpreted.path, d_model=56, d_ff=88)
    inputs, active = path.layer(pattern, 53, path.dtype)
    dy = cotangent(inputs)
    step = jax.jit(partial(differentiate, apply=partial(call, options=path.options)))
    check_everything(run(step, inputs, dy, DL1), inputs, dy, active, 0)


@pytest.mark.parametrize("share", [1, 1 << 20])
def test_nothing_is_read_past_what_a_panel_has_written(share, monkeypatch):
    """Some kernels write a panel's slots only up to a multiple of the config's ``pad``."""
    path = TestPanelInterpreted.path
    inputs, _ = path.layer("uneven", 301, "float32")
    arguments = [jnp.asarray(inputs[name]) for name in ("x", "w_gate", "w_up", "w_down")]
    config = dataclasses.replace(configs._for_f32(16), rare=configs.RareConfig(share=share))
    monkeypatch.setattr(configs, "choose", lambda *_: config)
    kept = layer.forward(*arguments, path.options, "interpret")[1]
    offsets, counts = (np.asarray(field) for field in (kept.lists.offsets, kept.lists.counts))
    written = np.zeros(len(kept.gate), bool)
    for start, count in zip(offsets, counts, strict=False):
        written[start : start + -(-count // config.pad) * config.pad] = True
    assert 0 < written[: offsets[-1]].sum() < offsets[-1]

    def gradients(kept):
        dy, scale = jnp.asarray(cotangent(inputs)), jnp.full(1, DL1, jnp.float32)
        return layer.pull_back(*arguments, kept, dy, scale, path.options, "interpret", dtype=jnp.float32)

    gate, up = (jnp.where(written[:, None], values, jnp.nan) for values in (kept.gate, kept.up))
    found = jax.jit(gradients)(dataclasses.replace(kept, gate=gate, up=up))
    for mine, expected in zip(found, jax.jit(gradients)(kept), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_lists_that_do_not_fit_have_no_neuron():
    """Whatever walks them stays in bounds."""
    inputs, _ = TestPanelInterpreted.path.layer("fully-dense", 64, "float32")
    x, weight = jnp.asarray(inputs["x"]), jnp.asarray(inputs["w_gate"])
    gate = gate_panel(x, weight, panel=16, config=configs._for_f32(16).gate, interpret=True)
    lists, needed = listed(gate, len(weight), chunk=32, room=2)
    assert int(needed) > 2
    assert int(lists.slots.max()) < len(lists.neurons)
    assert not any(np.any(getattr(lists, name)) for name in ("n_pairs", "offsets", "counts", "totals"))


@pytest.mark.parametrize("tokens", [16, 37, 333])
@pytest.mark.parametrize("limit", [16, 1, 1000])
def test_the_tokens_of_rare_neurons(tokens, limit):
    """The panels' lists transposed: every rare neuron's tokens in order, with their slots;
    hot ones are left out."""
    inputs, active = TestPanelInterpreted.path.layer("uneven", tokens, "float32")
    x, weight = jnp.asarray(inputs["x"]), jnp.asarray(inputs["w_gate"])
    config = configs.choose(x, weight, PANEL)
    lists, _, kept = written(x, weight)
    ranking = weights.rank(lists.hits, lists.totals, limit=limit, round_up=lambda n: n + 3, interpret=True)
    np.testing.assert_array_equal(ranking.totals, active.sum(axis=0))
    found = weights.token_lists(kept, lists, ranking, limit=limit, interpret=True)
    for neuron in np.asarray(ranking.order)[int(ranking.n_hot[0]) :]:
        total = active[:, neuron].sum()
        assert total <= limit
        rows = np.flatnonzero(active[:, neuron])
        np.testing.assert_array_equal(found.rows[neuron, :total], rows)
        np.testing.assert_array_equal(
            found.slots[neuron, :total], np.asarray(lists.slots)[rows // config.panel, neuron]
        )


@pytest.mark.parametrize("block", [8192, 16])
@pytest.mark.parametrize(("n_panels", "limit"), [(1, 16), (1, 1), (5, 300), (128, 8000), (300, 17000)])
def test_neurons_in_order_of_activity(n_panels, limit, block, monkeypatch):
    """By classes of their totals, and where their tokens begin in each panel: also with more panels and
    neurons than a program looks at at one time, and sums that are no bytes."""
    monkeypatch.setattr(weights, "_ORDER_BLOCK", block)
    rng = np.random.default_rng(n_panels)
    hits = rng.integers(0, 129, (n_panels, 70)) * (rng.random(70) < 0.8) // rng.choice([1, 2, 8], 70)
    totals = hits.sum(axis=0)
    ranking = weights.rank(
        jnp.asarray(hits, jnp.uint8),
        jnp.asarray(totals, jnp.int32),
        limit=limit,
        round_up=lambda n: n + 5,
        interpret=True,
    )
    classes = sum((totals <= bound).astype(int) for bound in (limit, limit // 2, limit // 8, 0))
    order = np.argsort(classes, kind="stable")
    np.testing.assert_array_equal(ranking.order, order)
    n_hot = (totals > limit).sum() + 5
    assert ranking.n_hot.tolist() == [n_hot]
    starts = np.cumsum(hits, axis=0) - hits
    starts[:, order[:n_hot]] = -1
    np.testing.assert_array_equal(ranking.starts, starts)


def test_there_are_no_more_hot_neurons_than_neurons():
    hits = jnp.asarray([[17, 0, 20]], jnp.uint8)
    totals = jnp.sum(hits, axis=0, dtype=jnp.int32)
    assert weights.rank(hits, totals, limit=16, round_up=lambda n: n + 30, interpret=True).n_hot.tolist() == [
        3
    ]


@pytest.mark.parametrize(
    ("neurons", "tiles", "filled"),
    [
        (0, 24, 0),
        (391, 24, 5 * 128),  # four rows of tiles are 96 of 132 programs, and five 120
        (1084, 24, 11 * 128),
        (5 * 128, 24, 5 * 128),
        (200, 200, 2 * 128),  # a row of tiles is more than one round
    ],
)
def test_hot_neurons_fill_the_rounds_of_the_cores(neurons, tiles, filled):
    config = configs.HotConfig(128, 256, 32, 8, 8, per_core=1)
    assert on_h200(lambda: int(weights.fill_rounds(jnp.int32(neurons), tiles=tiles, config=config))) == filled
    unknown = dataclasses.replace(config, per_core=0)
    assert (
        int(weights.fill_rounds(jnp.int32(neurons), tiles=tiles, config=unknown)) == -(-neurons // 128) * 128
    )


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [("uneven", "gated"), ("uneven", "non-gated"), ("few", "gated"), ("fully-dense", "gated")],
)
def test_chunks_in_pairs_give_the_same_values(pattern, kind):
    inputs, _ = TestPanelInterpreted.path.layer(pattern, 37, "float32", kind)
    dy, scale = jnp.asarray(cotangent(inputs)), jnp.full(1, DL1, jnp.float32)
    inputs = {name: jnp.asarray(value) for name, value in inputs.items()}
    gate_weight = inputs.get("w_gate", inputs["w_up"])
    up_weight = inputs["w_up"] if kind == "gated" else None
    gate = gate_panel(inputs["x"], gate_weight, panel=16, config=configs._for_f32(16).gate, interpret=True)
    lists, needed = listed(gate, len(gate_weight), chunk=16)
    used = int(needed) * 16

    def stages(tile):
        config = configs.StageConfig(tile, 16, 4, 2)
        hidden = kernels.panel_up(
            gate, lists, inputs["x"], up_weight, config=config, keep=True, interpret=True
        )
        gradients = panel_dh(
            hidden.gate, hidden.up, lists, dy, inputs["w_down"], scale, config=config, interpret=True
        )
        return [value[:used] for value in jax.tree.leaves((hidden._replace(l1=None), gradients))], hidden.l1

    (alone, l1), (pairs, l1_of_pairs) = stages(16), stages(32)
    assert len(alone) == (6 if kind == "gated" else 4)
    for one, two in zip(alone, pairs, strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(l1, l1_of_pairs, rtol=1e-6)


@pytest.mark.parametrize("d_model", [24, 100])
def test_slots_on_the_wide_side(d_model):
    """A tile with more slots than tokens is the other product, turned on its side."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w_gate, w_up = (
        jax.random.normal(key, (n, d_model)) for key, n in zip(keys, (70, 200, 200), strict=True)
    )
    gate = gate_panel(x, w_gate, panel=64, config=configs.StageConfig(64, 16, 4, 2), interpret=True)
    lists, needed = listed(gate, 200, chunk=64)
    square, wide = (
        kernels.panel_up(gate, lists, x, w_up, config=configs.StageConfig(t, 16, 4, 2), interpret=True)
        for t in (64, 128)
    )
    used = int(needed) * 64
    np.testing.assert_allclose(square.h[:used], wide.h[:used], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(square.l1, wide.l1, rtol=1e-5)


@pytest.mark.parametrize("share", [1, 1 << 20])
def test_either_way_alone_gives_the_weight_gradients(share, monkeypatch):
    """A border at all tokens makes every neuron rare, one far below makes those of more than
    16 tokens hot."""
    inputs, active = TestPanelInterpreted.path.layer("uneven", 301, "float32")
    inputs = {name: jnp.asarray(value) for name, value in inputs.items()}
    hot = active.sum(axis=0) > max(301 // share, 16)
    assert hot.any() == (share > 1)

    def gradients(options):
        total = jax.grad(lambda inputs: jnp.sum(sparse_ffn(**inputs, options=options)[0]))
        return jax.jit(total)(inputs)

    expected = gradients(FFNOptions(format="dense"))
    small = dataclasses.replace(configs._for_f32(16), rare=configs.RareConfig(share=share))
    monkeypatch.setattr(configs, "choose", lambda *_: small)
    found = gradients(TestPanelInterpreted.path.options)
    for name in expected:
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(found[name] / scale, expected[name] / scale, atol=1e-5, err_msg=name)
