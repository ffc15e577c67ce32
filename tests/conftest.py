"""For every test: four simulated CPU devices, set before JAX starts; quick compiles there; GPU tests where there is one."""

import gc
import os
from importlib.metadata import version

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
        "--xla_gpu_autotune_level=0",  # on a GPU, autotuning the dense layers took most of the tests' time
        "--xla_allow_excess_precision=false",  # the dense layer rounds where the specification does
        "--xla_cpu_parallel_codegen_split_count=1",  # pytest's workers fill the cores, threads would only compete
        # Interpreted kernels compile in half the time without the fusion emitters, which 0.11 made obligatory.
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
    ]
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several pytest workers may share a GPU

import jax
import pytest


def pytest_collection_finish() -> None:
    """A test runs its programs once or twice on few numbers, so that on a CPU most of its time goes into XLA's compiler.

    Results on a GPU are those of the programs that users run, and so are their optimisations.
    """
    gc.freeze()  # JAX collects garbage often while it traces, and would go through all imported modules each time
    if jax.default_backend() == "cpu":
        jax.config.update("jax_disable_most_optimizations", True)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # for the processes that tests start


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
