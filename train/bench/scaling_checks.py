"""Beside weak scaling, what ``sparse-lm bench scaling`` measures: a layer and a model split by neurons, and
losses."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import sparse_ffn, sparse_mlp
from pallas_kernels.bench import timing
from pallas_kernels.bench.collectives import bytes_by_kind
from pallas_kernels.bench.inputs import ffn_inputs, like_trained
from sparse_lm import ModelConfig
from train.bench import core, synthetic
from train.config import OptimizerConfig, ParallelConfig, TrainConfig
from train.parallel import Layout
from train.state import build_program

_BATCHES = 4  # that a comparison of losses goes round


def tensor_parallel(
    model: ModelConfig, batch_size: int, nnz: float, rounds: int, counts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """One feed-forward layer, forward and backward under plain ``jit``, whose neurons the devices share.

    Every device has all tokens. So it is strong scaling: n devices would take 1/n of the time.

    Args:
      model: gives the layer's sizes and how it runs.
      batch_size: sequences, each of the context's length.
      nnz: active neurons of a token, on average.
      rounds: samples of the time.
      counts: numbers of devices; those that do not divide the neurons are left out.

    Yields:
      For each: ``devices``, ``samples_ms``, ``median_ms``, ``of_linear`` (None for the first), and the bytes
      ``exchanged``, as `train.bench.scaling.Row` has them.
    """
    tokens = batch_size * model.context_length
    inputs = jax.jit(
        lambda key: ffn_inputs(
            key, like_trained(nnz, model.d_ff), tokens=tokens, d_model=model.d_model, d_ff=model.d_ff,
            gated=model.gated, dtype=jnp.dtype(model.dtype),
        )
    )(jax.random.key(0))  # fmt: skip
    layer = sparse_ffn if model.gated else sparse_mlp

    @jax.jit
    def differentiated(inputs: dict[str, jax.Array]) -> Any:
        def loss(inputs):
            y, stats = layer(**inputs, options=model.ffn_options)
            return jnp.sum(jnp.square(y.astype(jnp.float32))) + stats.l1

        return jax.grad(loss)(inputs)

    alone = None
    for count, mesh in _meshes(model, counts, AxisType.Explicit):
        placed = {
            name: jax.device_put(
                array, NamedSharding(mesh, PartitionSpec() if name == "x" else PartitionSpec("model"))
            )
            for name, array in inputs.items()
        }
        compiled = differentiated.lower(placed).compile()
        row = _timed(compiled, (placed,), count, rounds, alone)
        alone = alone or row["median_ms"]
        yield row


def _meshes(model: ModelConfig, counts: Sequence[int], kind: AxisType) -> Iterator[tuple[int, Mesh]]:
    """A mesh of each number of devices that divides the model's neurons."""
    for count in counts:
        if model.d_ff % count == 0:
            yield (
                count,
                jax.make_mesh((count,), ("model",), axis_types=(kind,), devices=jax.devices()[:count]),
            )


def _timed(
    compiled: jax.stages.Compiled, arguments: tuple[Any, ...], count: int, rounds: int, alone: float | None
) -> dict[str, Any]:
    """A row of `tensor_parallel`: a program on ``count`` devices, beside the milliseconds that one takes."""
    measured = timing.measure({count: lambda: compiled(*arguments)}, rounds=rounds)[count]
    return {
        "devices": count,
        "samples_ms": list(measured.samples_ms),
        "median_ms": measured.median_ms,
        "of_linear": alone / measured.median_ms / count if alone and count > 1 else None,
        "exchanged": bytes_by_kind(compiled.as_text() or "") if count > 1 else {},
    }


