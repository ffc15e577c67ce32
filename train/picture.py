"""Pictures that commands draw with matplotlib, which is an extra: what stands in their way is said before the
work that they show."""

from pathlib import Path
from typing import Any

from train.errors import UserError

_ENDINGS = (".png", ".svg", ".pdf")


def check_matplotlib(what: str) -> None:
    """Raises UserError where matplotlib is missing; ``what`` needs it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} needs the package matplotlib, which is not installed: pip install 'sparse-lm[plot]'"
        ) from error


def check_ending(out: str | Path, *, option: str) -> None:
    """Raises ValueError where ``out``, which ``option`` names, has no ending of a picture."""
    if Path(out).suffix not in _ENDINGS:
        raise ValueError(f"{option} must end with {', '.join(_ENDINGS[:-1])} or {_ENDINGS[-1]}; got {out}")


def check_picture(out: str | Path, *, option: str) -> None:
    """Raises UserError where ``out``, which ``option`` names, has no ending of a picture or no directory."""
    try:
        check_ending(out, option=option)
    except ValueError as error:
        raise UserError(str(error)) from error
    path = Path(out).absolute()
    if not path.parent.is_dir():
        raise UserError(f"{option} must name a file in a directory that is there; {path.parent} is none")


def save_picture(figure: Any, out: str | Path, *, option: str) -> None:
    """Writes a matplotlib figure. Raises UserError if it cannot be written."""
    try:
        figure.savefig(out, dpi=150)
    except OSError as error:
        raise UserError(
            f"{option} must name a picture that can be written; {out}: {error.strerror}"
        ) from error
