"""Four simulated CPU devices give what one gives; the inspection of programs sees what it looks for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from across_devices import FORMATS, AcrossDevices, host_traffic
from op_checks import Path

from pallas_kernels import Auto, FFNOptions, Hybrid, Panel, Twell

LAYOUTS = {
    "dense": "dense",
    "auto": Auto(tokens=16),
    "panel": Panel(tokens=16, capacity=1.0),
    "hybrid": Hybrid(tile=32, width=30),
    "twell": Twell(tile=32, compression=4),
}


def _path(format):
    backend = "xla" if format == "dense" else "interpret"
    options = FFNOptions(LAYOUTS[format], backend=backend)
    # Pallas' interpreter mixes its own arrays with varying ones.
    return Path(options, d_model=40, d_ff=72, many_tokens=64, check_vma=False)


class TestSimulatedDevices(AcrossDevices):
    paths = {format: _path(format) for format in FORMATS}  # noqa: RUF012 - as the base class declares it
    tokens = 64

    def test_there_are_four(self, devices):
        assert len(devices) == 4


def _calls_back(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def _prints(x):
    jax.debug.print("{}", x[0])
    return x + 1


@pytest.mark.parametrize("function", [_calls_back, _prints])
def test_the_inspection_sees_a_call_to_the_host(function):
    program = jax.jit(function).lower(jnp.ones(3)).compile()
    assert host_traffic(program.as_text())


@pytest.mark.parametrize(
    "line",
    [
        "  %i = ((f32[3]), token[]) infeed(token[] %t)",
        "  ROOT %o = token[] outfeed(f32[3] %x, token[] %t)",
        "  %s = (f32[3], u32[], token[]) send(f32[3] %x, token[] %t), channel_id=1, is_host_transfer=true",
        '  %c = f32[3] custom-call(f32[3] %x), custom_call_target="MoveToHost"',
        "  %h = f32[3]{0:S(5)} copy(f32[3]{0} %x)",
    ],
)
def test_the_inspection_sees_a_transfer(line):
    assert host_traffic("ENTRY %main {\n  %y = f32[3]{0} add(f32[3] %a, f32[3] %b)\n" + line) == [
        line.strip()
    ]
