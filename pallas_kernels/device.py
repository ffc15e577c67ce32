"""The only file that asks the device anything."""

import dataclasses

import jax
from jax.sharding import AbstractDevice

_SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
_CAPABILITY_OF_KIND = (
    ("H100", 90), ("H200", 90), ("GH200", 90), ("H800", 90), ("H20", 90),
    ("GB300", 103), ("B300", 103), ("GB200", 100), ("B200", 100), ("B100", 100),
    ("RTX PRO", 120), ("RTX 50", 120), ("A100", 80), ("A800", 80), ("A30", 80),
    ("L40", 89), ("L4", 89), ("RTX 40", 89), ("6000 Ada", 89),
    ("A10", 86), ("A40", 86), ("A16", 86), ("A6000", 86), ("RTX 30", 86),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Device:
    """What tile choices depend on.

    Attributes:
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      kind: the vendor's name, such as ``"NVIDIA H200"``.
      capability: CUDA compute capability times ten (90 for Hopper), or 0 where unknown.
      cores: streaming multiprocessors, or 0 where unknown.
    """

    platform: str
    kind: str
    capability: int
    cores: int

    @property
    def is_nvidia(self) -> bool:
        return self.platform == "gpu" and "NVIDIA" in self.kind

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one program may use."""
        return _SHARED_MEMORY.get(self.capability, 99) * 1024

    @property
    def table_name(self) -> str:
        """The device's folder in ``tuning/`` and ``results/``."""
        return self.kind.lower().replace(" ", "_")


def current() -> Device:
    """The device that a call traced now will run on: an abstract mesh's device if one is set,
    else the default."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if isinstance(abstract, AbstractDevice):
        return _describe(abstract.platform, abstract.device_kind, None, abstract.num_cores)
    chosen = getattr(jax.config, "jax_default_device", None)
    device = jax.devices(chosen if isinstance(chosen, str) else None)[0]
    device = chosen if isinstance(chosen, jax.Device) else device
    capability = getattr(device, "compute_capability", None)
    return _describe(device.platform, device.device_kind, capability, getattr(device, "core_count", None))


def _describe(platform: str, kind: str, capability: str | None, cores: int | None) -> Device:
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    if capability and capability.replace(".", "").isdigit():
        number = int(capability.replace(".", ""))
    else:
        number = next((number for name, number in _CAPABILITY_OF_KIND if name in kind), 0)
    return Device(platform, kind, number, cores or 0)
