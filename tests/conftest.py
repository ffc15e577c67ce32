"""For every test: four simulated CPU devices, set before JAX starts; GPU tests where there is one."""

import os

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
        "--xla_gpu_autotune_level=0",  # on a GPU, autotuning the dense layers took most of the tests' time
        "--xla_allow_excess_precision=false",  # the dense layer rounds where the specification does
    ]
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several pytest workers may share a GPU

import jax
import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
