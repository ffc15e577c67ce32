"""Device time read off the host's clock: chains of calls long enough to hide the host,
contestants taking turns."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Call = Callable[[], Any]
Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: one sample a round, each the mean over a chain of ``calls`` calls."""

    samples_ms: tuple[float, ...]
    calls: int

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device reaches today: FLOP/s of a large XLA product, bytes/s read plus written by
    a large copy.

    ``dispatch_ms`` is what the host needs to start a call:
    a call that is over sooner is not timed by the device.
    """

    flops: float
    bytes: float
    dispatch_ms: float

    def floor_ms(self, flops: float, bytes_moved: float) -> float:
        """Milliseconds under which work of so many FLOPs and bytes cannot end at these rates."""
        return 1e3 * max(flops / self.flops, bytes_moved / self.bytes)


def measure(
    contestants: Mapping[Key, Call],
    *,
    rounds: int = 7,
    chain_ms: float = 40.0,
    rest_s: float = 0.0,
    least_calls: int = 3,
) -> dict[Key, Timing]:
    """Times calls that dispatch compiled programs and return their outputs.

    Every round runs one chain of each contestant, in an order of its own. A device at its power limit sets
    its clock by what ran just before; so as long a chain of the same contestant goes before each, uncounted,
    and nobody has the same neighbour every time: times of calls that follow each other without end. With
    ``rest_s`` the device rests so many seconds instead, and a chain that is over before it gets there runs at
    its full clock: times of calls that come now and then. A first round is not counted.

    A chain is at least ``least_calls`` calls, however long one takes: 1 is enough for calls of a second.
    """
    calls = {name: _chain_length(call, chain_ms, least_calls) for name, call in contestants.items()}
    samples: dict[Key, list[float]] = {name: [] for name in contestants}
    for nth in range(rounds + 1):
        for name in random.Random(nth).sample(list(contestants), len(contestants)):
            if rest_s:
                time.sleep(rest_s)
            else:
                _chain(contestants[name], calls[name])
            samples[name].append(_chain(contestants[name], calls[name]))
    return {name: Timing(tuple(samples[name][1:]), calls[name]) for name in contestants}


def one_by_one(call: Call, *, warm_up: int, samples: int) -> Timing:
    """Times calls that cannot take turns, such as steps that replace their own state: each is waited for,
    and the first ``warm_up`` are not counted."""
    times = [_chain(call, 1) for _ in range(warm_up + samples)]
    return Timing(tuple(times[warm_up:]), 1)


def compile_all(
    programs: Mapping[Key, tuple[Callable[..., Any], tuple[Any, ...]]],
) -> dict[Key, jax.stages.Compiled | Exception]:
    """Compiles functions for their arguments (arrays or shapes), as many at a time as there are cores.

    A program that does not compile has its exception in the answer.
    """

    def compile_one(program):
        function, arguments = program
        try:
            return jax.jit(function).lower(*arguments).compile()
        except Exception as error:  # whatever a compiler raises: the caller decides what it means
            return error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(programs, pool.map(compile_one, programs.values()), strict=True))


def temporary_bytes(compiled: Any) -> int:
    """Device memory that a compiled program takes beside its arguments and outputs;
    0 where it is not known."""
    analysis = compiled.memory_analysis()
    return 0 if analysis is None else int(analysis.temp_size_in_bytes)


def ceilings(dtype: jax.typing.DTypeLike, *, size: int = 8192) -> Ceilings:
    """Measures a product of (size, size) matrices of a type and a copy of
    as many as 4 ``size``² f32 values."""
    key = jax.random.key(0)
    matrix = jax.random.normal(key, (size, size), dtype)
    large = jax.random.normal(key, (4 * size, size), jnp.float32)
    small = jnp.zeros((8,), jnp.float32)

    def product(a):
        return lax.dot_general(a, a, (((1,), (1,)), ((), ())), preferred_element_type=a.dtype)

    programs = {"product": (product, matrix), "copy": (jnp.negative, large), "nothing": (jnp.negative, small)}
    times = measure(
        {
            name: functools.partial(jax.jit(function).lower(argument).compile(), argument)
            for name, (function, argument) in programs.items()
        }
    )
    return Ceilings(
        flops=2e3 * size**3 / times["product"].median_ms,
        bytes=2e3 * large.nbytes / times["copy"].median_ms,
        dispatch_ms=times["nothing"].median_ms,
    )


def _chain(call: Call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        output = call()
    jax.block_until_ready(output)
    return (time.perf_counter() - start) * 1e3 / calls


def _chain_length(call: Call, chain_ms: float, least: int) -> int:
    jax.block_until_ready(call())
    return min(max(math.ceil(chain_ms / _chain(call, least)), least), 1000)
