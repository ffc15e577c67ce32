"""What a finished row is found to be: its held-out figures, dead neurons, and the unions of its panels."""

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import reference
from sparse_lm import SparseLM, clusters, order
from train.config import TrainConfig
from train.data.batches import heldout_batches
from train.data.corpus import choose_tokenizer, open_corpus
from train.run import metrics
from train.run.checkpoint_reading import load_for_inference

PANEL = 128  # tokens
_UNION_TOKENS = 2 * 65_536  # a half of them is counted
_FIT_ROUNDS = 12


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of a run after its last step, from its metrics file.

    Attributes:
      ce: held-out cross-entropy in nats a token; ``bits_per_byte``, the same a byte of UTF-8.
      evaluated_tokens: held-out tokens.
      l0_per_layer, max_nnz_per_layer: active neurons of a held-out token, on average and at most.
      dead_per_layer: share of neurons that were silent for so long that they count as dead.
      tokens_per_second: of training, the median of the progress lines of its second half; None if it had
        none.
    """

    ce: float
    bits_per_byte: float
    evaluated_tokens: int
    l0_per_layer: tuple[float, ...]
    max_nnz_per_layer: tuple[int, ...]
    dead_per_layer: tuple[float, ...]
    tokens_per_second: float | None

    @property
    def nnz(self) -> float:
        """Mean over layers."""
        return statistics.mean(self.l0_per_layer)

    @property
    def dead(self) -> float:
        """Mean over layers."""
        return statistics.mean(self.dead_per_layer)


def read_quality(workdir: Path, *, d_ff: int) -> Quality:
    """The figures of a finished run."""
    lines = (workdir / metrics.FILE_NAME).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    evaluation = [record["evaluation"] for record in records if "evaluation" in record][-1]
    steps = [record for record in records if "dead_per_layer" in record]
    rates = [r["tokens_per_second"] for r in steps[len(steps) // 2 :] if "tokens_per_second" in r]
    return Quality(
        ce=evaluation["ce"],
        bits_per_byte=evaluation["bits_per_byte"],
        evaluated_tokens=evaluation["tokens"],
        l0_per_layer=tuple(evaluation["l0_per_layer"]),
        max_nnz_per_layer=tuple(evaluation["max_nnz_per_layer"]),
        dead_per_layer=tuple(count / d_ff for count in steps[-1]["dead_per_layer"]),
        tokens_per_second=statistics.median(rates) if rates else None,
    )


class HeldoutText:
    """Held-out text of runs that share their corpus and a cache, which is filled where no run has yet.

    Args:
      config: any of the runs.
      cache: of `train.run.loop.run`.
      say: told what takes time.

    Attributes:
      sequences: (N, C + 1) int32, different windows.

    Raises:
      UserError: the corpus is missing or bad.
    """

    def __init__(
        self, config: TrainConfig, cache: Path, *, say: Callable[[str], None] = lambda sentence: None
    ) -> None:
        data, model = config.data.absolute(), config.model
        tokenizer = choose_tokenizer(data, model.vocab_size, cache, say=say)
        corpus = open_corpus(data, tokenizer, cache, say=say)
        batches = heldout_batches(
            corpus.heldout, corpus.weights,
            context_length=model.context_length, tokens=_UNION_TOKENS, batch_size=1,
        )  # fmt: skip
        self.sequences = np.concatenate([batch["tokens"] for batch in batches])

    def batch(self, rows: int) -> np.ndarray:
        """(rows, C + 1) int32: the same windows again where there are too few."""
        return np.resize(self.sequences, (rows, self.sequences.shape[1]))


@dataclasses.dataclass(frozen=True)
class Unions:
    """How many neurons a panel of tokens, `PANEL` unless said, activates together: what it costs.

    Attributes:
      tokens: held-out tokens that were put in order and cut into panels.
      text: mean over panels by layer, tokens in the order of the text.
      alike: the same, tokens in the order of clusters of what enters the first layer, then of their ids.
    """

    tokens: int
    text: tuple[float, ...]
    alike: tuple[float, ...]


def unions_of_run(workdir: Path, text: HeldoutText) -> Unions:
    """The unions of a run's newest checkpoint."""
    return count_unions(load_for_inference(workdir)[0], text.sequences[:, :-1])


def count_unions(model: SparseLM, sequences: np.ndarray, panel: int = PANEL) -> Unions:
    """Counts on half of the sequences (N, C) int32; the clusters are fitted to the other half, where there
    is one."""
    measured, others = np.split(sequences, [-(-len(sequences) // 2)])
    graphdef, state = nnx.split(model)
    fit = others if len(others) else measured
    text, alike = _unions(graphdef, state, jnp.asarray(measured), jnp.asarray(fit), panel)
    return Unions(measured.size, _numbers(text), _numbers(alike))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _unions(
    graphdef: Any, state: Any, tokens: jax.Array, fit: jax.Array, panel: int
) -> tuple[jax.Array, jax.Array]:
    """Mean unions by layer (L,) f32, in the text's order and in that of the clusters."""
    model: SparseLM = nnx.merge(graphdef, state)
    config = model.config
    rule = config.ffn_options.rule
    start = jnp.zeros((config.token_clusters, config.d_model)), jnp.zeros(config.token_clusters)
    centroids, _ = clusters.follow(*start, model.first_ffn_input(fit), rounds=_FIT_ROUNDS)
    entering = model.first_ffn_input(tokens)
    places = order.by_centroids(entering, centroids, tokens, vocab_size=config.vocab_size).order.reshape(-1)
    block_graphdef, blocks = nnx.split(model.blocks)

    def of_layer(inputs):
        layer, stream = inputs
        block: Any = nnx.merge(block_graphdef, layer)
        x = block.ffn_norm(stream).reshape(-1, config.d_model)
        gate = block.ffn.w_up if block.ffn.w_gate is None else block.ffn.w_gate
        mask = rule.active(reference.project(x, gate[...].astype(x.dtype)))
        return _mean_union(mask, panel), _mean_union(mask[places], panel)

    return jax.lax.map(of_layer, (blocks, model.residual_streams(tokens)))


def _mean_union(mask: jax.Array, panel: int) -> jax.Array:
    """() f32, of a mask (M, F) bool: over all whole panels, or over one of all tokens if they make none."""
    panel = min(panel, len(mask))
    whole = mask[: len(mask) // panel * panel].reshape(-1, panel, mask.shape[1])
    return jnp.mean(jnp.sum(jnp.any(whole, axis=1), axis=1, dtype=jnp.float32))


def _numbers(values: Sequence[Any] | jax.Array) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
