"""What a token of decode costs, in a whole model and in one feed-forward layer: ``sparse-lm bench decode``.

A step reads every weight that it needs once, so that beside each time stands how many bytes that is, and the
share of the device's bandwidth, measured by a large copy in the same run, that the time amounts to. The
weights are random, with gates as active as those of a trained layer (`pallas_kernels.bench.inputs`); the
model's embedding gives every layer the input that such gates want, as in `synthetic`.

Layers are timed inside one program that runs a number of them one after the other, with weights that do not
fit the cache of the device together: so the host's dispatch is no part of a layer's time.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from pallas_kernels import FFNOptions, reference, sparse_ffn, sparse_mlp
from pallas_kernels.activations import Rule
from pallas_kernels.bench import timing
from pallas_kernels.bench.inputs import ffn_inputs, like_trained
from pallas_kernels.errors import RequestError
from pallas_kernels.options import Format
from sparse_lm import ModelConfig
from sparse_lm.config import SILU
from sparse_lm.decoding import decode_block, read_prompts
from sparse_lm.inference import InferenceModel, LayerCaches, LayerWeights
from sparse_lm.sampling import GREEDY
from train.bench import results
from train.bench.synthetic import output_share, sparse_embedding
from train.output import print_table

_LAYERS = 8
_REPEATS = 4
_STEPS = 16
_COMPILERS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Times decode of a preset's model, and of one of its feed-forward layers, with sparse and dense layers.

    Attributes:
      config: the preset whose model it is.
      batches: rows that the model decodes at a time, one case each; none times no model.
      tokens: tokens that the layer gets, one case each; none times no layer.
      formats: how the feed-forward layers run, one case each.
      nnz: active neurons of a token, on average; 0 makes every neuron active.
      context: positions in the cache when a step begins.
      prompt: tokens of the prompt whose first answer is timed; 0 times none.
      rounds: samples of each case.
      common: what all benchmarks of models have.
      model: sizes and numerics; ``formats`` stand in for its own choice.
    """

    config: str = "1p5b"
    batches: tuple[int, ...] = (1, 8, 32)
    tokens: tuple[int, ...] = (1, 8, 32, 64)
    formats: tuple[Literal["dense", "auto", "decode"], ...] = ("dense", "auto")
    nnz: float = 45.0
    context: int = 512
    prompt: int = 1024
    rounds: int = 5
    common: Annotated[results.CommonOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=results.CommonOptions
    )
    model: ModelConfig

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise RequestError(f"rounds must be at least 1; got {self.rounds}")
        if not self.formats:
            raise RequestError("formats must name at least one; got none")
        if any(n < 1 for n in (*self.batches, *self.tokens)):
            given = ", ".join(map(str, (*self.batches, *self.tokens)))
            raise RequestError(f"batches and tokens must be at least 1; got {given}")
        if self.nnz < 0:
            raise RequestError(f"nnz must be above 0, or 0 for every neuron; got {self.nnz}")
        if self.model.activation == SILU:
            raise RequestError(f"model.activation must have silent neurons; got {SILU}")


@dataclasses.dataclass(frozen=True)
class Row:
    """What a case was found to take.

    Attributes:
      what: ``"layer"``, ``"step"`` of the whole model, or ``"first token"`` of a prompt.
      format: how the feed-forward layers run.
      tokens: tokens of the layer, rows of the step, or tokens of the prompt.
      samples_ms: milliseconds of one layer, one step or one prompt.
      union: neurons that some token of a layer's call activates.
      bytes: what must be read, each weight that is needed once; None for a prompt.
      bandwidth_share: of the bandwidth that a large copy reaches.
    """

    what: str
    format: str
    tokens: int
    samples_ms: tuple[float, ...]
    union: int
    bytes: int | None = None
    bandwidth_share: float | None = None

    @property
    def median_ms(self) -> float:
        return float(np.median(self.samples_ms))

    def to_dict(self) -> dict[str, Any]:
        """Every attribute, a name and the median, ready for JSON."""
        name = f"{self.what}, {self.tokens} tokens, {self.format}"
        return {"name": name, "median_ms": self.median_ms, **dataclasses.asdict(self)}


