"""What a figure was taken on: the record of device and versions that stands in every result file."""

import dataclasses
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from pallas_kernels import device

_PACKAGES = ("jax", "jaxlib", "sparse-lm")


def record() -> dict[str, Any]:
    """Device, how many of them, and versions, ready for JSON.

    Keys: ``device`` (fields of `pallas_kernels.device.Device`), ``devices``, ``versions`` of Python, the
    packages and, as ``platform``, of what drives the device (CUDA's, for one).
    """
    versions = {name: found for name in _PACKAGES if (found := _version(name))}
    return {
        "device": dataclasses.asdict(device.current()),
        "devices": jax.device_count(),
        "versions": {"python": platform.python_version(), **versions}
        | {"platform": jax.devices()[0].client.platform_version},
    }


def title() -> str:
    """The device and JAX's version in a few words."""
    return f"{device.current().kind}, JAX {jax.__version__}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
