"""New figures beside those of an older result file: ``--against`` of the benchmarks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.errors import UserError

_SAME = ("nnz", "batch_size", "checkpoint", "model")


def compare(
    document: Mapping[str, Any], path: str | Path, *, tolerance: float | None = None
) -> tuple[list[str], list[str]]:
    """Compares the medians of rows of the same name.

    Args:
      document: the new result, as `results.document` makes it.
      path: the older one, written by the same benchmark.
      tolerance: how much longer a case may take, as a share; by default there is no limit.

    Returns:
      What to print, a line a case; and one sentence for each case beyond the tolerance.

    Raises:
      UserError: the file is no such result, or it has no case of these.
    """
    old = read(path)
    lines = [f"beside {path}:", *_differences(document, old)]
    before = {row["name"]: row["median_ms"] for row in old["rows"]}
    beyond, found = [], 0
    for row in document["rows"]:
        name, now, then = row["name"], row["median_ms"], before.get(row["name"])
        if now is None or then is None:
            lines.append(f"  {name}: only {'there' if now is None else 'here'} has it a time")
            continue
        found += 1
        lines.append(f"  {name}: {now:.4g} ms, {now / then:.3f} of {then:.4g}")
        if tolerance is not None and now > then * (1 + tolerance):
            beyond.append(
                f"{name} takes {now / then - 1:.1%} longer than in {path}; --tolerance allows {tolerance:.1%}"
            )
    if not found:
        raise UserError(f"--against must have a case of this run; {path} has {', '.join(before) or 'none'}")
    return lines, beyond


def read(path: str | Path) -> dict[str, Any]:
    """An older result.

    Raises:
      UserError: the file cannot be read, or it is no result.
    """
    path = Path(path).expanduser()
    wanted = "--against must name a file that this benchmark's --json has written"
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        for row in loaded["rows"]:
            if not isinstance(row["name"], str) or not isinstance(row["median_ms"], float | int | None):
                raise TypeError(row)
        return dict(loaded)
    except OSError as error:
        raise UserError(f"{wanted}; {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{wanted}; {path} is none") from error


def _differences(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """What else differs between the two runs, a line each."""
    pairs = {
        "device": (_at(new, "device", "kind"), _at(old, "device", "kind")),
        "JAX": (_at(new, "versions", "jax"), _at(old, "versions", "jax")),
        **{name: (_at(new, "options", name), _at(old, "options", name)) for name in _SAME},
    }
    return [
        f"  {name} differs" + ("" if isinstance(here, Mapping) else f": {here} here, {there} there")
        for name, (here, there) in pairs.items()
        if _plain(here) != _plain(there)
    ]


def _at(document: Mapping[str, Any], *names: str) -> Any:
    value: Any = document
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _plain(value: Any) -> Any:
    """As it is after it went through JSON."""
    return json.loads(json.dumps(value))
