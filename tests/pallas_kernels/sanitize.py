"""A program for NVIDIA's compute-sanitizer: small TwELL calls, with rows that fit and rows that overflow.

Compiling under the sanitizer takes many times as long, so compile first, into a cache:

export JAX_COMPILATION_CACHE_DIR=$(mktemp -d) JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
python tests/pallas_kernels/sanitize.py
compute-sanitizer --tool memcheck  python tests/pallas_kernels/sanitize.py
compute-sanitizer --tool racecheck python tests/pallas_kernels/sanitize.py
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")  # each array its own: overruns are seen
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")

from functools import partial

import jax
import jax.numpy as jnp
from op_contract import Path, call, check_counts, check_values

from pallas_kernels import FFNOptions

CALLS = [
    # backend, tokens, D, F, tile, compression, type, kind
    ("triton", 1, 24, 40, 32, 4, "bfloat16", "gated"),
    ("triton", 33, 72, 200, 64, 4, "float32", "gated"),
    ("triton", 130, 136, 520, 256, 8, "bfloat16", "gated"),
    ("triton", 130, 136, 520, 128, 8, "float16", "non-gated"),
    ("mosaic_gpu", 136, 128, 520, 256, 8, "bfloat16", "gated"),
    ("mosaic_gpu", 64, 64, 264, 128, 4, "float16", "non-gated"),
]
PATTERNS = ("few", "uneven", "fully-dense", "all-zero")


def main() -> None:
    for backend, tokens, d_model, d_ff, tile, compression, dtype, kind in CALLS:
        options = FFNOptions("twell", backend, tile=tile, compression=compression)
        path = Path(options, d_model, d_ff, tokens)
        apply = jax.jit(partial(call, options=options))
        for pattern in PATTERNS:
            inputs, active = path.layer(pattern, tokens, dtype, kind)
            y, stats = jax.device_get(apply(jax.tree.map(jnp.asarray, inputs)))
            check_values(y, stats, inputs)
            check_counts(stats, active, path.overflow_rows(active))
    print(f"{len(CALLS) * len(PATTERNS)} calls, all as in float64, on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
