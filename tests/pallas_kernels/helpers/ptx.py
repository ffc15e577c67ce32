"""An emulator of PTX, for epilogues that need a GPU to run: one warpgroup of 128 threads, and the
instructions that the epilogues of the gates use.

Threads are numpy arrays. A thread has its own place in the program; those that are furthest behind go on
first, so that threads which part at a branch meet again behind it.
"""

import operator
import re
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

THREADS = 128
_LANES = 32
_COMPARE = {
    "lt": operator.lt,
    "gt": operator.gt,
    "eq": operator.eq,
    "ne": operator.ne,
    "gtu": lambda first, second: ~(first <= second),  # or unordered
}
_ARITHMETIC = {
    "and": operator.and_, "or": operator.or_, "add": operator.add, "sub": operator.sub, "mul": operator.mul,
}  # fmt: skip
_PACKED = {"bf16x2": jnp.bfloat16, "f16x2": jnp.float16}


class Memory:
    """A space of bytes in which arrays stand at addresses."""

    def __init__(self, *arrays: np.ndarray):
        self.addresses = np.cumsum([0, *(array.nbytes for array in arrays)])
        self._arrays = arrays
        self.bytes = np.concatenate([array.reshape(-1).view(np.uint8) for array in arrays])

    def arrays(self) -> list[np.ndarray]:
        parts = zip(self.addresses, self._arrays, strict=False)
        return [
            self.bytes[start : start + a.nbytes].view(a.dtype).reshape(a.shape).copy() for start, a in parts
        ]


def run(text: str, operands: Sequence[np.ndarray | int], memory: Memory) -> None:
    """Runs a program whose operands are $0, $1, ...: a value for all threads, or one for each."""
    _Warpgroup(text, operands, memory).run()