def run(options: DecodeOptions, *, console: Console | None = None) -> list[Row]:
    """Times every case, prints a table, and writes the JSON file asked for.

    Raises:
      UserError: the file cannot be written, or a case is slower than ``tolerance`` allows.
      RequestError: the context or the prompt does not fit the model's context, a format cannot run here, or a
        layer cannot have so many active neurons.
    """
    _check_context(options)
    console = console or Console(highlight=False, soft_wrap=True)
    file = options.common.open_files()
    bandwidth = _bandwidth(options.rounds)
    rows = [*_layers(options), *_model(options)]
    rows = [
        dataclasses.replace(row, bandwidth_share=row.bytes / (row.median_ms / 1e3) / bandwidth)
        if row.bytes
        else row
        for row in rows
    ]
    document = results.document(
        options,
        [row.to_dict() for row in rows],
        results.machine_record(),
        copy_bytes_per_second=bandwidth,
    )
    file.write(document)
    print_table(console, table(options, rows, bandwidth))
    options.common.print_against(console, document)
    return rows


def _check_context(options: DecodeOptions) -> None:
    longest = options.model.context_length
    if not 0 < options.context <= longest - _STEPS or not 0 <= options.prompt <= longest:
        raise RequestError(
            f"--context must be from 1 to {longest - _STEPS} and --prompt at most {longest}, in the model's "
            f"context of {longest} tokens; got {options.context} and {options.prompt}"
        )


def _bandwidth(rounds: int) -> float:
    """Bytes a second, read plus written, of a copy that no cache holds."""
    megabytes = 1024 if jax.default_backend() == "gpu" else 64
    large = jnp.zeros(megabytes * 2**18, jnp.float32)
    timed = _measure({"copy": (jnp.negative, (large,))}, rounds)["copy"]
    return 2e3 * large.nbytes / timed.median_ms


# -- one layer -----------------------------------------------------------------------------------------------


def _layers(options: DecodeOptions) -> list[Row]:
    if not options.tokens:
        return []
    model = options.model
    draw = jax.jit(partial(_ffn_weights, options, tokens=max(options.tokens)))
    inputs = [draw(jax.random.key(nth)) for nth in range(_LAYERS)]
    weights = [[layer[name] for name in ("w_gate", "w_up", "w_down") if name in layer] for layer in inputs]
    programs = {
        (format, tokens): (
            partial(_run_layers, _options(model, format)),
            (inputs[0]["x"][:tokens], weights),
        )
        for tokens in options.tokens
        for format in options.formats
    }
    times = _measure(programs, options.rounds)
    rows = []
    for (format, tokens), timed in times.items():
        union = _union(inputs[0]["x"][:tokens], weights[0][0], model.ffn_options.rule)
        samples = tuple(ms / (_LAYERS * _REPEATS) for ms in timed.samples_ms)
        rows.append(Row("layer", format, tokens, samples, union, _ffn_bytes(model, format, union)))
    return rows


def _ffn_weights(options: DecodeOptions, key: jax.Array, *, tokens: int) -> dict[str, jax.Array]:
    """Arguments of one layer of the model by name, as active as asked."""
    model, everything = options.model, options.nnz == 0
    activity = like_trained(options.nnz or 45.0, model.d_ff)
    inputs = ffn_inputs(
        key, activity, tokens=tokens, d_model=model.d_model, d_ff=model.d_ff, gated=model.gated,
        dtype=jnp.dtype(model.dtype),
    )  # fmt: skip
    if everything:  # the first column of x is 1
        name = "w_gate" if model.gated else "w_up"
        inputs[name] = inputs[name].at[:, 0].set(10)
    return inputs


