"""Loss, statistics and gradients of several devices are those of one,
from a program that asks the host nothing.

Subclass `AcrossDevices` in a thin file, with the options and sizes of each format.
"""

import re
from functools import cache, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from op_checks import DL1, Path, call, cotangent, run

FORMATS = ("dense", "auto", "panel", "hybrid", "twell")
PATTERNS = ("few", "uneven")
"""What one compiled program is run on: tokens that fit every format, and tokens that overflow."""

_HOST_TRAFFIC = re.compile(
    r"\b(infeed|outfeed|send|send-done|recv|recv-done)\("  # instructions
    r"|is_host_transfer=true"
    r"|custom_call_target=\"[^\"]*(callback|host)[^\"]*\""
    r"|\{[^{}]*S\(5\)[^{}]*\}",  # a layout in the host's memory
    re.IGNORECASE,
)


def host_traffic(program: str) -> list[str]:
    """Lines of a compiled program's text that move anything to or from the host while it runs."""
    return [line.strip() for line in program.splitlines() if _HOST_TRAFFIC.search(line)]


def objective(options, inputs, dy, dl1):
    """``sum(dy * y) + dl1 * l1``; the same sum without signs, the scale of its rounding; the statistics."""
    y, stats = call(inputs, options)
    terms = y.astype(jnp.float32) * dy
    return jnp.sum(terms) + dl1 * stats.l1, (jnp.sum(jnp.abs(terms)) + dl1 * stats.l1, stats)


@cache
def on_one(options):
    """The same on one device, compiled once for all patterns and both ways of spreading tokens."""
    return jax.jit(
        lambda inputs, dy: jax.value_and_grad(partial(objective, options), has_aux=True)(inputs, dy, DL1)
    )


def pmapped(options, devices):
    """Each device differentiates its own tokens; weight gradients, loss and statistics are then summed."""

    def local(inputs, dy):
        differentiate = jax.value_and_grad(partial(objective, options), has_aux=True)
        (loss, (scale, stats)), grads = differentiate(inputs, dy, DL1 / len(devices))
        weights = {name: jax.lax.psum(grads[name], "data") for name in grads if name != "x"}
        loss, scale = jax.lax.psum((loss, scale), "data")
        return (loss, (scale, stats.all_reduce("data"))), weights | {"x": grads["x"]}

    axes = {"x": 0, "w_gate": None, "w_up": None, "w_down": None}
    return jax.pmap(local, "data", in_axes=(axes, 0), out_axes=(None, axes), devices=devices)


def sharded(options, devices, check_vma):
    """The gradient of a loss over tokens that a mesh shares, as one function to differentiate."""
    mesh = jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    split = {"x": P("data"), "w_gate": P(), "w_up": P(), "w_down": P()}

    def local(inputs, dy):
        loss, (scale, stats) = objective(options, inputs, dy, DL1 / len(devices))
        loss, scale = jax.lax.psum((loss, jax.lax.stop_gradient(scale)), "data")
        return loss, (scale, stats.all_reduce("data"))

    whole = jax.shard_map(
        local, mesh=mesh, in_specs=(split, P("data")), out_specs=(P(), P()), check_vma=check_vma
    )
    return jax.jit(jax.value_and_grad(whole, has_aux=True))


class AcrossDevices:
    """Every format on several devices, under ``pmap`` and under ``shard_map``, against one device."""

    paths: ClassVar[dict[str, Path]]
    tokens: ClassVar[int]

    @pytest.fixture
    def devices(self) -> list[jax.Device]:
        return jax.devices()[:4]

    @pytest.mark.parametrize("format", FORMATS)
    def test_pmap(self, format, devices):
        def split(values):
            return values.reshape(len(devices), -1, values.shape[-1])

        def shaped(inputs, dy):
            return inputs | {"x": split(inputs["x"])}, split(dy)

        self.check(self.paths[format], pmapped(self.paths[format].options, devices), shaped)

    @pytest.mark.parametrize("format", FORMATS)
    def test_shard_map(self, format, devices):
        path = self.paths[format]
        self.check(path, sharded(path.options, devices, path.check_vma), lambda *arguments: arguments)

    def check(self, path: Path, function: Any, shaped: Any) -> None:
        """One program, compiled ahead, for every pattern; its results alone are read, once it is done."""
        program = None
        for pattern in PATTERNS:
            inputs, _ = path.layer(pattern, self.tokens, path.dtype)
            dy = cotangent(inputs)
            arguments = shaped(inputs, dy)
            if program is None:
                program = run(lambda *a: [function.lower(*a).compile()], *arguments)[0]
                assert host_traffic(program.as_text()) == []
            arguments = jax.tree.map(jnp.asarray, arguments)
            with jax.transfer_guard_device_to_host("disallow_explicit"):
                result = jax.block_until_ready(program(*arguments))
            compare(result, run(on_one(path.options), inputs, dy), path.dtype)


def compare(found: Any, expected: Any, dtype: str) -> None:
    """Counts exactly; the loss and gradients but for sums in another order, each partial sum rounded once."""
    found, expected = jax.device_get((found, expected))
    ((loss, (_, stats)), grads), ((whole, (scale, counted)), gradients) = found, expected
    for name in ("neuron_hits", "max_nnz", "overflow_rows"):
        np.testing.assert_array_equal(getattr(stats, name), getattr(counted, name), err_msg=name)
    np.testing.assert_allclose(stats.l0, counted.l0, rtol=1e-6)
    ulp = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(stats.l1, counted.l1, rtol=2 * ulp)
    np.testing.assert_allclose(loss, whole, rtol=0, atol=4 * ulp * scale)
    assert grads.keys() == gradients.keys()
    for name, gradient in gradients.items():
        got, want = (np.asarray(g, np.float64).reshape(gradient.shape) for g in (grads[name], gradient))
        atol = (32 if dtype == "float32" else 4) * ulp * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=name)