class _Warpgroup:
    def __init__(self, text, operands, memory):
        self.memory = memory.bytes
        self.registers = {f"${i}": _bits(np.broadcast_to(each, THREADS)) for i, each in enumerate(operands)}
        self.registers["%tid.x"] = np.arange(THREADS, dtype=np.uint64)
        self.code, self.labels = [], {}
        for part in re.split(r"[;\n]", re.sub(r"\.reg[^;]*;", "", text).strip().strip("{}")):
            label, line = re.fullmatch(r"\s*(?:(\w+):)?(.*?)\s*", part).groups()
            if label:
                self.labels[label] = len(self.code)
            if line.strip():
                guard, name, rest = re.fullmatch(r"\s*(?:@(!?\w+) )?([\w.:]+) (.*)", line).groups()
                self.code.append((guard, name.split("."), re.findall(r"\{.*?\}|\[.*?\]|[^,\s]+", rest)))

    def run(self):
        at = np.zeros(THREADS, int)
        while (behind := at.min()) < len(self.code):
            here = at == behind
            guard, name, arguments = self.code[behind]
            active = here
            if guard:
                active = here & (self.value(guard.lstrip("!")).astype(bool) != guard.startswith("!"))
            at[here] += 1
            if name[0] == "bra":
                at[active] = self.labels[arguments[0]]
            elif name[0] in ("st", "ld", "red"):
                self.access(name, arguments, active)
            else:
                self.assign(
                    arguments[0], getattr(self, f"_{name[0]}", self.arithmetic)(name, arguments[1:]), active
                )

    def value(self, argument):
        if argument.startswith("0f"):
            return np.full(THREADS, int(argument[2:], 16), np.uint64)
        if re.match(r"-?\d", argument):
            return np.full(THREADS, int(argument, 0), np.int64).view(np.uint64)
        return self.registers[argument]

    def values(self, name, arguments):
        """Of the type that an instruction ends in."""
        return [_of_type(self.value(each), name[-1]) for each in arguments]

    def assign(self, register, value, active):
        before = self.registers.get(register, np.zeros(THREADS, np.uint64))
        self.registers[register] = np.where(active, _bits(value), before)

    def access(self, name, arguments, active):
        """A load, store or addition in memory."""
        (place,) = (each for each in arguments if each.startswith("["))
        base, _, offset = place.strip("[]").partition("+")
        size = int(name[-1][1:]) // 8
        values = [
            each for argument in arguments if argument != place for each in re.findall(r"[^{},\s]+", argument)
        ]
        for nth, value in enumerate(values):
            address = self.value(base).astype(np.int64) + int(offset or 0) + nth * size
            for thread in np.flatnonzero(active):
                cell = self.memory[address[thread] : address[thread] + size].view(f"u{size}")
                assert address[thread] >= 0
                assert cell.size == 1, "out of bounds"
                if name[0] == "ld":
                    self.registers.setdefault(value, np.zeros(THREADS, np.uint64))[thread] = cell[0]
                else:
                    new = self.value(value)[thread] + (cell[0] if name[0] == "red" else 0)
                    cell[0] = new & np.uint64((1 << 8 * size) - 1)

    # -- instructions that give a value: what it is, from the parts of the name and the arguments ------------

    def arithmetic(self, name, arguments):
        kind = "u64" if "wide" in name or name[-1] in ("s64", "b64") else name[-1]
        return _of_type(_ARITHMETIC[name[0]](*self.values([*name[:-1], "u64"], arguments)), kind)

    def _mov(self, name, arguments):
        return self.values(name, arguments)[0]

    def _mad(self, name, arguments):
        first, second, third = self.values(["u64"], arguments)
        return _of_type(first * second + third, "u64" if "wide" in name else name[-1].replace("s64", "u64"))

    def _shl(self, name, arguments):
        value, by = self.values(["u64"], arguments)
        return _of_type(value << np.minimum(by, np.uint64(63)), name[-1])

    def _shr(self, name, arguments):
        value, by = self.values(name, arguments)
        return value >> np.minimum(by, np.uint64(63))

    def _setp(self, name, arguments):
        first, second = self.values(name, arguments[:2])
        result = _COMPARE[name[1]](first, second)
        return result & self.value(arguments[2]).astype(bool) if "and" in name else result

    def _selp(self, name, arguments):
        first, second = self.values(["u64"], arguments[:2])
        return np.where(self.value(arguments[2]).astype(bool), first, second)

    def _max(self, name, arguments):
        return np.maximum(*self.values(name, arguments))  # which is NaN where either is

    def _cvt(self, name, arguments):
        if name[-2] in _PACKED:
            high, low = (
                np.asarray(jnp.asarray(each).astype(_PACKED[name[-2]])).view(np.uint16).astype(np.uint64)
                for each in self.values(name, arguments)
            )
            return high << np.uint64(16) | low
        return self.values(name, arguments)[0]

    def _popc(self, name, arguments):
        return np.bitwise_count(self.values(name, arguments)[0])

    def _brev(self, name, arguments):
        return _bit_matrix(self.values(name, arguments)[0])[:, ::-1] @ _POWERS

    def _clz(self, name, arguments):
        bits = _bit_matrix(self.values(name, arguments)[0])[:, ::-1]
        return np.where(bits.any(axis=1), bits.argmax(axis=1), 32)

    def _vote(self, name, arguments):
        votes = self.value(arguments[0]).astype(bool).reshape(-1, _LANES)
        return np.repeat(votes @ _POWERS, _LANES)

    def _shfl(self, name, arguments):
        return self.value(arguments[0])[np.arange(THREADS) ^ int(arguments[1])]

    def _movmatrix(self, name, arguments):
        """A lane holds two neighbours of a row of eight: row lane / 4, the columns from 2 (lane % 4) on."""
        words = self.value(arguments[0]).astype(np.uint32)
        matrices = words.view(np.uint16).reshape(-1, 8, 8)
        return np.ascontiguousarray(matrices.swapaxes(1, 2)).reshape(-1).view(np.uint32)


_POWERS = np.uint64(1) << np.arange(_LANES, dtype=np.uint64)


def _bit_matrix(words):
    return (words[:, None] >> np.arange(_LANES, dtype=np.uint64) & np.uint64(1)).astype(np.uint64)


def _of_type(bits, kind):
    """Values of bits: f32 and signed ones as such, others unsigned in 64 bits."""
    match kind:
        case "f32":
            return bits.astype(np.uint32).view(np.float32)
        case "s32":
            return bits.astype(np.uint32).view(np.int32)
        case "b64" | "u64" | "s64" | "pred":
            return bits
        case _:
            return bits & np.uint64((1 << int(kind[1:])) - 1)


def _bits(values):
    values = np.ascontiguousarray(values)
    if values.dtype == np.float32:
        return values.view(np.uint32).astype(np.uint64)
    if values.dtype == np.int32:
        return values.view(np.uint32).astype(np.uint64)
    return values.astype(np.uint64)
