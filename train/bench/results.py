"""What the whole-model benchmarks have in common: some options, and their result files."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pallas_kernels.bench import machine
from pallas_kernels.errors import RequestError
from train.bench import against, nvml
from train.config_json import to_dict
from train.errors import UserError
from train.output import JsonFile


@dataclasses.dataclass(frozen=True)
class CommonOptions:
    """Where the figures go, and what they are compared with.

    Attributes:
      json: also write all figures to this file.
      against: an older file of --json: print how the times compare with those in it.
      tolerance: with --against, the share by which a case may be slower before the program exits with 1.
      debug: show the traceback of an error.

    Raises:
      RequestError: a tolerance that says nothing or cannot be, or a new result that would replace the older
        one before they are compared.
    """

    json: str | None = None
    against: str | None = None
    tolerance: float | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        if self.against is None and self.tolerance is not None:
            raise RequestError("tolerance needs --against, the result that it is of; got none")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise RequestError(f"tolerance must be at least 0; got {self.tolerance}")
        if self.json is not None and _absolute(self.json) == _absolute(self.against):
            raise RequestError(
                f"--json must name another file than --against, which it would replace; got {self.json}"
            )

    def open_files(self) -> JsonFile:
        """The file of ``json``, ready for figures, once the one of ``against`` has been looked at.

        Raises:
          UserError: the first cannot be written, or the second is no result.
        """
        if self.against is not None:
            against.read(self.against)
        return JsonFile(self.json)

    def print_against(self, console: Console, found: Mapping[str, Any]) -> None:
        """Prints the ratios that ``against`` asks for.

        Raises:
          UserError: a case is slower than ``tolerance`` allows, or the file is no result of this benchmark.
        """
        if self.against is None:
            return
        lines, beyond = against.compare(found, self.against, tolerance=self.tolerance)
        for line in lines:
            console.print(line, markup=False)
        if beyond:
            raise UserError("; ".join(beyond))


def _absolute(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser().resolve()


def machine_record() -> dict[str, Any]:
    """Device, versions and, where NVML has them, clocks as they are now. Starts JAX's device."""
    gpu, _ = nvml.find()
    return machine.record() | ({} if gpu is None else {"clocks": gpu.record()})


def document(
    options: Any, rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Everything of a run, ready for JSON.

    Args:
      options: the dataclass of the benchmark.
      rows: each with ``name`` and ``median_ms``, whatever else it has.
      record: what they were taken on, from `machine_record`.
      more: further entries.
    """
    return {"options": to_dict(options), **record, **more, "rows": list(rows)}


def out_of_memory(error: Exception) -> str:
    """What a row says of the error; any other error is raised again."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return "out of memory: " + str(error).splitlines()[0]


def program_bytes(compiled: Any) -> int | None:
    """What a compiled program holds at once on a device: arguments, outputs that are not in their place, and
    temporary buffers; None where the compiler does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(analysis.argument_size_in_bytes + outputs + analysis.temp_size_in_bytes)


def mebibytes(count: int | None) -> str:
    """For a table."""
    return "" if count is None else f"{count / 2**20:,.0f}"
