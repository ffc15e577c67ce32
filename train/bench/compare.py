"""Do the sparse kernels train as the dense path does? ``sparse-lm compare`` trains with both.

All runs have the same seed and data. Two exact computations that sum in another order differ in their last
bits, and training makes more of the difference with every step, so two loss curves never agree exactly. How
far apart they may be is measured: dense controls are the same run with the neurons of every feed-forward
layer, the channels of the residual stream and the sequences of each batch in another order. That is the same
function of the same weights and data, and all that it changes is the order in which sums over neurons,
channels and tokens are taken.

    d(c)  = max over steps of |loss of c - mean loss of the controls|      for a sparse run c
    d(i)  = the same for control i against the mean of the other controls
    spread = the largest d(i)

A sparse curve lies within the spread if d(c) is at most the spread. One more dense run among ``n`` controls
would exceed it once in n + 1 times by chance, so a ratio little over 1 is no finding, and one of many times
over is.
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from pallas_kernels.errors import RequestError
from pallas_kernels.options import Format
from sparse_lm import ModelConfig
from train import parallel
from train.bench import synthetic
from train.config import DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from train.config_json import to_dict as config_to_dict
from train.data.batches import TrainBatches
from train.data.corpus import choose_tokenizer, open_corpus
from train.output import JsonFile, print_table
from train.state import Program, TrainState, build_program

_ROWS = 10


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Trains with sparse and with dense feed-forward layers, and says whether their loss curves agree.

    Attributes:
      config: the preset that gives every option below its default.
      formats: the sparse formats to train with.
      controls: dense runs, each summing in another order; at least 3.
      nnz: active neurons that each layer has for a token in the first step, on average; 0 starts with half
        of all, as ``train`` does.
      steps: optimizer steps of each run.
      batch_size: sequences of a step.
      seed: of the initial weights and of the data order.
      json: also write all curves to this file, run by run.
      debug: show the traceback of an error.
    """

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    steps: int
    batch_size: int
    config: str = "small"
    formats: tuple[Literal["auto", "panel", "hybrid", "twell"], ...] = ("auto", "panel", "hybrid")
    controls: int = 8
    nnz: float = 20.0
    seed: int = 0
    json: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        if not self.formats:
            raise RequestError("formats must name at least one; got none")
        if self.controls < 3:
            raise RequestError(f"controls must be at least 3, to have a spread; got {self.controls}")
        if not self.nnz >= 0:
            raise RequestError(f"nnz must be at least 0; got {self.nnz}")
        self.run_with("dense")

    @classmethod
    def of_preset(cls, name: str, config: TrainConfig) -> "CompareOptions":
        """The defaults that a preset gives."""
        return cls(config.model, config.data, config.optimizer, config.steps, config.batch_size, name)

    def run_with(self, format: Format) -> TrainConfig:
        """The run of one format; the dense ones take their tokens as they come."""
        backend = "auto" if format == "dense" else self.model.ffn.backend
        ffn = self.model.ffn.with_format(format, backend)
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            model=dataclasses.replace(
                self.model, ffn=ffn, token_order="text" if format == "dense" else self.model.token_order
            ),
            data=self.data,
            optimizer=self.optimizer,
        )


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run, a figure a step.

    Attributes:
      loss: CE and L1 term.
      l0: mean over layers of the active neurons per token.
      overflow_share: share of (token, layer) pairs that did not fit the format and were computed densely.
    """

    loss: tuple[float, ...]
    l0: tuple[float, ...]
    overflow_share: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Curves against each other, as the module's docstring has it.

    Attributes:
      deviations: d of every run, by name; controls are those whose names are in ``controls``.
      steps: the step, from 1, where each d is reached.
      spread: the largest d of a control.
    """

    controls: tuple[str, ...]
    deviations: dict[str, float]
    steps: dict[str, int]
    spread: float

    def within(self, name: str) -> bool:
        """Whether a run lies within the spread; never with a NaN in its curve."""
        return self.deviations[name] <= self.spread


