"""What runs of a sweep compile, kept for the next of them and for the next start."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def compiling_once(directory: Path) -> Iterator[None]:
    """Keeps compiled programs in ``directory``, unless the process has a cache of its own."""
    wanted = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    if before["jax_compilation_cache_dir"] is not None:
        yield
        return
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it reads its directory once
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
