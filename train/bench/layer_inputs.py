"""What enters each feed-forward layer of a trained model on its held-out text, saved for
the kernels' benchmark."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.table import Table

from pallas_kernels.bench import recorded
from pallas_kernels.bench.inputs import measure
from sparse_lm import SparseLM
from sparse_lm.config import SILU
from train.data.holdout import TextChoice
from train.errors import UserError
from train.heldout import check_sequence_fits, read_heldout, sequences_of
from train.run.checkpoint_reading import load_for_inference

_TOKENS_AT_ONCE = 16384


@dataclasses.dataclass(frozen=True)
class LayerFigures:
    """What one layer's input was found to be: `pallas_kernels.inputs.measure` of its tokens."""

    layer: int
    figures: dict[str, float]


def save_layer_inputs(
    checkpoint: str | Path, out: str | Path, *, tokens: int | None = None, layers: Sequence[int] = ()
) -> tuple[int, list[LayerFigures]]:
    """Runs a checkpoint over its held-out text and writes each layer's input and weights to a file.

    Args:
      checkpoint: a run's workdir or one step's directory.
      out: the file, in the form of `pallas_kernels.recorded`; it appears when it is whole.
      tokens: at most so many, in whole sequences (default: 65,536 or as many as the held-out text has).
      layers: which layers; all by default.

    Returns:
      How many tokens were saved of each layer, and what they were found to be.

    Raises:
      UserError: no such checkpoint or layer, the corpus is gone, no room for one sequence, or no place
        for the file.
    """
    out = Path(out)
    if out.suffix != ".npz":
        raise UserError(f"--out must end with .npz; got {out}")
    model, tokenizer, config, _ = load_for_inference(checkpoint)
    if config.model.activation == SILU:
        raise UserError(f"checkpoint must be of a model with silent neurons; this one's activation is {SILU}")
    length, count = config.model.context_length, config.model.num_layers
    wanted = sorted(set(layers)) or list(range(count))
    if wanted[0] < 0 or wanted[-1] >= count:
        raise UserError(
            f"layers must be from 0 to {count - 1}, which the model has; got {', '.join(map(str, wanted))}"
        )
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out must name a file in a directory that is there; {out.parent} is none")
    most = 65536 if tokens is None else tokens
    check_sequence_fits(most, config)
    text, _ = read_heldout(checkpoint, config, tokenizer, TextChoice(), tokens=most)
    sequences = sequences_of(text, context_length=length, tokens=most)
    states = _entering(model, sequences, wanted)
    found: list[LayerFigures] = []

    def arguments() -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for layer, x in zip(wanted, states, strict=True):
            weights = _weights(model, layer)
            gate = weights.get("w_gate", weights["w_up"])
            found.append(LayerFigures(layer, measure(jnp.asarray(x), jnp.asarray(gate))))
            yield layer, {"x": x, **weights}

    try:
        recorded.save(out, config.model.dtype, arguments())
    except OSError as error:
        raise UserError(f"--out must name a file that can be written; {out}: {error.strerror}") from error
    return sequences.size, found


def _entering(model: SparseLM, sequences: np.ndarray, layers: Sequence[int]) -> list[np.ndarray]:
    """For each of some layers what its feed-forward part is given for tokens (N, S):
    (N S, D) in the compute type."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state).ffn_inputs(tokens)[jnp.asarray(layers)])
    rows = max(1, _TOKENS_AT_ONCE // sequences.shape[1])
    parts = [
        jax.device_get(run(state, jnp.asarray(sequences[first : first + rows])))
        for first in range(0, len(sequences), rows)
    ]
    return [
        np.concatenate([part[nth].reshape(-1, part.shape[-1]) for part in parts])
        for nth in range(len(layers))
    ]


def _weights(model: SparseLM, layer: int) -> dict[str, np.ndarray]:
    """The layer's weights (F, D) by name, rounded to the compute type as its call rounds them."""
    ffn = model.blocks.ffn
    parameters: dict[str, Any] = {"w_gate": ffn.w_gate, "w_up": ffn.w_up, "w_down": ffn.w_down}
    return {
        name: np.asarray(parameter[...][layer].astype(ffn.dtype))
        for name, parameter in parameters.items()
        if parameter is not None
    }


def table(found: Sequence[LayerFigures]) -> Table:
    """For people: a row a layer."""
    columns = {
        "mean nnz": ("mean_nnz", "{:.1f}"),
        "p99": ("p99_nnz", "{:.0f}"),
        "max": ("max_nnz", "{:.0f}"),
        "silent": ("dead_fraction", "{:.1%}"),
        "in 32 tokens": ("union_32", "{:.0f}"),
        "in 128 tokens": ("union_128", "{:.0f}"),
    }
    rows = Table()
    for name in ("layer", *columns):
        rows.add_column(name, justify="right")
    for each in found:
        values = [form.format(each.figures[key]) for key, form in columns.values()]
        rows.add_row(str(each.layer), *values)
    return rows
