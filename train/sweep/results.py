"""What a sweep has found so far: a JSON file that is whole at any moment, and that the next start reads."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from sparse_lm.model import num_parameters
from train.config_json import to_dict
from train.errors import UserError
from train.output import JsonFile
from train.run.manifest import quantity
from train.sweep.figures import Quality, Unions
from train.sweep.rows import Row, Sweep
from train.sweep.speed import Speed

JSON_NAME, TABLE_NAME, FIGURE_NAME = "sweep.json", "sweep.md", "sweep.png"


@dataclasses.dataclass
class Result:
    """A row and what is known of it.

    Attributes:
      row: the run.
      quality: None until it is finished.
      unions: None for layers that are never silent.
      speed: None where it was not measured.
    """

    row: Row
    quality: Quality | None = None
    unions: Unions | None = None
    speed: Speed | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        parts = {
            name: None if part is None else dataclasses.asdict(part)
            for name, part in (("quality", self.quality), ("unions", self.unions), ("speed", self.speed))
        }
        return {
            "name": self.row.name,
            "variant": self.row.variant,
            "l1": self.row.l1,
            "parameters": num_parameters(self.row.config.model),
            "config": to_dict(self.row.config),
            **parts,
        }


class Results:
    """All rows of a sweep.

    Args:
      sweep: what they are; its workdir must be there.
      preset: its name.

    Attributes:
      rows: in the sweep's order, with what an earlier start measured.
      notes: sentences on what is not measured.

    Raises:
      UserError: the file of an earlier start is no such file.
    """

    def __init__(self, sweep: Sweep, preset: str) -> None:
        self._preset = preset
        path = sweep.workdir / JSON_NAME
        self._known = _read(path)
        self._file = JsonFile(path)
        self.notes: list[str] = []
        self.rows = [self._as_known(Result(row)) for row in sweep.rows()]

    def _as_known(self, result: Result) -> Result:
        known = self._known.get(result.row.name)
        if known is None or json.dumps(known["config"]) != json.dumps(to_dict(result.row.config)):
            return result
        if known["quality"]:
            result.quality = Quality(**_tuples(known["quality"]))
        if known["unions"]:
            result.unions = Unions(**_tuples(known["unions"]))
        if known["speed"] and known["speed"]["device"] == jax.devices()[0].device_kind:
            result.speed = Speed.from_dict(known["speed"])
        return result

    @property
    def finished(self) -> list[Result]:
        """Rows whose run has ended."""
        return [result for result in self.rows if result.quality is not None]

    def scale(self) -> str:
        """How small the sweep is, in one sentence."""
        config = self.rows[0].row.config
        model, tokens = config.model, config.steps * config.batch_size * config.model.context_length
        return (
            f"Preset {self._preset}: {quantity(num_parameters(model))} parameters, {model.num_layers} "
            f"layers, d_model {model.d_model}, d_ff {model.d_ff}; {config.steps:,} steps of "
            f"{config.batch_size} × {model.context_length} tokens, {quantity(tokens)} in all; one seed "
            f"({config.seed}) and one order of the data for all rows; {jax.devices()[0].device_kind}, "
            f"JAX {jax.__version__}"
        )

    def write(self) -> None:
        """Puts all that is known into the file."""
        self._file.write(
            {
                "preset": self._preset,
                "scale": self.scale(),
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "notes": self.notes,
                "rows": [result.to_dict() for result in self.rows],
            }
        )


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of an earlier start by name."""
    if not path.exists():
        return {}
    try:
        return {row["name"]: dict(row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} must be the file of an earlier sweep; found another file: choose another --workdir"
        ) from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """What went through JSON as lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
