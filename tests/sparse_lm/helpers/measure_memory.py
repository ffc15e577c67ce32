"""Host memory of converting a large directory: ``python measure_memory.py [GB [SHARDS]]``.

Makes a Llama of so many GB in bfloat16, in one file or several, converts it there and back, each in a process
of its own, and prints the most memory that the conversion held beside what the imports alone take.
"""

import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from sparse_lm.convert import leaves, open_hf, open_own, write_hf, write_own
from sparse_lm.convert.families import family_from_hf

FIELDS: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "relu",
    "vocab_size": 49_152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
LAYER_BYTES = 2 * (4 * 2048 * 2048 + 3 * 2048 * 5632)
TABLES_BYTES = 2 * 2 * 49_152 * 2048


def measure(fields: dict[str, Any], shards: int) -> dict[str, tuple[int, int]]:
    """For the way ``"to ours"`` and ``"back"``: most bytes of memory, and of the largest file that is read on
    the way there and written on the way back.

    Args:
      fields: of the model's ``config.json``.
      shards: files that the model is in.
    """
    with tempfile.TemporaryDirectory() as root:
        source, ours, again = (Path(root) / name for name in ("source", "ours", "again"))
        for directory in (source, ours, again):
            directory.mkdir()
        _make(source, fields, shards)
        return {
            "to ours": (_in_a_process(_there, source, ours), _largest(source)),
            "back": (_in_a_process(_back, source, ours, again), _largest(again)),
        }


def _make(directory: Path, fields: dict[str, Any], shards: int) -> None:
    (directory / "config.json").write_text(json.dumps(fields))
    config = family_from_hf(fields).config(fields)
    names = [(leaf, layer) for leaf in leaves(config) for layer in leaf.layers(config)]
    places = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {leaf.hf(n): np.ones(leaf.hf_shape, ml_dtypes.bfloat16) for leaf, n in names[number::shards]}
        save_file(part, directory / name)
        places |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def _there(source: Path, out: Path) -> None:
    with open_hf(source) as weights:
        write_own(weights, out)


def _back(source: Path, ours: Path, out: Path) -> None:
    with open_hf(source) as weights:
        config = weights.config
    with open_own(ours, config) as weights:
        write_hf(weights, out)


def _in_a_process(convert: Any, *directories: Path) -> int:
    """Bytes that a conversion adds at most to what its process held before."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_measured, args=(results, convert, *directories))
    process.start()
    used = results.get(timeout=600)
    process.join()
    return used


def _measured(results: Any, convert: Any, *directories: Path) -> None:
    before = _status("VmRSS")
    convert(*directories)
    results.put(_status("VmHWM") - before)


def _status(field: str) -> int:
    """Bytes that Linux counts for this process: resident now (VmRSS), or at its largest (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _largest(directory: Path) -> int:
    return max(path.stat().st_size for path in directory.glob("*.safetensors"))


def main(gigabytes: float = 2.0, shards: float = 1) -> None:
    layers = max(1, round((gigabytes * 1e9 - TABLES_BYTES) / LAYER_BYTES))
    for name, (used, largest) in measure(FIELDS | {"num_hidden_layers": layers}, int(shards)).items():
        print(
            f"{name}: {used / 1e6:,.0f} MB, {used / largest:.2f} of the largest file, {largest / 1e6:,.0f} MB"
        )


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
