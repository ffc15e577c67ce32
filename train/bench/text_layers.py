"""A trained model's feed-forward layers and what enters them on held-out text, in the device's memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import reference
from pallas_kernels.activations import Rule
from sparse_lm.model import Block
from train.data.holdout import TextChoice
from train.heldout import check_sequence_fits, read_heldout, sequences_of
from train.run.checkpoint_reading import load_for_inference

_AT_ONCE = 16384


class TextLayers:
    """A checkpoint on its held-out text.

    Args:
      checkpoint: a run's workdir, one step's directory, or a converted model.
      tokens: most tokens, in whole sequences.
      more: so many further tokens of other held-out text, as far as there is any, for what is fitted.
      text: which text.
      on_progress: told how many tokens the model has read, and of how many.

    Attributes:
      model: the checkpoint's; ``config`` and ``tokenizer``, likewise.
      step: optimizer steps behind it.
      tokens: (M,) int32, whole sequences of S tokens, one after the other.
      notes: sentences on what the text is, where that is not what training held out.
      fit_on_other_text: whether there was any; what is fitted then is fitted to the same text.

    Raises:
      UserError: no such checkpoint, the corpus is gone, or ``tokens`` is less than a sequence.
    """

    def __init__(
        self,
        checkpoint: str,
        tokens: int,
        more: int,
        *,
        text: TextChoice = TextChoice(),  # noqa: B008 - frozen
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.model, self.tokenizer, self.config, self.step = load_for_inference(checkpoint)
        self._rule = self.config.model.ffn_options.rule
        check_sequence_fits(tokens, self.config)
        length = self.config.model.context_length
        found, self.notes = read_heldout(checkpoint, self.config, self.tokenizer, text, tokens=tokens + more)
        sequences = sequences_of(found, context_length=length, tokens=tokens + more)
        # Of a mixture both parts get sequences of every corpus.
        sequences = np.random.default_rng(0).permutation(sequences)
        measured, others = np.split(sequences, [tokens // length])
        self.fit_on_other_text = len(others) > 0
        self.tokens = jnp.asarray(measured.reshape(-1))
        self._blocks = [self._block(layer) for layer in range(self.config.model.num_layers)]
        total, read = sequences.size, 0

        def part_done(tokens: int) -> None:
            nonlocal read
            read += tokens
            on_progress(read, total)

        self._streams = self._run(measured, part_done)
        self._fit_streams = self._run(others, part_done) if len(others) else self._streams

    @property
    def num_layers(self) -> int:
        return len(self._blocks)

    def block(self, layer: int) -> Block:
        """One layer, its feed-forward weights rounded to the compute type as its call rounds them."""
        return self._blocks[layer]

    def stream(self, layer: int) -> jax.Array:
        """The residual stream that the layer's feed-forward norm reads: (M, D) in the compute type."""
        return self._streams[layer]

    def entering(self, layer: int, *, fit: bool = False) -> jax.Array:
        """What the layer's feed-forward part is given: (M, D) in the compute type; or that of the text for
        what is fitted."""
        return self._blocks[layer].ffn_norm((self._fit_streams if fit else self._streams)[layer])

    def active(self, layer: int, x: jax.Array) -> jax.Array:
        """(M, F) bool: the neurons that inputs x (M, D) of a layer activate."""
        ffn = self._blocks[layer].ffn
        gate = ffn.w_up if ffn.w_gate is None else ffn.w_gate
        return _active(x, gate[...], self._rule)

    def _run(self, sequences: np.ndarray, part_done: Callable[[int], None]) -> list[jax.Array]:
        graphdef, state = nnx.split(self.model)
        run = jax.jit(lambda state, tokens: nnx.merge(graphdef, state).residual_streams(tokens))
        rows = max(1, _AT_ONCE // sequences.shape[1])
        parts = []
        for at in range(0, len(sequences), rows):
            part = sequences[at : at + rows]
            parts.append(jax.block_until_ready(run(state, jnp.asarray(part))))
            part_done(part.size)
        return [
            jnp.concatenate([part[layer].reshape(-1, part.shape[-1]) for part in parts])
            for layer in range(self.num_layers)
        ]

    def _block(self, layer: int) -> Block:
        graphdef, state = nnx.split(self.model.blocks)
        block: Any = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[layer], state))
        ffn_graphdef, weights = nnx.split(block.ffn)
        block.ffn = nnx.merge(ffn_graphdef, jax.tree.map(lambda w: w.astype(block.ffn.dtype), weights))
        return block


@partial(jax.jit, static_argnames="rule")
def _active(x: jax.Array, gate: jax.Array, rule: Rule) -> jax.Array:
    return rule.active(reference.project(x, gate))
