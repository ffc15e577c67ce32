"""What the result files of whole-model benchmarks have in common."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pallas_kernels.bench import machine
from train.bench import against, nvml
from train.config import to_dict
from train.errors import UserError
from train.output import JsonFile


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


def check_against(path: str | None, tolerance: float | None, *, json: str | None) -> None:
    """Raises ValueError for a tolerance that says nothing or cannot be, and where the new result would
    replace the older one before they are compared.

    Args:
      path: of ``--against``.
      tolerance: of ``--tolerance``.
      json: of ``--json``.
    """
    if path is None and tolerance is not None:
        raise ValueError("tolerance needs --against, the result that it is of; got none")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0; got {tolerance}")
    if path is not None and json is not None and _absolute(path) == _absolute(json):
        raise ValueError(f"--json must name another file than --against, which it would replace; got {json}")


def _absolute(path: str) -> Path:
    return Path(path).expanduser().resolve()


def open_files(json: str | None, path: str | None) -> JsonFile:
    """The file of ``--json``, ready for figures, once the one of ``--against`` has been looked at.

    Raises:
      UserError: the first cannot be written, or the second is no result.
    """
    if path is not None:
        against.read(path)
    return JsonFile(json)


def print_against(
    console: Console, found: Mapping[str, Any], path: str | None, tolerance: float | None
) -> None:
    """Prints the ratios that ``--against`` asks for.

    Raises:
      UserError: a case is slower than ``tolerance`` allows, or the file is no result of this benchmark.
    """
    if path is None:
        return
    lines, beyond = against.compare(found, path, tolerance=tolerance)
    for line in lines:
        console.print(line, markup=False)
    if beyond:
        raise UserError("; ".join(beyond))


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
