"""Host memory of converting a large directory: ``python measure_memory.py [GB [SHARDS]]``.

Makes a Llama of so many GB in bfloat16, in one file or several, converts it there and back, each in a process
of its own, and prints the most memory that the conversion held beside what the imports alone take.
"""

import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from sparse_lm.convert import leaves, open_hf, open_own, write_hf, write_own
from sparse_lm.convert.families import family_from_hf

FIELDS = {
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


def make(directory: Path, size: float, shards: int) -> None:
    """A model of about ``size`` bytes in ``shards`` files."""
    outer = 2 * 2 * FIELDS["vocab_size"] * FIELDS["hidden_size"]
    fields = FIELDS | {"num_hidden_layers": max(1, round((size - outer) / LAYER_BYTES))}
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


def peak() -> float:
    """MB of this process's largest resident set so far (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6


def there(source: str, out: str, results: "multiprocessing.Queue[float]") -> None:
    before = peak()
    with open_hf(source) as weights:
        write_own(weights, Path(out))
    results.put(peak() - before)


def back(source: str, ours: str, out: str, results: "multiprocessing.Queue[float]") -> None:
    before = peak()
    with open_hf(source) as weights:
        config = weights.config
    with open_own(ours, config) as weights:
        write_hf(weights, Path(out))
    results.put(peak() - before)


def main(size: float = 2.0, shards: int = 1) -> None:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as root:
        source, ours, again = (Path(root) / name for name in ("source", "ours", "again"))
        for directory in (source, ours, again):
            directory.mkdir()
        make(source, size * 1e9, int(shards))
        for name, target, arguments in (
            ("to ours", there, (str(source), str(ours))),
            ("back", back, (str(source), str(ours), str(again))),
        ):
            results = context.Queue()
            process = context.Process(target=target, args=(*arguments, results))
            process.start()
            used = results.get()
            process.join()
            into = ours if target is there else again
            largest = max(
                path.stat().st_size / 1e6
                for directory in (source if target is there else into,)
                for path in directory.glob("*.safetensors")
            )
            print(f"{name}: {used:,.0f} MB, {used / largest:.2f} of the largest file ({largest:,.0f} MB)")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