def tensor_parallel_model(
    model: ModelConfig, batch_size: int, nnz: float, rounds: int, counts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The model's core, from the embedding to the last norm, whose feed-forward neurons the devices share:
    forward, and forward and backward, under plain ``jit``.

    Every device has all tokens and all else of the weights, which are in the compute type. So what the
    devices share is the feed-forward part alone.

    Args and what is yielded are those of `tensor_parallel`, with ``what`` beside it, and ``failure``, the
    reason why a case has no times, or None.
    """
    source = core.synthetic_source(model, batch_size=batch_size, nnz=nnz)
    params = jax.device_get(source.make())
    buffers = jax.device_get(core.buffers_of(model, params, jnp.asarray(source.tokens)))
    run = core.forward(model)

    def forward(params, buffers, tokens):
        return run(params, buffers, tokens)[0]

    def gradients(params, buffers, tokens):
        def loss(params):
            hidden, stats = run(params, buffers, tokens)
            squares = jnp.mean(jnp.square(hidden.astype(jnp.float32)))
            return squares if stats is None else squares + jnp.mean(stats.l1)

        return jax.grad(loss)(params)

    for what, function in (("forward", forward), ("forward and backward", gradients)):
        alone = None
        for count, mesh in _meshes(model, counts, AxisType.Auto):
            whole = NamedSharding(mesh, PartitionSpec())
            split = jax.tree_util.tree_map_with_path(partial(_by_neurons, mesh), params)
            row: dict[str, Any] = {"devices": count, "samples_ms": [], "median_ms": None, "of_linear": None}
            try:
                placed = (
                    *jax.device_put((params, buffers), (split, whole)),
                    jax.device_put(source.tokens, whole),
                )
                outputs = split if function is gradients else None
                compiled = jax.jit(function, out_shardings=outputs).lower(*placed).compile()
                row = _timed(compiled, placed, count, rounds, alone)
                alone = alone or row["median_ms"]
                failure = None
            except jax.errors.JaxRuntimeError as error:
                failure = out_of_memory(error)
            yield {"what": what, **row, "failure": failure}


def _by_neurons(mesh: Mesh, path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    """Where a parameter stands: the layers' feed-forward matrices (L, F, D) are split over F."""
    names = [str(getattr(key, "key", key)) for key in path]
    by_neurons = "ffn" in names and names[-1] in ("w_gate", "w_up", "w_down")
    return NamedSharding(mesh, PartitionSpec(None, "model") if by_neurons else PartitionSpec())


def out_of_memory(error: jax.errors.JaxRuntimeError) -> str:
    """What a row says of the error; any other error is raised again."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return "out of memory: " + str(error).splitlines()[0]


def model_line(row: Mapping[str, Any]) -> str:
    """For people."""
    devices = f"{row['devices']} devices share the model's neurons"
    name = f"{row['what']}, {devices if row['devices'] > 1 else 'the model on 1 device'}"
    if row["failure"]:
        return f"{name}: {row['failure']}"
    linear = f", {row['of_linear']:.1%} of linear" if row["of_linear"] else ""
    return f"{name}: {row['median_ms']:.2f} ms{linear}"


def layer_line(row: Mapping[str, Any]) -> str:
    """For people."""
    name = (
        f"{row['devices']} devices share a layer's neurons" if row["devices"] > 1 else "a layer on 1 device"
    )
    linear = f", {row['of_linear']:.1%} of linear" if row["of_linear"] else ""
    return f"{name}: {row['median_ms']:.2f} ms forward and backward{linear}"


def compare_losses(
    model: ModelConfig,
    batch_size: int,
    steps: int,
    counts: Sequence[int],
    modes: Mapping[str, ParallelConfig],
) -> dict[str, Any]:
    """Trains from the same weights on the same batches on each number of devices.

    Args:
      model: what to train.
      batch_size: sequences of a step, on all devices together; a number of devices that does not divide it is
        left out.
      steps: optimizer steps, round a few batches of random tokens, whose loss therefore falls.
      counts: numbers of devices, the first being what the others are compared with.
      modes: how a step spreads over several devices.

    Returns:
      ``losses``: one list a ``"devices mode"``; ``largest_difference``: of a step's loss from that on the
      first number of devices, relative, for each.
    """
    config = TrainConfig(
        steps=steps, batch_size=batch_size, model=model,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=min(10, steps)),
    )  # fmt: skip
    build = build_program(config)
    batches = [synthetic.random_tokens(model, batch_size, seed=seed) for seed in range(_BATCHES)]
    losses: dict[str, list[float]] = {}
    for count in counts:
        if batch_size % count:
            continue
        for mode, parallel in modes.items() if count > 1 else [("alone", ParallelConfig())]:
            layout = Layout.over_first_devices(parallel, count)
            placed = [layout.place(tokens) for tokens in batches]
            step = layout.compiled_step(build, placed[0])
            refresh_order = layout.order_refresh(build)
            with layout.step_scope():
                state, found = layout.compile_init(build)(), []
                for number in range(steps):
                    tokens = placed[number % _BATCHES]
                    state = refresh_order(number + 1, state, tokens)
                    state, metrics = step(state, tokens)
                    found.append(float(metrics["loss"]))  # simulated devices take one step at a time
            losses[f"{count} {mode}"] = found
    first, *others = losses.values()
    differences = [float(np.max(np.abs(np.subtract(other, first) / first))) for other in others]
    return {"losses": losses, "largest_difference": dict(zip(list(losses)[1:], differences, strict=True))}


def losses_line(found: Mapping[str, Any]) -> str:
    """For people."""
    first = next(iter(found["losses"].values()))
    worst = max(found["largest_difference"].values(), default=math.nan)
    return (
        f"loss {first[0]:.4f} to {first[-1]:.4f} in {len(first)} steps; on other numbers of devices and in "
        f"other modes at most {worst:.1e} of it apart: "
        + ", ".join(f"{name} {value:.1e}" for name, value in found["largest_difference"].items())
    )
