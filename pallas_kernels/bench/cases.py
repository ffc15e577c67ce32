"""What the benchmark compares: layers, the contestants of each, and the work that each must do."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, reference, sparse_ffn, sparse_mlp
from pallas_kernels.bench.inputs import Activity, ffn_inputs
from pallas_kernels.bench.shapes import PAPER, SHAPES, TOKENS, FFNShape
from pallas_kernels.common.row_kernel import up_down
from pallas_kernels.options import FFNOptions, FFNStats, Twell
from pallas_kernels.twell import config as configs
from pallas_kernels.twell import gate as gate_stages

Arrays = dict[str, Any]
Program = tuple[Callable[..., Any], tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer and its input: a model's shape, M tokens, how active its neurons are, and the type of it all.

    ``source`` says in words what the activity is like: cases that differ in it belong to different curves.
    With ``alike`` the tokens of a topic stand together.
    """

    shape: FFNShape
    tokens: int
    activity: Activity = Activity()  # noqa: RUF009 - frozen
    dtype: str = "bfloat16"
    source: str = "independent tokens"
    alike: bool = False

    def make_inputs(self) -> Callable[[jax.Array], Arrays]:
        """A function of a random key that gives the layer's arguments by name."""
        shape = self.shape
        return partial(
            ffn_inputs, activity=self.activity, tokens=self.tokens, d_model=shape.d_model, d_ff=shape.d_ff,
            gated=shape.gated, dtype=jnp.dtype(self.dtype), alike=self.alike,
        )  # fmt: skip

    def arrays(self) -> Arrays:
        """The layer's arguments by name, from a fixed key."""
        return dict(jax.jit(self.make_inputs())(jax.random.key(0)))

    def input_shapes(self) -> Arrays:
        """Shape and type of the layer's arguments by name.

        Raises:
          ValueError: the layer cannot be as active as asked.
        """
        return dict(jax.eval_shape(self.make_inputs(), jax.random.key(0)))

    def __str__(self) -> str:
        gated = "gated" if self.shape.gated else "non-gated"
        return f"{self.tokens:,} tokens, D {self.shape.d_model}, F {self.shape.d_ff}, {gated}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Work:
    """What a contestant must do: FLOPs, bytes to and from memory at the least,
    weight bytes gathered from L2."""

    flops: float
    bytes: float
    gathered: float = 0.0


def default_cases(activity: Activity = Activity(), dtype: str = "bfloat16") -> list[Case]:  # noqa: B008
    """The paper's layer at every number of tokens, and the other models' at the middle one."""
    others = [(shape, TOKENS[1]) for shape in SHAPES.values() if shape is not PAPER]
    return [Case(*pair, activity, dtype) for pair in [(PAPER, tokens) for tokens in TOKENS] + others]


def contestants(case: Case, options: FFNOptions) -> dict[str, Program]:
    """What is timed: functions and the names of their arguments, ``packed`` being gate_pack's own output."""
    weights = ("w_gate", "w_up", "w_down") if case.shape.gated else ("w_up", "w_down")
    gate, layer = weights[0], ("x", *weights)
    config, interpret = choose_config(case, options), choose_backend(case, options) == "interpret"
    sparse = partial(sparse_ffn if case.shape.gated else sparse_mlp, options=options)
    project = partial(_project, config=config.up_down, interpret=interpret)
    return {
        "dense_ffn": (lambda *arguments: dense(*arguments)[0], layer),
        "gate_gemm": (reference.project, ("x", gate)),
        **{name: (pack, ("x", gate)) for name, pack in _packers(case, options).items()},
        "up_down": (project, ("packed", *(name for name in layer if name != gate))),
        "sparse_ffn": (sparse, layer),
        "sparse_ffn_y": (lambda *arguments: sparse(*arguments)[0], layer),
    }


def _packers(case: Case, options: FFNOptions) -> dict[str, Callable[..., Any]]:
    """The gate stage as the sparse call runs it, and that of the Triton backend where it is another one."""
    backend, config = choose_backend(case, options), choose_config(case, options)

    def stage(backend):
        return gate_stages.stage(
            backend,
            tile=layout(options).tile,
            slots=layout(options).slots,
            fused=config.gate_pack,
            pack=config.word_pack,
            rule=options.rule,
        )

    packers = {"gate_pack": stage(backend)}
    return packers | {"gate_pack_triton": stage("triton")} if backend == "mosaic_gpu" else packers


def _project(packed, x, *weights, config, interpret):
    """What follows the gate: of (w_up, w_down), or of w_down alone without a gate projection."""
    up = weights[0] if len(weights) == 2 else None
    return up_down(packed, x, up, weights[-1], config=config, name="twell_up_down", interpret=interpret)


def work(case: Case, options: FFNOptions, mean_nnz: float) -> dict[str, Work]:
    """Each contestant's work where a token has ``mean_nnz`` active gates."""
    m, d, f = case.tokens, case.shape.d_model, case.shape.d_ff
    size = jnp.dtype(case.dtype).itemsize
    projections = 2 if case.shape.gated else 1  # after the gate
    gemm, x, weight, nnz = 2.0 * m * d * f, size * m * d, size * f * d, mean_nnz * m
    words = 4 * (m * -(-f // layout(options).tile) + nnz * (size // 2))
    gathered = projections * nnz * size * d
    layer_bytes = 2 * x + (projections + 1) * weight
    pack = Work(gemm, x + weight + words)
    sparse = Work(gemm + 2 * projections * nnz * d, layer_bytes, gathered)
    return {
        "dense_ffn": Work((projections + 1) * gemm, layer_bytes),
        "gate_gemm": Work(gemm, x + weight + size * m * f),
        "gate_pack": pack,
        "gate_pack_triton": pack,
        "up_down": Work(2 * projections * nnz * d, words + projections * (x + weight), gathered),
        "sparse_ffn": sparse,
        "sparse_ffn_y": sparse,
    }


def dense(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, FFNStats]:
    """The dense layer, from x and two or three weights."""
    *w_gate, w_up, w_down = weights
    return reference.ffn(x, w_gate[0] if w_gate else None, w_up, w_down)


def layout(options: FFNOptions) -> Twell:
    """The tile of the sparse calls.

    Raises:
      ValueError: another format was asked for.
    """
    found = options.layout
    if not isinstance(found, Twell):
        raise ValueError(f"the stages of TwELL need format='twell'; got '{found}'")
    return found


def choose_config(case: Case, options: FFNOptions) -> configs.TwELLConfig:
    """The configs that the case's sparse calls run with."""
    inputs = case.input_shapes()
    return configs.choose(inputs["x"], inputs["w_up"], layout(options))


def choose_backend(case: Case, options: FFNOptions) -> str:
    """What runs the case's sparse calls.

    Raises:
      ValueError: nothing here can.
    """
    inputs = case.input_shapes()
    return dispatch.choose(options, dispatch.Call.of(inputs["x"], inputs["w_up"])).backend
