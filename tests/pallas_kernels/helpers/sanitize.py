"""A program for NVIDIA's compute-sanitizer: small calls and gradients,
with rows that fit and rows that overflow.

Names of formats as arguments run those alone.

Compiling under the sanitizer takes many times as long, so compile first, into a cache:

export PYTHONPATH=. JAX_COMPILATION_CACHE_DIR=$(mktemp -d) JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
python tests/pallas_kernels/helpers/sanitize.py
compute-sanitizer --tool memcheck  python tests/pallas_kernels/helpers/sanitize.py
compute-sanitizer --tool racecheck python tests/pallas_kernels/helpers/sanitize.py
"""

import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")  # each array its own: overruns are seen
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_allow_excess_precision=false")

import jax
import jax.numpy as jnp
from hybrid_path import HybridPath
from op_checks import DL1, Path, check_everything, compiled, compiled_forward, cotangent
from panel_path import PanelPath, check_a_batch_of_which_one_has_no_room
from step_parts import check_stream

from pallas_kernels import FFNOptions, Hybrid, Panel, Twell

CALLS = [
    # format, backend, tokens, D, F, tile, compression, type, kind
    ("twell", "triton", 1, 24, 40, 32, 4, "bfloat16", "gated"),
    ("twell", "triton", 33, 72, 200, 64, 4, "float32", "gated"),
    ("twell", "triton", 130, 136, 520, 256, 8, "bfloat16", "gated"),
    ("twell", "triton", 130, 136, 520, 128, 8, "float16", "non-gated"),
    ("twell", "mosaic_gpu", 136, 128, 520, 256, 8, "bfloat16", "gated"),
    ("twell", "mosaic_gpu", 64, 64, 264, 128, 4, "float16", "non-gated"),
    ("panel", "triton", 33, 72, 200, 64, 4, "float32", "gated"),
    ("panel", "triton", 130, 136, 520, 64, 4, "bfloat16", "gated"),
    ("panel", "mosaic_gpu", 136, 128, 520, 64, 4, "bfloat16", "gated"),
    ("panel", "mosaic_gpu", 264, 64, 264, 64, 4, "float16", "non-gated"),
    # More panels than the kernels for few of them take in a forward.
    ("panel", "mosaic_gpu", 8330, 64, 264, 64, 4, "bfloat16", "gated"),
    ("hybrid", "triton", 33, 72, 200, 64, 4, "float32", "gated"),
    ("hybrid", "triton", 130, 136, 520, 64, 4, "bfloat16", "non-gated"),
    ("hybrid", "triton", 136, 128, 520, 64, 4, "bfloat16", "gated"),
]
PATHS = {"twell": Path, "panel": PanelPath, "hybrid": HybridPath}
PATTERNS = ("few", "uneven", "fully-dense", "all-zero")


def main(formats: list[str]) -> None:
    calls = [call for call in CALLS if call[0] in formats]
    for format, backend, tokens, d_model, d_ff, tile, compression, dtype, kind in calls:
        layouts = {
            "twell": Twell(tile, compression),
            "panel": Panel(capacity=1.0),
            "hybrid": Hybrid(tile=tile),
        }
        options = FFNOptions(layouts[format], backend=backend)
        path = PATHS[format](options, d_model, d_ff, tokens, tile=tile, slots=tile // compression)
        for pattern in PATTERNS:
            inputs, active = path.layer(pattern, tokens, dtype, kind)
            dy = cotangent(inputs)
            jax.block_until_ready(compiled_forward(options)(inputs))
            result = jax.device_get(compiled(options)(jax.tree.map(jnp.asarray, inputs), dy, DL1))
            check_everything(result, inputs, dy, active, path.overflow_rows(active))
    if "panel" in formats:
        check_a_batch_of_which_one_has_no_room(
            FFNOptions(format="panel", backend="triton"), d_model=72, d_ff=1024, tokens=256
        )
    if "decode" in formats:
        for tokens in (2, 8, 20):
            check_stream(
                tokens, d_model=136, d_ff=520, dtype="bfloat16", gated=True, factor=1.0, interpret=False
            )
    print(f"{len(calls) * len(PATTERNS)} calls, all as in float64, on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main(sys.argv[1:] or [*PATHS, "decode"])