def judge(curves: Mapping[str, Sequence[float]], controls: Sequence[str]) -> Verdict:
    """Compares loss curves of equal length; ``controls`` names at least two of them."""
    deviations, steps = {}, {}
    for name, curve in curves.items():
        others = np.mean([curves[other] for other in controls if other != name], axis=0)
        distances = np.abs(np.asarray(curve) - others)
        deviations[name], steps[name] = float(distances.max()), int(distances.argmax()) + 1
    return Verdict(tuple(controls), deviations, steps, max(deviations[name] for name in controls))


def run(options: CompareOptions, *, console: Console | None = None) -> tuple[dict[str, Curve], Verdict]:
    """Trains every run, prints curves and verdict, and writes the JSON file if one is asked for.

    Raises:
      UserError: the corpus or its tokenizer is bad, the batch does not divide, or the file cannot be written.
      RequestError: a format cannot run here, or the model cannot have so many active neurons.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    file = JsonFile(options.json)
    formats: list[Format] = ["dense", *options.formats]
    layout = parallel.Layout.over_all_devices(ParallelConfig())
    programs = {format: _program(options, format) for format in formats}
    parallel.check_batch(programs["dense"].config)
    batches = _batches(options)
    first = layout.place(batches[0])
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda program: layout.compiled_step(program, first), programs.values())
        steps = dict(zip(formats, compiled, strict=True))
    # Orders keep something beside the parameters, which are the same.
    inits = {
        order: layout.compile_init(build)
        for order, build in {build.config.model.token_order: build for build in programs.values()}.items()
    }
    refreshes = {format: layout.order_refresh(program) for format, program in programs.items()}
    reorder = jax.jit(reordered, donate_argnums=0)

    controls = tuple(f"dense {number}" for number in range(options.controls))
    curves: dict[str, Curve] = {}
    runs: list[tuple[str, Format]] = [(name, "dense") for name in controls]
    runs += [(format, format) for format in options.formats]
    for number, (name, format) in enumerate(runs):
        init = inits[programs[format].config.model.token_order]
        state, rows = init(), np.arange(options.batch_size)
        if 0 < number < len(controls):
            state = reorder(state, jax.random.key(number))
            rows = np.random.default_rng(number).permutation(rows)
        placed = (layout.place(batch[rows]) for batch in batches)
        curves[name] = _train(steps[format], refreshes[format], state, placed, options)
        console.print(f"{name}: loss {curves[name].loss[0]:.4f} to {curves[name].loss[-1]:.4f}", markup=False)
        file.write(to_dict(options, curves, None))
    verdict = judge({name: curve.loss for name, curve in curves.items()}, controls)
    file.write(to_dict(options, curves, verdict))
    for table in (curve_table(curves, verdict), verdict_table(options, curves, verdict)):
        print_table(console, table)
    for name in options.formats:
        where = "within" if verdict.within(name) else "outside"
        console.print(f"{name} lies {where} the spread of {len(controls)} dense runs", markup=False)
    return curves, verdict


def _program(options: CompareOptions, format: Format) -> Program:
    program = build_program(options.run_with(format))
    return synthetic.sparse_from_the_start(program, options.nnz) if options.nnz else program


def _batches(options: CompareOptions) -> list[np.ndarray]:
    """(B, S + 1) int32 of every step, the same for all runs."""
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory)
        tokenizer = choose_tokenizer(options.data, options.model.vocab_size, cache)
        batches = TrainBatches(
            open_corpus(options.data, tokenizer, cache),
            context_length=options.model.context_length,
            batch_size=options.batch_size,
            seed=options.seed,
        )
        return [batch["tokens"] for batch in itertools.islice(batches, options.steps)]


def reordered(state: TrainState, key: jax.Array) -> TrainState:
    """A first state with neurons and channels in an order drawn from ``key``: the same function of tokens."""
    for_channels, for_neurons = jax.random.split(key)
    layers, d_ff, d_model = state.params["blocks"]["ffn"]["w_up"].shape
    channels = jax.random.permutation(for_channels, d_model)
    neurons = jax.vmap(lambda key: jax.random.permutation(key, d_ff))(jax.random.split(for_neurons, layers))

    def reorder(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        if "ffn" in names:
            leaf = jnp.take_along_axis(leaf, neurons[:, :, None], axis=1)
        if "bias" in names:  # of queries, keys and values, which belong to heads
            return leaf
        # Queries, keys and values read the residual stream, by the axis before the last; all others
        # end in it.
        reads = {"query", "key", "value"} & set(names)
        return jnp.take(leaf, channels, axis=-2 if reads else -1)

    return dataclasses.replace(state, params=jax.tree_util.tree_map_with_path(reorder, state.params))


def _train(
    step: Callable[..., Any],
    refresh_order: parallel.OrderRefresh,
    state: Any,
    batches: Iterable[Any],
    options: CompareOptions,
) -> Curve:
    """All steps; nothing is read before the last has been started."""
    history = []
    for number, tokens in enumerate(batches, start=1):
        state, metrics = step(refresh_order(number, state, tokens), tokens)
        history.append({name: metrics[name] for name in ("loss", "l0", "overflow_rows")})
    history = jax.device_get(history)
    pairs = options.batch_size * options.model.context_length * options.model.num_layers
    return Curve(
        loss=tuple(float(metrics["loss"]) for metrics in history),
        l0=tuple(float(metrics["l0"]) for metrics in history),
        overflow_share=tuple(float(metrics["overflow_rows"]) / pairs for metrics in history),
    )


def curve_table(curves: Mapping[str, Curve], verdict: Verdict) -> Table:
    """For people: the losses of some steps, first and last among them."""
    controls = np.array([curves[name].loss for name in verdict.controls])
    sparse = [name for name in curves if name not in verdict.controls]
    table = Table(title="loss")
    for name in ("step", "dense, mean", "lowest to highest", *sparse):
        table.add_column(name, justify="right", no_wrap=True)
    for index in np.unique(np.linspace(0, controls.shape[1] - 1, _ROWS + 1).astype(int)):
        of_step = controls[:, index]
        table.add_row(
            str(index + 1),
            f"{of_step.mean():.4f}",
            f"{of_step.min():.4f} to {of_step.max():.4f}",
            *[f"{curves[name].loss[index]:.4f}" for name in sparse],
        )
    return table


def verdict_table(options: CompareOptions, curves: Mapping[str, Curve], verdict: Verdict) -> Table:
    """For people: how far each run is from the dense ones, and how sparse it was."""
    table = Table(
        title=f"{options.config}, {options.model.num_layers} layers, {options.steps} steps of "
        f"{options.batch_size} × {options.model.context_length} tokens, {jax.devices()[0].device_kind}, "
        f"JAX {jax.__version__}"
    )
    table.add_column("run", no_wrap=True)
    for name in ("deviation", "at step", "of spread", "l0", "overflow"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, curve in curves.items():
        deviation = verdict.deviations[name]
        table.add_row(
            name,
            f"{deviation:.5f}",
            str(verdict.steps[name]),
            f"{deviation / verdict.spread:.2f}" if verdict.spread else "",
            f"{curve.l0[0]:.1f} to {curve.l0[-1]:.1f}",
            f"{np.mean(curve.overflow_share):.1%}",
        )
    return table


def to_dict(options: CompareOptions, curves: Mapping[str, Curve], verdict: Verdict | None) -> dict[str, Any]:
    """Everything of a run, ready for JSON; no verdict while runs are missing."""
    judged = None
    if verdict is not None:
        within = {name: verdict.within(name) for name in options.formats}
        judged = dataclasses.asdict(verdict) | {"within": within}
    return {
        "options": config_to_dict(options),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "curves": {name: dataclasses.asdict(curve) for name, curve in curves.items()},
        "verdict": judged,
    }
