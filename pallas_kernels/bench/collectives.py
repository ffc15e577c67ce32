"""What a compiled program sends between devices, read from its text."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(
    r"= (?P<type>\(.*\)|\S+) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(?P<dtype>pred|[suf]\d+|bf16)\[(?P<shape>[\d,]*)\]")
_CALL = re.compile(r"(?:calls|body|condition|to_apply|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One array that a collective gives to each device: ``kind`` and ``dtype`` as XLA names them."""

    kind: str
    dtype: str
    elements: int

    @property
    def nbytes(self) -> int:
        return self.elements * (1 if self.dtype == "pred" else int(self.dtype.lstrip("sufb")) // 8)


def collectives(program: str) -> list[Collective]:
    """All that a run of the program sends, in order: those of a loop as often as it turns, once where that
    is not known before. One instruction may combine several arrays."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = None
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            lines = bodies[match["name"]] = []
            entry = match["name"] if match["entry"] else entry
        else:
            lines.append(line)
    return [] if entry is None else list(_sent(bodies, entry))


def bytes_by_kind(program: str) -> dict[str, int]:
    """Bytes that arrive on each device in a run of the program, by ``"kind type"`` of collective."""
    total: Counter[str] = Counter()
    for collective in collectives(program):
        total[f"{collective.kind} {collective.dtype}"] += collective.nbytes
    return dict(total)


def _sent(bodies: dict[str, list[str]], name: str) -> Iterator[Collective]:
    for line in bodies.get(name, ()):
        if match := _INSTRUCTION.search(line):
            yield from _arrays(match)
            continue
        called = _CALL.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        if called:
            inner = [sent for computation in called for sent in _sent(bodies, computation)]
            trips = _TRIPS.search(line)
            yield from inner * (int(trips[1]) if trips else 1)


def _arrays(instruction: re.Match[str]) -> list[Collective]:
    arrays = [
        Collective(instruction["kind"], a["dtype"], math.prod(map(int, filter(None, a["shape"].split(",")))))
        for a in _ARRAY.finditer(instruction["type"])
    ]
    # Where the operands are named, too, they stand in front of the results.
    both = instruction["start"] and (
        instruction["kind"] != "all-reduce" or instruction["type"].startswith("((")
    )
    return arrays[len(arrays) // 2 :] if both else arrays
