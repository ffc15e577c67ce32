"""Programs that a process with a GPU traces, and that run elsewhere."""

from collections.abc import Callable
from typing import Any

from jax import lax


def where_kernels_run(kernels: Callable[..., Any], instead: Callable[..., Any], backend: str, *arguments):
    """``kernels`` where the program is lowered for CUDA, ``instead`` for any other platform: the process
    that traces a call may have a GPU and run it on a CPU all the same."""
    if backend == "interpret":
        return kernels(*arguments)
    return lax.platform_dependent(*arguments, cuda=kernels, default=instead)
