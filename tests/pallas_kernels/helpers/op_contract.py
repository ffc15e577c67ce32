"""The one suite that every path and every backend runs: `Contract`, to be subclassed with a `Path`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designed import CLASSES, PATTERNS
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from op_checks import (
    DL1,
    DTYPES,
    LAYERS,
    Path,
    call,
    check_counts,
    check_everything,
    check_float32_gradients,
    check_gradients,
    check_values,
    compiled,
    compiled_forward,
    cotangent,
    differentiate,
    master_weights,
    run,
)
from truth import Arrays, exact, forward, gradients, judge, rounding_to

from pallas_kernels import FFNOptions, Threshold, device, dispatch

ACTIVATIONS = [  # every activation in both types, and with each kind of layer that it is for
    ("relu2", "gated", "bfloat16"), ("relu2", "non-gated", "float32"),
    ("drelu", "gated", "bfloat16"), ("drelu", "gated", "float32"),
    (Threshold(0.3125), "gated", "float32"), (Threshold(0.3125), "non-gated", "bfloat16"),
]  # fmt: skip
ACTIVATIONS_ON_GPUS = [  # the other type of each; a CPU compiles a program for seconds
    ("relu2", "gated", "float32"), ("relu2", "non-gated", "bfloat16"),
    (Threshold(0.3125), "gated", "bfloat16"), (Threshold(0.3125), "non-gated", "float32"),
]  # fmt: skip


class Contract:
    """Subclass it in a thin file, with a `Path`."""

    path: ClassVar[Path]

    def layer(self, pattern: str, tokens: int | None = None, dtype: str | None = None, **kwargs: Any):
        """`Path.layer`, by default with the path's own M and type; skips what a partial backend refuses."""
        tokens = self.path.tokens if tokens is None else tokens
        inputs, active = self.path.layer(pattern, tokens, dtype or self.path.dtype, **kwargs)
        self.skip_unsupported(inputs, self.path.options)
        return inputs, active

    def skip_unsupported(self, inputs: Arrays, options: FFNOptions) -> None:
        if self.path.partial:
            call = dispatch.Call.of(inputs["x"], inputs["w_up"])
            reason = dispatch.unsupported_reason(options.layout, options.backend, call, device.current())
            if reason is not None:
                pytest.skip(reason)

    # -- values, statistics and gradients on every pattern of sparsity -------------------------------------

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_pattern(self, pattern, dtype, kind):
        self.check(pattern, self.path.tokens, dtype, kind)

    @pytest.mark.parametrize(("activation", "kind", "dtype"), ACTIVATIONS + ACTIVATIONS_ON_GPUS)
    def test_activation(self, activation, kind, dtype):
        """Every activation but the plain one, in values, statistics and gradients; rows fit and overflow."""
        if (activation, kind, dtype) in ACTIVATIONS_ON_GPUS and jax.default_backend() != "gpu":
            pytest.skip("on a CPU each activation has each type and each kind of layer, but not all of both")
        inputs, _ = self.layer("uneven", dtype=dtype, kind=kind)
        options = dataclasses.replace(self.path.options, activation=activation)
        dy = cotangent(inputs)
        (y, stats), grads = run(compiled(options), inputs, dy, DL1)
        true, rounded = (forward(inputs, cast, activation) for cast in (exact, rounding_to(dtype)))
        judge("y", y, true["y"], rounded["y"], y.dtype)
        judge("l1", stats.l1, true["l1"], rounded["l1"], y.dtype)
        check_counts(stats, true["active"], self.path.overflow_rows(true["active"]))
        true, rounded = (
            gradients(inputs, dy, DL1, cast, activation=activation) for cast in (exact, rounding_to(dtype))
        )
        for name, gradient in grads.items():
            judge(f"gradient of {name}", gradient, true[name], rounded[name], y.dtype)

    @pytest.mark.parametrize("pattern", ["one-row-hot", "few"])
    def test_one_token(self, pattern):
        self.check(pattern, 1, "bfloat16", "gated")

    @pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "gated"), ("float32", "non-gated")])
    def test_many_tokens(self, dtype, kind):
        self.check("uneven", self.path.many_tokens, dtype, kind)
        self.check("every-row-overflows", self.path.many_tokens, dtype, kind)

    @pytest.mark.parametrize("pattern", ["uneven", "fully-dense", "all-zero"])
    @pytest.mark.parametrize("kind", LAYERS)
    def test_without_a_gradient(self, pattern, kind):
        """Inference may run other kernels than the forward of a training step."""
        inputs, active = self.layer(pattern, kind=kind)
        y, stats = run(compiled_forward(self.path.options), inputs)
        check_values(y, stats, inputs)
        overflow_rows = 0 if self.path.options.layout.name == "panel" else self.path.overflow_rows(active)
        check_counts(stats, active, overflow_rows)

    def test_tiny_layer(self):
        """D and F far below a tile."""
        small = dataclasses.replace(self.path, d_model=CLASSES + 1, d_ff=3)
        inputs, active = small.layer("few", 2, self.path.dtype)
        self.skip_unsupported(inputs, self.path.options)
        dy = cotangent(inputs)
        result = run(compiled(self.path.options), inputs, dy, DL1)
        check_everything(result, inputs, dy, active, 0)

    def check(self, pattern: str, tokens: int, dtype: str, kind: str) -> None:
        inputs, active = self.layer(pattern, tokens, dtype, kind=kind)
        dy = cotangent(inputs)
        result = run(compiled(self.path.options), inputs, dy, DL1)
        check_everything(result, inputs, dy, active, self.path.overflow_rows(active))

    # -- gradients of one output alone ---------------------------------------------------------------------

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("output", ["y", "l1"])
    def test_gradient_through_one_output(self, output, dtype, kind):
        inputs, _ = self.layer("uneven", dtype=dtype, kind=kind)
        dy, dl1 = (cotangent(inputs), 0.0) if output == "y" else (np.zeros_like(cotangent(inputs)), DL1)
        _, grads = run(compiled(self.path.options), inputs, dy, dl1)
        check_gradients(grads, inputs, dy, dl1)
        if output == "l1":
            assert not grads["w_down"].any()

    def test_gradient_of_l1_by_itself(self):
        """The objective that never looks at y."""
        inputs, _ = self.layer("uneven")
        gradient = jax.jit(jax.grad(lambda inputs: DL1 * call(inputs, self.path.options)[1].l1))
        check_gradients(run(gradient, inputs), inputs, np.zeros_like(inputs["x"]), DL1)

    # -- master weights ------------------------------------------------------------------------------------

    @pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "gated"), ("float16", "non-gated")])
    @pytest.mark.parametrize("pattern", ["uneven", "every-row-overflows"])
    def test_float32_gradients(self, pattern, dtype, kind):
        """f32 weights beside a 16-bit x compute as what they round to,
        and their gradients are not rounded."""
        inputs, active = self.layer(pattern, dtype=dtype, kind=kind)
        dy = cotangent(inputs)
        (y, stats), grads = run(compiled(self.path.options), master_weights(inputs), dy, DL1)
        check_values(y, stats, inputs)
        check_counts(stats, active, self.path.overflow_rows(active))
        check_float32_gradients(grads, inputs, dy, DL1)

    # -- NaN and infinity ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("pattern", ["few", "uneven", "every-row-overflows"])
    def test_nan_stays_in_its_row(self, pattern, dtype, kind):
        inputs, active = self.layer(pattern, dtype=dtype, kind=kind)
        inputs["x"][3, -1] = np.nan
        active[3] = True
        (y, stats), _ = run(compiled(self.path.options), inputs, cotangent(inputs), DL1)
        assert np.isnan(np.asarray(y[3], np.float32)).all()
        assert np.isnan(stats.l1)
        check_values(y, stats, inputs)
        check_counts(stats, active, self.path.overflow_rows(active))

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("neurons", [1, 2, 3, 5])
    def test_infinity_reaches_what_it_touches(self, neurons, dtype, kind):
        """An infinite x makes gates infinite: active ones give infinity to y, inactive ones nothing.

        The other tokens of the row's class have the same active neurons, and finite ones.
        """
        inputs, active = self.layer("all-zero", dtype=dtype, kind=kind)
        row = 3
        gate = inputs["w_gate" if kind == "gated" else "w_up"]
        gate[:, row] = -1
        gate[:neurons, row] = 1
        active[np.arange(len(active)) % CLASSES == row, :neurons] = True
        inputs["x"][row, row] = np.inf
        if kind == "gated":
            inputs["w_up"][:neurons] = np.abs(inputs["w_up"][:neurons])
        inputs["w_down"][:neurons] = np.abs(inputs["w_down"][:neurons])
        (y, stats), _ = run(compiled(self.path.options), inputs, cotangent(inputs), DL1)
        assert np.isposinf(np.asarray(y[row], np.float32)).all()
        assert np.isposinf(stats.l1)
        check_values(y, stats, inputs)
        check_counts(stats, active, self.path.overflow_rows(active))

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_an_infinite_weight_is_counted_for_tokens_alone(self, dtype, kind):
        """Gates of minus infinity are inactive, and the last token has infinite ones. What fills up its tile
        is zero, and zero times infinity is NaN, which is active: it must not count, nor be written."""
        inputs, active = self.layer("few", dtype=dtype, kind=kind)
        neurons = [1, active.shape[1] - 2]
        inputs["x"][:, -1] = -1
        inputs["x"][-1, -1] = 1
        if kind == "gated":
            inputs["w_up"][neurons] = 0
            inputs["w_up"][neurons, -1] = 1
        inputs["w_gate" if kind == "gated" else "w_up"][neurons, -1] = np.inf
        inputs["w_down"][neurons] = np.abs(inputs["w_down"][neurons])
        active[:, neurons] = False
        active[-1, neurons] = True
        (y, stats), _ = run(compiled(self.path.options), inputs, cotangent(inputs), DL1)
        assert np.isfinite(np.asarray(y[:-1], np.float32)).all()
        assert np.isposinf(np.asarray(y[-1], np.float32)).all()
        assert np.isposinf(stats.l1)
        check_values(y, stats, inputs)
        check_counts(stats, active, self.path.overflow_rows(active))

    # -- what no result may depend on ----------------------------------------------------------------------

    @pytest.mark.parametrize("pattern", ["uneven", "every-row-overflows"])
    def test_capacities_change_no_result(self, pattern):
        for layout in self.path.variants:
            variant = dataclasses.replace(
                self.path, options=dataclasses.replace(self.path.options, format=layout)
            )
            inputs, active = self.layer(pattern)
            self.skip_unsupported(inputs, variant.options)
            dy = cotangent(inputs)
            result = run(compiled(variant.options), inputs, dy, DL1)
            check_everything(result, inputs, dy, active, variant.overflow_rows(active))

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_same_bits_twice(self, dtype, kind):
        inputs, _ = self.layer("uneven", dtype=dtype, kind=kind)
        first, second = (run(compiled(self.path.options), inputs, cotangent(inputs), DL1) for _ in range(2))
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(first), jax.tree.leaves(second), strict=True
        ):
            assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)

    def test_batch_order_changes_no_row(self):
        """A token's y does not depend on where it stands."""
        inputs, _ = self.layer("uneven")
        reversed_ = inputs | {"x": inputs["x"][::-1]}
        (y, _), _ = run(compiled(self.path.options), inputs, cotangent(inputs), DL1)
        (again, _), _ = run(compiled(self.path.options), reversed_, cotangent(inputs), DL1)
        again, y = again[::-1].astype(np.float32), y.astype(np.float32)
        ulp = float(jnp.finfo(self.path.dtype).eps)
        np.testing.assert_allclose(again, y, rtol=0, atol=8 * ulp * np.abs(y).max())

    # -- shapes of tokens ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("leading", [(), (2, 4)], ids=str)
    def test_leading_shape(self, leading):
        inputs, active = self.layer("uneven", int(np.prod(leading, dtype=int)))
        dy = cotangent(inputs)
        shaped = inputs | {"x": inputs["x"].reshape(*leading, -1)}
        (y, stats), grads = run(compiled(self.path.options), shaped, dy.reshape(*leading, -1), DL1)
        assert y.shape == grads["x"].shape == shaped["x"].shape
        flat = (y.reshape(dy.shape), stats), grads | {"x": grads["x"].reshape(dy.shape)}
        check_everything(flat, inputs, dy, active, self.path.overflow_rows(active))

    @pytest.mark.parametrize("kind", LAYERS)
    @pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
    def test_empty_batch(self, leading, kind):
        inputs, active = self.layer("few", 0, kind=kind)
        inputs["x"] = inputs["x"].reshape(*leading, self.path.d_model)
        (y, stats), grads = run(compiled(self.path.options), inputs, cotangent(inputs), DL1)
        assert y.shape == inputs["x"].shape
        assert stats.l1 == 0
        check_counts(stats, active, 0)
        assert not any(gradient.any() for gradient in grads.values())

    # -- transformations -----------------------------------------------------------------------------------

    @pytest.mark.parametrize("weights", ["shared", "batched"])
    def test_vmap(self, weights):
        """One call, and one set of statistics, for each element."""
        (first, active), (second, other) = (self.layer("uneven", seed=s) for s in (0, 1))
        if weights == "shared":
            second, other = first | {"x": first["x"][::-1].copy()}, active[::-1]
        axes = {name: 0 if weights == "batched" or name == "x" else None for name in first}
        batch = {
            name: np.stack([first[name], second[name]]) if axes[name] == 0 else first[name] for name in first
        }
        dy = cotangent(batch)
        step = partial(differentiate, apply=partial(call, options=self.path.options))
        results = run(jax.jit(jax.vmap(step, in_axes=(axes, 0, None))), batch, dy, DL1)
        for index, (inputs, mask) in enumerate([(first, active), (second, other)]):
            one = jax.tree.map(lambda leaf, index=index: leaf[index], results)
            check_everything(one, inputs, dy[index], mask, self.path.overflow_rows(mask))

    def test_remat(self):
        self.check_transformed(jax.checkpoint(partial(call, options=self.path.options)))

    def test_scan(self):
        """A scan over layers that all read the same x; y is their sum."""
        layers = [self.layer("uneven", seed=seed) for seed in range(3)]
        x, dy = layers[0][0]["x"], cotangent(layers[0][0])
        layers = [(inputs | {"x": x}, mask) for inputs, mask in layers]
        stacked = {
            name: np.stack([inputs[name] for inputs, _ in layers]) for name in layers[0][0] if name != "x"
        }

        def apply(inputs):
            def body(total, weights):
                y, stats = call({"x": inputs["x"]} | weights, self.path.options)
                return total + y, stats

            weights = {name: value for name, value in inputs.items() if name != "x"}
            return jax.lax.scan(body, jnp.zeros_like(inputs["x"]), weights)

        step = jax.jit(partial(differentiate, apply=apply))
        (y, stats), grads = run(step, stacked | {"x": x}, dy, DL1)
        sums = {}
        for cast in (exact, rounding_to(x.dtype)):
            total, d_x = np.zeros(x.shape), np.zeros(x.shape)
            for inputs, _ in layers:
                total = cast(total + forward(inputs, cast)["y"])
                d_x = cast(d_x + gradients(inputs, dy, DL1, cast)["x"])
            sums[cast is exact] = total, d_x
        judge("y", y, sums[True][0], sums[False][0], x.dtype)
        judge("gradient of x", grads.pop("x"), sums[True][1], sums[False][1], x.dtype)
        for index, (inputs, mask) in enumerate(layers):
            check_counts(jax.tree.map(lambda s, i=index: s[i], stats), mask, self.path.overflow_rows(mask))
            true, rounded = (gradients(inputs, dy, DL1, cast) for cast in (exact, rounding_to(x.dtype)))
            for name, gradient in grads.items():
                judge(f"gradient of {name}", gradient[index], true[name], rounded[name], x.dtype)

    def test_shard_map(self):
        """Tokens over the devices; ``all_reduce`` completes the statistics, shard_map the gradients."""
        devices = min(jax.device_count(), 4)
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

        def local(inputs):
            y, stats = call(inputs, self.path.options)
            return y, stats.all_reduce("data")

        names = ("x", "w_gate", "w_up", "w_down")
        specs = {name: P("data") if name == "x" else P() for name in names}
        self.check_transformed(
            jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(specs,),
                out_specs=(P("data"), P()),
                check_vma=self.path.check_vma,
            )
        )

    def test_pmap(self):
        """The data-parallel step: local gradients, summed over devices."""
        devices = min(jax.device_count(), 4)
        inputs, active = self.layer("uneven", 8)
        dy = cotangent(inputs)

        def local(inputs, dy):
            step = partial(differentiate, apply=partial(call, options=self.path.options))
            (y, stats), grads = step(inputs, dy, DL1 / devices)
            weights = {name: jax.lax.psum(grads[name], "data") for name in grads if name != "x"}
            return (y, stats.all_reduce("data")), weights | {"x": grads["x"]}

        axes = {name: 0 if name == "x" else None for name in inputs}
        step = jax.pmap(
            local, "data", in_axes=(axes, 0), out_axes=((0, None), axes), devices=jax.devices()[:devices]
        )

        def split(rows):
            return rows.reshape(devices, -1, rows.shape[-1])

        (y, stats), grads = run(step, inputs | {"x": split(inputs["x"])}, split(dy))
        whole = (y.reshape(dy.shape), stats), grads | {"x": grads["x"].reshape(dy.shape)}
        check_everything(whole, inputs, dy, active, self.path.overflow_rows(active))

    def check_transformed(self, apply: Callable[..., Any]) -> None:
        inputs, active = self.layer("uneven", 8)
        dy = cotangent(inputs)
        result = run(jax.jit(partial(differentiate, apply=apply)), inputs, dy, DL1)
        check_everything(result, inputs, dy, active, self.path.overflow_rows(active))


CASES = frozenset(name for name in vars(Contract) if name.startswith("test_"))
"""What every subclass must be seen to run."""
