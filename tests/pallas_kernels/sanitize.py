"""A program for NVIDIA's compute-sanitizer: small TwELL calls, with rows that fit and rows that overflow.

compute-sanitizer --tool memcheck  python tests/pallas_kernels/sanitize.py
compute-sanitizer --tool racecheck python tests/pallas_kernels/sanitize.py
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")  # each array its own: overruns are seen
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")

from itertools import product

import jax
import jax.numpy as jnp
from op_contract import Path, call, check_counts, check_values

from pallas_kernels import FFNOptions

SIZES = [(1, 24, 40), (33, 72, 200), (130, 136, 520)]
GEOMETRIES = [(32, 4), (64, 4), (256, 8)]


def main() -> None:
    calls = 0
    for sizes, geometry, dtype, kind in product(
        SIZES, GEOMETRIES, ("bfloat16", "float32"), ("gated", "non-gated")
    ):
        tokens, d_model, d_ff = sizes
        tile, compression = geometry
        options = FFNOptions(format="twell", backend="triton", tile=tile, compression=compression)
        path = Path(options, d_model, d_ff, tokens)
        for pattern in ("few", "uneven", "fully-dense", "all-zero"):
            inputs, active = path.layer(pattern, tokens, dtype, kind)
            with jax.default_matmul_precision("highest" if dtype == "float32" else None):
                y, stats = jax.device_get(call(jax.tree.map(jnp.asarray, inputs), options))
            check_values(y, stats, inputs)
            check_counts(stats, active, path.overflow_rows(active))
            calls += 1
    print(f"{calls} calls, all as in float64, on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
