"""Layers recorded from a model: one ``.npz`` file with what enters each feed-forward layer, and its weights.

The arrays are named ``LAYER/x`` (M, D), ``LAYER/w_gate`` (gated layers only), ``LAYER/w_up`` and
``LAYER/w_down``, each (F, D); ``dtype`` names their type. NumPy has no bfloat16: those stand as their 16
bits, in uint16.
"""

import dataclasses
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.shapes import FFNShape

_ARGUMENTS = ("x", "w_gate", "w_up", "w_down")
_DTYPES = ("bfloat16", "float16", "float32")


def save(path: Path, dtype: str, layers: Iterable[tuple[int, Mapping[str, np.ndarray]]]) -> None:
    """Writes layers, (number, arguments by name), one by one; the file appears when all are in it. A symbolic
    link stays one, and the file that it names is replaced.

    Raises:
      OSError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            _write(archive, "dtype", np.asarray(dtype))
            for layer, arguments in layers:
                for name, value in arguments.items():
                    stored = value.view(np.uint16) if dtype == "bfloat16" else value
                    _write(archive, f"{layer}/{name}", stored)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write(archive: zipfile.ZipFile, name: str, value: np.ndarray) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.asarray(value, order="C"), allow_pickle=False)


@dataclasses.dataclass(frozen=True)
class RecordedCase:
    """One recorded layer with its first ``tokens`` tokens, for a benchmark in place of a synthetic case."""

    file: str
    layer: int
    shape: FFNShape
    tokens: int
    dtype: str

    @property
    def source(self) -> str:
        return f"layers of {Path(self.file).name}"

    def arrays(self) -> dict[str, jax.Array]:
        """The layer's arguments: x (M, D) and weights (F, D).

        Raises:
          ValueError: the file no longer is what it was when it was listed.
        """
        with _opened(self.file) as archive:
            found = {
                name: archive[f"{self.layer}/{name}"]
                for name in _ARGUMENTS
                if f"{self.layer}/{name}" in archive
            }
        found["x"] = found["x"][: self.tokens]
        return {name: jnp.asarray(value.view(jnp.dtype(self.dtype))) for name, value in found.items()}

    def __str__(self) -> str:
        gated = "gated" if self.shape.gated else "non-gated"
        return (
            f"layer {self.layer} of {Path(self.file).name}, {self.tokens:,} tokens, D {self.shape.d_model}, "
            f"F {self.shape.d_ff}, {gated}, {self.dtype}"
        )


def cases(
    path: str | os.PathLike[str], *, layers: Iterable[int] = (), tokens: Iterable[int] = ()
) -> list[RecordedCase]:
    """The cases of a file: its layers, or those asked for, each at every number of tokens
    (by default, all of them).

    Raises:
      ValueError: it is no such file, or has not the layer or the tokens asked for.
    """
    file = os.fspath(path)
    with _opened(file) as archive:
        dtype = str(archive["dtype"])
        shapes = {name: _shape(archive, name) for name in archive.files if name != "dtype"}
    there = sorted({int(name.partition("/")[0]) for name in shapes})
    found = []
    for layer in list(layers) or there:
        if layer not in there:
            raise ValueError(f"{file} holds the layers {', '.join(map(str, there))}; got layer {layer}")
        (most, d_model), (d_ff, _) = shapes[f"{layer}/x"], shapes[f"{layer}/w_up"]
        shape = FFNShape(f"layer-{layer}", d_model, d_ff, f"{layer}/w_gate" in shapes)
        for count in list(tokens) or [most]:
            if not 1 <= count <= most:
                raise ValueError(
                    f"{file} holds {most:,} tokens of a layer; got {count:,}: ask for 1 to {most:,}"
                )
            found.append(RecordedCase(file, layer, shape, count, dtype))
    return found


def _opened(file: str) -> Any:
    """The archive, its names checked.

    Raises:
      ValueError: it is missing, or no file of recorded layers.
    """
    wanted = "a file that `sparse-lm layer-inputs` has written"
    if not os.path.isfile(file):
        raise ValueError(f"expected {wanted}; there is none at {file}")
    if not zipfile.is_zipfile(file):
        raise ValueError(f"expected {wanted}; {file} cannot be read as one")
    archive = np.load(file, allow_pickle=False)
    names = set(archive.files)
    layers = {name.partition("/")[0] for name in names - {"dtype"}}
    whole = all({f"{layer}/{name}" for name in ("x", "w_up", "w_down")} <= names for layer in layers)
    numbered = bool(layers) and all(layer.isdigit() for layer in layers)
    if numbered and whole and "dtype" in names and str(archive["dtype"]) in _DTYPES:
        return archive
    archive.close()
    raise ValueError(f"expected {wanted}; {file} holds other arrays: {', '.join(sorted(names)[:4])}")


def _shape(archive: Any, name: str) -> tuple[int, ...]:
    """An array's shape from its header alone."""
    with archive.zip.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return read(member)[0]
