"""For every test: four simulated CPU devices, set before JAX starts; GPU tests where there is one."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
        "--xla_gpu_autotune_level=0",  # on a GPU, autotuning the dense layers took most of the tests' time
        "--xla_allow_excess_precision=false",  # the dense layer rounds where the specification does
        "--xla_cpu_parallel_codegen_split_count=1",  # pytest's workers fill the cores
        # Interpreted kernels compile in less than half the time without XLA's MLIR fusion emitters. How to do
        # without them changed between versions, and 0.12 has no other emitters.
        {
            "0.10": "--xla_cpu_use_fusion_emitters=false",
            "0.11": "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        }.get(version("jaxlib")[:4], ""),
    ]
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several pytest workers may share a GPU

import jax
import pytest
from jaxtyping import install_import_hook

# Shapes in signatures are checked while tests run: of the specification, against which all else is judged.
install_import_hook("pallas_kernels.reference", "beartype.beartype")


def pytest_collection_finish() -> None:
    """Tests run a program once or twice on few numbers: on a CPU, compiling it took most of their time.

    On a GPU they are to see what users run, with every optimisation.
    """
    gc.freeze()  # each collection while JAX traces would go through all imported modules again
    if jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for the processes that tests start


_FILES_KEPT = 30
_files: set[Path] = set()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path not in _files and len(_files) == _FILES_KEPT:
        # Nobody calls those files' functions again: kept, their programs grow to 6 GB a worker. Not after
        # every file, for what is called outside of jit is compiled once for all.
        jax.clear_caches()
        _files.clear()
    _files.add(item.path)
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