def _run_layers(options: FFNOptions, x: jax.Array, weights: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """All layers a number of times, each after the one before it; x stays what it is."""

    def once(_, x):
        for layer in weights:
            y, _ = (sparse_ffn if len(layer) == 3 else sparse_mlp)(x, *layer, options=options)
            x = x + 0 * y
        return x

    return jax.lax.fori_loop(0, _REPEATS, once, x)


def _union(x: jax.Array, gate: jax.Array, rule: Rule) -> int:
    return int(jnp.sum(jnp.any(rule.active(reference.project(x, gate)), axis=0)))


def _ffn_bytes(model: ModelConfig, format: str, union: int) -> int:
    """Weights that a layer must read: all of them if dense, else the gate and the active rows."""
    row = model.d_model * jnp.dtype(model.dtype).itemsize
    others = 2 if model.gated else 1
    return row * (model.d_ff + others * (model.d_ff if format == "dense" else union))


def _options(model: ModelConfig, format: Format) -> FFNOptions:
    return model.ffn.with_format(format, "auto" if format == "dense" else model.ffn.backend)


# -- the whole model -----------------------------------------------------------------------------------------


def _model(options: DecodeOptions) -> list[Row]:
    if not options.batches and not options.prompt:
        return []
    config = options.model
    model = synthetic_model(options)
    itemsize = jnp.dtype(config.dtype).itemsize
    key, most = jax.random.key(0), max((*options.batches, 1))
    tokens = jax.random.randint(key, (most, max(options.prompt, 1)), 0, config.vocab_size)
    steps, programs = {}, {}
    for format in options.formats:
        ffn = _options(config, format)
        variant = dataclasses.replace(model, config=dataclasses.replace(config, ffn=ffn))
        for batch in options.batches:
            steps["step", format, batch] = _Steps(options, variant, tokens[:batch, 0])
        if options.prompt:
            first = partial(read_prompts, GREEDY, config.context_length)
            arguments = variant, key, tokens[:1], jnp.full(1, options.prompt, jnp.int32)
            programs["first token", format, options.prompt] = first, arguments
    with ThreadPoolExecutor(_COMPILERS) as pool:
        list(pool.map(_Steps.compile, steps.values()))
    timings = timing.measure(steps, rounds=options.rounds) | _measure(programs, options.rounds)
    rows = []
    for (what, format, size), timed in timings.items():
        step = what == "step"
        entering = _entering(model, tokens[:size, 0] if step else tokens[0])
        first_layer = model.layers[0]
        gate = first_layer.w_up if first_layer.w_gate is None else first_layer.w_gate
        union = _union(entering, gate, config.ffn_options.rule)
        matrices = sum(layer.qkv.nbytes + layer.output.nbytes for layer in model.layers)
        head = model.embedding.nbytes
        cache = 2 * size * options.context * config.num_kv_heads * config.head_dim * itemsize
        needed = matrices + head + config.num_layers * (_ffn_bytes(config, format, union) + cache)
        samples = tuple(ms / _STEPS if step else ms for ms in timed.samples_ms)
        rows.append(Row(what, format, size, samples, union, needed if step else None))
    return rows


class _Steps:
    """A block of steps, again and again from the same place in the same cache, which it writes in place."""

    def __init__(self, options: DecodeOptions, model: InferenceModel, tokens: jax.Array) -> None:
        config = model.config
        capacity = min(config.context_length, 1 << (options.context + _STEPS - 1).bit_length())
        shape = (len(tokens), capacity, config.num_kv_heads, config.head_dim)
        self._arguments = model, jax.random.key(0), tokens
        self._cache = [
            tuple(jnp.zeros(shape, config.dtype) for _ in model.layers) for _ in ("keys", "values")
        ]

        def steps(cache, model, key, tokens):
            lengths = jnp.full(tokens.shape, options.context, jnp.int32)
            drawn, cache = decode_block(
                GREEDY, _STEPS, model, key, LayerCaches(cache[0], cache[1], lengths), tokens
            )
            return drawn, [cache.keys, cache.values]

        self._function: Any = jax.jit(steps, donate_argnums=0)

    def compile(self) -> None:
        self._function = self._function.lower(self._cache, *self._arguments).compile()

    def __call__(self) -> jax.Array:
        drawn, self._cache = self._function(self._cache, *self._arguments)
        return drawn


def synthetic_model(options: DecodeOptions) -> InferenceModel:
    """A model whose layers are as active as asked, from random weights in the compute type."""
    config = options.model
    dtype, d, share = jnp.dtype(config.dtype), config.d_model, output_share(config)
    activity = like_trained(options.nnz or 45.0, config.d_ff)
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim

    @jax.jit
    def layer(key: jax.Array) -> LayerWeights:
        for_ffn, for_qkv, for_output = jax.random.split(key, 3)
        ffn = _ffn_weights(options, for_ffn, tokens=1)
        scale = jnp.ones(d, jnp.float32)
        qkv = config.init_std * jax.random.normal(for_qkv, (width, d))
        output = share * config.init_std * jax.random.normal(for_output, (d, d))
        bias = jnp.zeros(width, dtype) if config.qkv_bias else None
        return LayerWeights(
            attention_norm=scale, qkv=qkv.astype(dtype), qkv_bias=bias, output=output.astype(dtype),
            ffn_norm=scale, w_gate=ffn.get("w_gate"), w_up=ffn["w_up"], w_down=share * ffn["w_down"],
        )  # fmt: skip

    @jax.jit
    def table(key: jax.Array) -> jax.Array:
        return sparse_embedding(jax.random.split(key), activity, config).astype(dtype)

    embedding, head, *keys = jax.random.split(jax.random.key(0), 2 + config.num_layers)
    return InferenceModel(
        config=config,
        embedding=table(embedding),
        layers=tuple(layer(key) for key in keys),
        final_norm=jnp.ones(d, jnp.float32),
        head=None if config.tied_embeddings else table(head),
    )


def _entering(model: InferenceModel, tokens: jax.Array) -> jax.Array:
    """About what enters the feed-forward layers for tokens (M,): attention adds next to nothing."""
    x = model.embedding[tokens].astype(jnp.float32)
    return (x / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True))).astype(model.config.dtype)


