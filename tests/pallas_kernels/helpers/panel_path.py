"""What the contract has to know of PanelELL: when a call that is differentiated finds no room."""

import dataclasses
from functools import partial

import jax
import numpy as np
from op_checks import DL1, Path, call, check_everything, cotangent, differentiate, run

from pallas_kernels import FFNOptions, Panel
from pallas_kernels.panel import config as configs
from pallas_kernels.panel.pallas_triton_lists import n_chunks


@dataclasses.dataclass(frozen=True)
class PanelPath(Path):
    """A `Path` whose capacity holds everything, unless a variant in the path's own type asks for less."""

    def overflow_rows(self, active: np.ndarray) -> int:
        tokens, d_ff = active.shape
        layout = self.options.layout
        if not isinstance(layout, Panel) or layout.capacity == 1 or tokens == 0:
            return 0
        x, w = (jax.ShapeDtypeStruct((n, self.d_model), self.dtype) for n in (tokens, d_ff))
        config = configs.choose(x, w, layout.tokens)
        chunk, panels = config.chunk, -(-tokens // config.panel)
        padded = np.pad(active, ((0, panels * config.panel - tokens), (0, 0)))
        unions = padded.reshape(panels, config.panel, d_ff).any(axis=1).sum(axis=1)
        room = max(1, round(n_chunks(panels, d_ff, chunk) * layout.capacity))
        return tokens if int((-(-unions // chunk)).sum()) > room else 0


def check_a_batch_of_which_one_has_no_room(options: FFNOptions, **sizes: int) -> None:
    """Under ``vmap`` both branches of a conditional run: neither may touch what is not its own."""
    path = PanelPath(options, many_tokens=0, dtype="bfloat16", **sizes)
    layers = [path.layer(pattern, path.tokens, path.dtype) for pattern in ("few", "fully-dense", "few")]
    overflowing = [path.overflow_rows(active) for _, active in layers]
    assert overflowing == [0, path.tokens, 0]
    batch = {name: np.stack([inputs[name] for inputs, _ in layers]) for name in layers[0][0]}
    dy = cotangent(batch)
    step = jax.vmap(partial(differentiate, apply=partial(call, options=options)), in_axes=(0, 0, None))
    results = run(jax.jit(step), batch, dy, DL1)
    for index, (inputs, active) in enumerate(layers):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], results)
        check_everything(one, inputs, dy[index], active, overflowing[index])
