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

What a training may choose besides the format is compared in the same way: the order in which layers take
their tokens, and a plan that changes the formats of layers on the way (`train.bench.compare_runs`).
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from pallas_kernels.errors import RequestError
from sparse_lm import ModelConfig
from train import parallel
from train.bench.compare_runs import Contestant, Curve, Run, Trainer, config_of
from train.config import DataConfig, OptimizerConfig, ParallelConfig, TrainConfig
from train.config_json import to_dict as config_to_dict
from train.data.batches import TrainBatches
from train.data.corpus import choose_tokenizer, open_corpus
from train.output import JsonFile, print_table
from train.state import TrainState

_ROWS = 10


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Trains with sparse and with dense feed-forward layers, and says whether their loss curves agree.

    Attributes:
      config: the preset that gives every option below its default.
      formats: what to train with: sparse formats; ``order``, the model's own format on tokens in the order of
        ``model.token-order``, or in that of ``centroids`` where this is ``text``; ``plan``, the formats that
        a training run gives to each layer and changes on the way.
      controls: dense runs, each summing in another order; at least 3.
      nnz: active neurons that each layer has for a token in the first step, on average; 0 starts with half
        of all, as ``train`` does.
      steps: optimizer steps of each run.
      batch_size: sequences of a step.
      seed: of the initial weights and of the data order.
      plan_every: steps over which is averaged what ``plan`` is chosen by.
      json: also write all curves to this file, run by run.
      debug: show the traceback of an error.
    """

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    steps: int
    batch_size: int
    config: str = "small"
    formats: tuple[Contestant, ...] = ("auto", "panel", "hybrid")
    controls: int = 8
    nnz: float = 20.0
    seed: int = 0
    plan_every: int = 20
    json: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        if not self.formats:
            raise RequestError("formats must name at least one; got none")
        if self.controls < 3:
            raise RequestError(f"controls must be at least 3, to have a spread; got {self.controls}")
        if not self.nnz >= 0:
            raise RequestError(f"nnz must be at least 0; got {self.nnz}")
        config_of("dense", self.base)

    @classmethod
    def of_preset(cls, name: str, config: TrainConfig) -> "CompareOptions":
        """The defaults that a preset gives."""
        return cls(
            config.model, config.data, config.optimizer, config.steps, config.batch_size, name,
            plan_every=config.plan_every,
        )  # fmt: skip

    @property
    def base(self) -> TrainConfig:
        """What all runs have in common."""
        return TrainConfig(
            steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            plan_every=self.plan_every,
            model=self.model,
            data=self.data,
            optimizer=self.optimizer,
        )


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
    layout = parallel.Layout.over_all_devices(ParallelConfig())
    parallel.check_batch(options.base)
    contestants: list[Run] = ["dense", *options.formats]
    trainers = {name: Trainer.of(name, options.base, options.nnz, layout) for name in contestants}
    batches = _batches(options)
    first = layout.place(batches[0])
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda trainer: trainer.compiled_step(first), trainers.values())
        steps = dict(zip(trainers, compiled, strict=True))
    # Orders keep something beside the parameters, which are the same.
    programs = {trainer.kept_order: trainer.program for trainer in trainers.values()}
    inits = {order: layout.compile_init(program) for order, program in programs.items()}
    reorder = jax.jit(reordered, donate_argnums=0)

    controls = tuple(f"dense {number}" for number in range(options.controls))
    curves: dict[str, Curve] = {}
    runs: list[tuple[str, Run]] = [(name, "dense") for name in controls]
    runs += [(name, name) for name in options.formats]
    for number, (name, contestant) in enumerate(runs):
        trainer = trainers[contestant]
        state, rows = inits[trainer.kept_order](), np.arange(options.batch_size)
        if 0 < number < len(controls):
            state = reorder(state, jax.random.key(number))
            rows = np.random.default_rng(number).permutation(rows)
        placed = (layout.place(batch[rows]) for batch in batches)
        say = partial(console.print, markup=False)
        curves[name] = trainer.train(steps[contestant], state, placed, say=say)
        console.print(f"{name}: loss {curves[name].loss[0]:.4f} to {curves[name].loss[-1]:.4f}", markup=False)
        file.write(to_dict(options, curves, None))
    verdict = judge({name: curve.loss for name, curve in curves.items()}, controls)
    file.write(to_dict(options, curves, verdict))
    for table in (curve_table(curves, verdict), verdict_table(options, curves, verdict)):
        print_table(console, table)
    for name in options.formats:
        where = "within" if verdict.within(name) else "outside"
        console.print(f"{name} lies {where} the spread of {len(controls)} dense runs", markup=False)
        if (sentence := what_changed(name, curves[name])) is not None:
            console.print(sentence, markup=False)
    return curves, verdict


def what_changed(name: str, curve: Curve) -> str | None:
    """For people: the plans or the order that a run had, in one sentence; None for a format."""
    if name == "order":
        return f"order took the tokens in the order of {curve.token_order}"
    if name == "plan":
        first, *others = curve.plans.items()
        times = "once" if len(others) == 1 else f"{len(others)} times"
        later = "".join(f"; from step {step}, {plan}" for step, plan in others)
        return f"plan changed the formats of layers {times}: at first {first[1]}{later}"
    return None


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
