"""A program that compiles every format, forward and backward, and the other kernels of decoding, for GPUs
that need not be there.

What lowering leaves open shows here: shared memory, registers, and whether the assembler takes the PTX. It
needs JAX's plugin for CUDA, of the version of JAX, but neither a GPU nor a driver. Names of GPUs as arguments
compile for those alone.

pip install jax-cuda12-plugin==0.11.2 jax-cuda12-pjrt==0.11.2
PYTHONPATH=.:tests/pallas_kernels/helpers python tests/pallas_kernels/helpers/compile_for.py
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # which would ask a driver
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh
from op_checks import call, differentiate

from pallas_kernels import FFNOptions, activations, decode, device
from pallas_kernels.panel import config as panel_configs
from pallas_kernels.panel import gathered
from pallas_kernels.panel.pallas_triton_counts import GatePanel, count_active
from pallas_kernels.panel.pallas_triton_lists import NeuronLists, build_lists

CORES = {
    "NVIDIA A100-SXM4-80GB": 108,
    "NVIDIA GeForce RTX 4090": 128,
    "NVIDIA H100 80GB HBM3": 132,
    "NVIDIA H200": 132,
    "NVIDIA B200": 148,
}
LAYERS = [
    # tokens, D, F, type, gated
    (65536, 2048, 5632, "bfloat16", True),
    (4096, 2048, 8192, "float16", False),
    (1025, 1000, 2050, "float32", True),
    (1025, 1000, 2050, "bfloat16", True),
    (1025, 72, 2050, "bfloat16", True),
    (1025, 24, 2050, "bfloat16", True),
]
FEW_TOKENS = [
    (1, 2048, 5632, "bfloat16", True),
    (8, 2048, 5632, "bfloat16", True),
    (64, 2048, 5632, "bfloat16", True),
    (64, 2048, 8192, "float16", False),
    (2, 1000, 2050, "float32", True),
    (64, 1000, 2050, "float32", True),
]
_ON_BLACKWELL = [
    (65536, 2048, 5632, "bfloat16"),
    (1025, 320, 2056, "float16"),
    (1025, 64, 2056, "float16"),
]
FORMATS = {"twell": LAYERS, "panel": LAYERS, "hybrid": LAYERS, "auto": LAYERS, "decode": FEW_TOKENS}


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the shapes of its arguments; ``name`` says what it is, and ``capability`` for which GPUs
    it is, None for all."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    capability: int | None = None


def _layers() -> Iterator[Program]:
    for format, layers in FORMATS.items():
        for tokens, d_model, d_ff, dtype, gated in layers:
            weight = jax.ShapeDtypeStruct((d_ff, d_model), dtype)
            inputs = {"x": jax.ShapeDtypeStruct((tokens, d_model), dtype)}
            inputs |= dict.fromkeys(("w_gate", "w_up", "w_down") if gated else ("w_up", "w_down"), weight)
            layer = partial(call, options=FFNOptions(format=format))
            sizes = f"{tokens:,} tokens, D {d_model}, F {d_ff}, {dtype}, {'gated' if gated else 'non-gated'}"
            yield Program(f"{format}, forward, {sizes}", layer, (inputs,))
            yield Program(f"{format}, forward and backward, {sizes}", partial(_step, layer), (inputs,))


def _step(layer: Callable[..., Any], inputs: dict[str, jax.Array]) -> Any:
    return differentiate(inputs, jnp.ones(inputs["x"].shape, jnp.float32), 1.0, layer)


def _around_the_layer() -> Iterator[Program]:
    """What a step of decoding runs beside its feed-forward layers."""
    batch, heads, kv_heads, capacity, width, vocab_size = 8, 16, 4, 1024, 2048, 49152
    scale = jax.ShapeDtypeStruct((width,), jnp.float32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    for dtype in ("bfloat16", "float32"):
        for head_dim in decode.HEAD_DIMS:
            qkv = jax.ShapeDtypeStruct((batch, (heads + 2 * kv_heads) * head_dim), dtype)
            cache = jax.ShapeDtypeStruct((batch, capacity, kv_heads, head_dim), dtype)
            angles = jax.ShapeDtypeStruct((batch, head_dim // 2), jnp.float32)
            arrivals = jax.ShapeDtypeStruct((batch, kv_heads), jnp.int32)
            arguments = qkv, cache, cache, lengths, angles, angles, arrivals
            yield Program(f"decode attention, heads of {head_dim}, {dtype}", decode.attention, arguments)
            one = tuple(_of_one_row(each) for each in arguments)
            yield Program(f"decode attention of one row, heads of {head_dim}, {dtype}", decode.attention, one)
        weight = jax.ShapeDtypeStruct((vocab_size, width), dtype)
        for rows in (1, batch, 20, 64):  # of each width of a block of rows
            x = jax.ShapeDtypeStruct((rows, width), dtype)
            yield Program(f"decode projection, {rows} rows, {dtype}", decode.project, (x, weight))
            add_norm = partial(decode.add_norm, eps=1e-5)
            yield Program(f"decode norm, {rows} rows, {dtype}", add_norm, (x, x, scale))
        for rows in (1, decode.ROWS_TOKENS):
            x = jax.ShapeDtypeStruct((rows, width), dtype)
            for gated in (True, False):
                square = jax.ShapeDtypeStruct((width, width), dtype)
                neurons = jax.ShapeDtypeStruct((5632, width), dtype)
                weights = (neurons if gated else None, neurons, neurons)
                name = (
                    f"decode layer on a residual stream, {rows} rows, {dtype}, {'' if gated else 'non-'}gated"
                )
                yield Program(name, _on_stream, (x, scale, square, weights))


def _gathered_on_hopper() -> Iterator[Program]:
    """PanelELL's gathered products on Mosaic GPU where those of `LAYERS` are others: in f16, of another
    activation, and with no gradient of l1."""
    weight = jax.ShapeDtypeStruct((8200, 64), "float16")
    inputs = {"x": jax.ShapeDtypeStruct((8201, 64), "float16")}
    inputs |= dict.fromkeys(("w_gate", "w_up", "w_down"), weight)
    layer = partial(call, options=FFNOptions(format="panel", activation="relu2", backend="mosaic_gpu"))
    sizes = "8,201 tokens, D 64, F 8200, float16, relu2"
    yield Program(f"panel on Mosaic GPU, forward, {sizes}", layer, (inputs,), capability=90)
    step = jax.grad(lambda inputs: jnp.sum(layer(inputs)[0].astype(jnp.float32)))
    yield Program(f"panel on Mosaic GPU, forward and backward, {sizes}", step, (inputs,), capability=90)


def _gathered_on_blackwell() -> Iterator[Program]:
    """PanelELL's gathered products on Mosaic GPU for Blackwell, by themselves: of a large call in bf16, and
    of small ones in f16 whose tokens and columns fill no tile."""
    b200 = device.Device("gpu", "NVIDIA B200", 100, CORES["NVIDIA B200"])
    for tokens, d_model, d_ff, dtype in _ON_BLACKWELL:
        x, w = jax.ShapeDtypeStruct((tokens, d_model), dtype), jax.ShapeDtypeStruct((d_ff, d_model), dtype)
        config = panel_configs.heuristic(x, 128, b200)
        how = {"config": config, "backend": "mosaic_gpu"}
        n_panels = -(-tokens // config.panel)
        segments = config.panel // panel_configs.SEGMENT
        gate = GatePanel(
            jax.ShapeDtypeStruct((n_panels, d_ff, config.panel), dtype),
            jax.ShapeDtypeStruct((n_panels * segments, d_ff), "uint8"),
            jax.ShapeDtypeStruct((1, n_panels * config.panel), "int32"),
        )
        lists = jax.eval_shape(partial(_lists_of, chunk=config.chunk, d_ff=d_ff), gate)
        h = jax.ShapeDtypeStruct((lists.neurons.shape[0], config.panel), dtype)
        sizes = f"{tokens:,} tokens, D {d_model}, F {d_ff}, {dtype}"
        for activation, keep in product(("relu", "relu2", "drelu"), (False, True)):
            up = partial(gathered.panel_up, rule=activations.rule(activation), keep=keep, **how)
            name = f"panel's up projection, {sizes}, {activation}{', kept' if keep else ''}"
            yield Program(name, up, (gate, lists, x, w), capability=100)
            # The gradient's epilogue is another with a cotangent of l1.
            scales = (jax.ShapeDtypeStruct((1,), "float32") if keep else None,)
            dh = partial(gathered.panel_dh, rule=activations.rule(activation), **how)
            name = f"panel's gradient of h, {sizes}, {activation}{', with that of l1' if keep else ''}"
            yield Program(name, dh, (h, h, lists, x, w, *scales), capability=100)
        for terms in (1, 2):
            down = partial(gathered.panel_down, tokens=tokens, gradient=terms > 1, **how)
            name = f"panel's down projection of {terms}, {sizes}"
            yield Program(name, down, ([(h, w)] * terms, lists), capability=100)


def _lists_of(gate: GatePanel, *, chunk: int, d_ff: int) -> NeuronLists:
    counts = count_active(gate, d_ff=d_ff, interpret=True)
    return build_lists(counts, tokens=gate.nnz.shape[1], chunk=chunk, interpret=True)[0]


def _of_one_row(argument: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *argument.shape[1:]), argument.dtype)


def _on_stream(x: jax.Array, scale: jax.Array, square: jax.Array, weights: tuple[Any, ...]) -> Any:
    """A layer but for its attention: every kernel that adds to a residual stream or reads its norm."""
    stream = decode.project_onto(decode.Residual(x, 0.3), x, square)
    normed, onto = stream.normed(scale, 1e-5), decode.Residual(stream.x, 0.3)
    stream = decode.layer_onto(onto, normed, *weights, rule=FFNOptions().rule)
    return decode.project(stream.normed(scale, 1e-5), square)


def _gates_on_blackwell() -> Iterator[Program]:
    """The gate on Mosaic GPU where only a call by name takes it: layers whose tiles of the gate are wide, and
    those whose tiles are narrow or cut."""
    for format in ("panel", "twell", "twell(tile=128)"):
        for tokens, d_model, d_ff, dtype in ((65536, 2048, 5632, "bfloat16"), (1031, 64, 5640, "float16")):
            weight = jax.ShapeDtypeStruct((d_ff, d_model), dtype)
            inputs = {"x": jax.ShapeDtypeStruct((tokens, d_model), dtype)}
            inputs |= dict.fromkeys(("w_gate", "w_up", "w_down"), weight)
            layer = partial(call, options=FFNOptions(format=format, backend="mosaic_gpu"))
            name = f"{format} on Mosaic GPU, {{}}, {tokens:,} tokens, D {d_model}, F {d_ff}, {dtype}"
            yield Program(name.format("forward"), layer, (inputs,), capability=100)
            step = partial(_step, layer)
            yield Program(name.format("forward and backward"), step, (inputs,), capability=100)


def _target(kind: str) -> tuple[AbstractMesh, SingleDeviceSharding]:
    """What a function is traced under, and where its arguments are, to be compiled for a GPU."""
    gpu = AbstractDevice(device_kind=kind, num_cores=CORES[kind], platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=gpu)
    found = _device_of(mesh)
    major, minor = divmod(found.capability, 10)
    config = f"""
      platform_name: "CUDA"
      device_description_str: "{kind}"
      dnn_version_info {{ major: 9 minor: 10 }}
      gpu_device_info {{
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        core_count: {CORES[kind]}
        shared_memory_per_block: 49152
        shared_memory_per_block_optin: {found.shared_memory}
        shared_memory_per_core: {found.shared_memory + 1024}
        threads_per_block_limit: 1024
        threads_per_warp: 32
        threads_per_core_limit: 1536
        registers_per_core_limit: 65536
        registers_per_block_limit: 65536
        fpus_per_core: 128
        block_dim_limit_x: 2147483647
        block_dim_limit_y: 65535
        block_dim_limit_z: 65535
        clock_rate_ghz: 1.7
        memory_bandwidth: 3000000000000
        l2_cache_size: 52428800
        device_memory_size: 80000000000
      }}
    """
    described = topologies.get_topology_desc("", platform="cuda", topology="1x1x1", target_config=config)
    return mesh, SingleDeviceSharding(described.devices[0])


def _device_of(mesh: AbstractMesh) -> device.Device:
    with use_abstract_mesh(mesh):
        return device.current()


def _compile(job: tuple[tuple[str, Any], Program]) -> str | None:
    """Compiles one program; why it cannot be, or None."""
    (kind, (mesh, sharding)), program = job
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), program.arguments
    )
    try:
        with use_abstract_mesh(mesh):
            traced = jax.jit(program.function).trace(*arguments)
            temporary = traced.lower(lowering_platforms=("cuda",)).compile().memory_analysis()
        found, failure = f"{temporary.temp_size_in_bytes / 2**20:,.0f} MiB beside its arguments", None
    except Exception as error:  # whatever a compiler raises
        found = failure = next(iter(str(error).strip().splitlines()), repr(error))
    print(f"{kind}: {program.name}: {found}", flush=True)
    return failure


def main(kinds: list[str]) -> int:
    unknown = sorted(set(kinds) - set(CORES))
    if unknown:
        print(f"GPUs must be among {', '.join(CORES)}; got {', '.join(unknown)}", file=sys.stderr)
        return 2
    try:
        targets = [(kind, _target(kind)) for kind in kinds or CORES]
    except NotImplementedError:  # how JAX says that it knows no CUDA: a lack of the user's, not ours
        names = " ".join(f"jax-cuda12-{part}=={jax.__version__}" for part in ("plugin", "pjrt"))
        print(f"JAX's plugin for CUDA must be there, found none: pip install {names}", file=sys.stderr)
        return 2
    programs = [
        *_layers(),
        *_around_the_layer(),
        *_gathered_on_hopper(),
        *_gates_on_blackwell(),
        *_gathered_on_blackwell(),
    ]
    jobs = [
        (target, program)
        for target, program in product(targets, programs)
        if program.capability in (None, _device_of(target[1][0]).capability)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failures = [failure for failure in pool.map(_compile, jobs) if failure is not None]
    print(f"{len(jobs) - len(failures)} of {len(jobs)} programs compile, JAX {jax.__version__}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
