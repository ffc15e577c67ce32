"""What a compiled program sends between devices, read from its text."""

import math
import re
from typing import NamedTuple

_INSTRUCTION = re.compile(
    r"= (?P<type>\(.*\)|\S+) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(?P<dtype>pred|[suf]\d+|bf16)\[(?P<shape>[\d,]*)\]")


class Collective(NamedTuple):
    """One array that a collective gives to each device: ``kind`` and ``dtype`` as XLA names them."""

    kind: str
    dtype: str
    elements: int

    @property
    def nbytes(self) -> int:
        return self.elements * (1 if self.dtype == "pred" else int(self.dtype.lstrip("sufb")) // 8)


def collectives(program: str) -> list[Collective]:
    """All of a program's, in order. One instruction may combine several arrays."""
    found = []
    for line in program.splitlines():
        if match := _INSTRUCTION.search(line):
            arrays = [
                Collective(
                    match["kind"], a["dtype"], math.prod(map(int, filter(None, a["shape"].split(","))))
                )
                for a in _ARRAY.finditer(match["type"])
            ]
            if match["start"] and match["kind"] != "all-reduce":
                arrays = arrays[len(arrays) // 2 :]  # operands stand in front of the results
            found += arrays
    return found