def _measure(programs, rounds: int) -> dict[Any, timing.Timing]:
    calls = {}
    for name, program in (timing.compile_all(programs) if programs else {}).items():
        if isinstance(program, Exception):
            raise program
        calls[name] = partial(program, *programs[name][1])
    return timing.measure(calls, rounds=rounds)


def table(options: DecodeOptions, rows: Sequence[Row], bandwidth: float) -> Table:
    """For people: a line a case, each beside the dense one of the same size."""
    nnz = f"nnz {options.nnz:g}" if options.nnz else "every neuron active"
    table = Table(
        title=f"{options.config}, {options.model.num_layers} layers, {nnz}, context {options.context}, "
        f"{jax.devices()[0].device_kind} ({bandwidth / 1e9:,.0f} GB/s in a copy), JAX {jax.__version__}"
    )
    for name in ("what", "tokens", "format"):
        table.add_column(name, no_wrap=True)
    for name in ("µs (low–high)", "dense / this", "active", "MB", "of bandwidth"):
        table.add_column(name, justify="right", no_wrap=True)
    dense = {(row.what, row.tokens): row.median_ms for row in rows if row.format == "dense"}
    for row in rows:
        beside = dense.get((row.what, row.tokens))
        samples = [1e3 * ms for ms in row.samples_ms]
        table.add_row(
            row.what,
            str(row.tokens),
            row.format,
            f"{1e3 * row.median_ms:,.1f} ({min(samples):,.1f}–{max(samples):,.1f})",
            f"{beside / row.median_ms:.2f}" if beside else "",
            str(row.union),
            f"{row.bytes / 1e6:,.1f}" if row.bytes else "",
            f"{row.bandwidth_share:.0%}" if row.bandwidth_share else "",
        )
    return table
