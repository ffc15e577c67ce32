"""How activity and dead neurons came about: from the metrics that the run of a checkpoint has left."""

import dataclasses
from pathlib import Path

from train.errors import UserError
from train.run import converted, curves
from train.run.checkpoint_files import SUBDIRECTORY


@dataclasses.dataclass(frozen=True)
class Training:
    """Curves over training, one point for one or several steps.

    Attributes:
      tokens: of training, where a point stands.
      nnz: by layer, mean active neurons of a token.
      dead_share: by layer, share of the neurons that none of the last ``dead_after`` tokens activated.
      dead_after: tokens of silence after which a neuron is dead.
    """

    tokens: tuple[float, ...]
    nnz: tuple[tuple[float, ...], ...]
    dead_share: tuple[tuple[float, ...], ...]
    dead_after: int


def read(checkpoint: Path, *, up_to: int, d_ff: int) -> tuple[Training | None, str]:
    """The curves up to the checkpoint's step, and one sentence on what they are or why there are none.

    Args:
      checkpoint: one step's directory.
      up_to: its step.
      d_ff: F.
    """
    if converted.is_converted(checkpoint):
        return None, "Nothing is known of the training: this is a converted model."
    workdir = checkpoint.parent.parent if checkpoint.parent.name == SUBDIRECTORY else checkpoint
    try:
        with curves.understood(workdir):
            return _read(workdir, up_to, d_ff)
    except UserError as error:
        return None, f"Nothing is known of the training: {error}."


def _read(workdir: Path, up_to: int, d_ff: int) -> tuple[Training | None, str]:
    per_step, facts, records = curves.read_records(workdir)
    steps = [
        record for record in records if record.get("l0_per_layer") is not None and record["step"] <= up_to
    ]
    if not steps:
        return None, f"Nothing is known of the training: {workdir} has no step up to {up_to} in its metrics."
    tokens = [float(record["step"] * per_step) for record in steps]
    found: dict[str, list[tuple[float, ...]]] = {"l0_per_layer": [], "dead_per_layer": []}
    for name, lines in found.items():
        for layer in range(len(steps[0][name])):
            points, line = curves.thinned(tokens, [record[name][layer] for record in steps])
            lines.append(tuple(line))
    training = Training(
        tokens=tuple(points),
        nnz=tuple(found["l0_per_layer"]),
        dead_share=tuple(tuple(count / d_ff for count in line) for line in found["dead_per_layer"]),
        dead_after=facts["config"]["model"]["sparsity"]["dead_after"],
    )
    return training, f"{len(steps):,} steps of {per_step:,} tokens, from the metrics of {workdir}."
