"""A run's figures as one small document, from its metrics file and its manifest."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.run import curves

_LAST = 100
"""Steps whose mean says where a run stands: one step's figures follow its batch."""
_OF_A_START = ("devices", "processes", "versions", "command")
_OF_AN_EVALUATION = ("step", "tokens", "ce", "bits_per_byte", "l0", "l0_per_layer")


def read(workdir: Path) -> dict[str, Any]:
    """What the run in a work directory did, ready for JSON.

    Returns:
      ``run``, its name; ``start``, the devices, versions and command of its newest start; ``config``;
      ``tokens_per_step``; ``steps``, those that are done; ``tokens_per_second`` over all of them; ``last``,
      means over the last hundred; ``plans``, the formats of the layers and the step from which they ran, of a
      planned run; ``heldout``, its evaluations; and ``curves``, what `train.run.curves` draws, each as
      ``tokens`` and ``values``. Speeds are over all devices, and leave out evaluations and checkpoints.

    Raises:
      UserError: there is no run in the directory, it has no step yet, or its records are not what a run
        writes.
    """
    with curves.understood(workdir):
        per_step, facts, records = curves.read_records(workdir)
        steps = [record for record in records if record.get("ce") is not None]
        evaluations = [record["evaluation"] for record in records if "evaluation" in record]
        drawn = curves.read(workdir)
        return {
            "run": drawn.name,
            "start": {name: facts["history"][-1][name] for name in _OF_A_START},
            "config": facts["config"],
            "tokens_per_step": per_step,
            "steps": steps[-1]["step"],
            "tokens_per_second": _speed(steps),
            "last": _last(steps, facts["config"]["model"]["d_ff"], per_step),
            "plans": _plans(steps),
            "heldout": [{name: evaluation[name] for name in _OF_AN_EVALUATION} for evaluation in evaluations],
            "curves": {name: _rounded(line) for name, line in drawn.lines.items()},
        }


def _last(steps: Sequence[dict[str, Any]], d_ff: int, per_step: int) -> dict[str, Any]:
    """Means over the last steps; neurons and tokens of a layer as shares, speeds as tokens over time."""
    last = [record for record in steps if record["step"] > steps[-1]["step"] - _LAST]

    def layers(name: str, whole: int = 1) -> list[float]:
        return [
            float(statistics.fmean(layer) / whole) for layer in zip(*(r[name] for r in last), strict=True)
        ]

    found: dict[str, Any] = {
        "steps": len(last),
        "tokens_per_second": _speed(last),
        "ce": statistics.fmean(record["ce"] for record in last),
        "l0": statistics.fmean(record["l0"] for record in last),
        "l0_per_layer": layers("l0_per_layer"),
        "dead_share_per_layer": layers("dead_per_layer", d_ff),
        "dense_share_per_layer": layers("dense_tokens_per_layer", per_step),
    }
    if all("union_per_layer" in record for record in last):
        found["union_per_layer"] = layers("union_per_layer")
    return found


def _speed(steps: Sequence[dict[str, Any]]) -> float | None:
    """Tokens over time, from reports that are of equally many steps; None where there is none."""
    speeds = [record["tokens_per_second"] for record in steps if "tokens_per_second" in record]
    return statistics.harmonic_mean(speeds) if speeds else None


def _plans(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each plan with the first step that ran it."""
    planned = [(record["step"], record["plan"]) for record in steps if "plan" in record]
    return [
        {"step": next(group)[0], "plan": plan}
        for plan, group in itertools.groupby(planned, key=lambda each: each[1])
    ]


def _rounded(line: tuple[list[float], list[float]]) -> dict[str, list[float]]:
    """A curve in as many digits as a picture shows, and some."""
    tokens, values = line
    return {"tokens": tokens, "values": [float(f"{value:.6g}") for value in values]}
