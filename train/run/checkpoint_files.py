"""What lies in a directory of checkpoints: which are complete, which half-written, and which one is meant."""

import itertools
import re
from pathlib import Path

from train.errors import UserError
from train.run import converted

SUBDIRECTORY = "checkpoints"
_ITEMS = ("params", "rest", "data", "run", "tokenizer")
_HALF_WRITTEN = ".half-written"
UNDER_WAY = ".orbax-checkpoint-tmp"  # how orbax ends the name of a save that is not whole yet


def check_local(option: str, directory: str | Path) -> None:
    """Raises UserError for the address of a bucket, which is no directory of this machine."""
    scheme, separator, _ = str(directory).partition("://")
    if separator:
        raise UserError(
            f"{option} must be a directory that this machine has mounted; got {directory}: mount the bucket "
            f"and name the place where it is mounted, for a run appends to its files and {scheme}:// cannot"
        )


def complete_steps(directory: Path) -> list[int]:
    """Steps with a complete checkpoint under ``directory``, in rising order."""
    return sorted(int(path.name) for path in entries(directory) if _is_step(path) and _is_complete(path))


def find_checkpoint(directory: str | Path) -> Path:
    """The step's directory that ``directory`` means: itself, or the newest complete one of a run.

    Raises:
      UserError: there is no such directory, or no complete checkpoint in it.
    """
    check_local("checkpoint", directory)
    given = Path(directory).expanduser().absolute()
    if not given.is_dir():
        found = f"{given} is a file" if given.exists() else f"there is none at {given}"
        raise UserError(f"a checkpoint must be a directory; {found}")
    if _is_complete(given) or converted.is_converted(given):
        return given
    if is_half_written(given) or any((given / item).is_dir() for item in _ITEMS):
        raise UserError(f"{given} is a half-written checkpoint: choose a complete one")
    root = given / SUBDIRECTORY if (given / SUBDIRECTORY).is_dir() else given
    steps = complete_steps(root)
    if steps:
        return root / str(steps[-1])
    partial = [path.name for path in entries(root) if is_half_written(path)]
    if partial:
        raise UserError(
            f"{root} must hold a complete checkpoint; found only half-written ones: {', '.join(partial)}: "
            "train again with this workdir"
        )
    raise UserError(f"{given} must hold a checkpoint; found none: pass the workdir of a training run")


def is_checkpoint(directory: str | Path) -> bool:
    """Whether `find_checkpoint` finds one there."""
    try:
        find_checkpoint(directory)
    except UserError:
        return False
    return True


def complete_before(path: Path) -> Path | None:
    """The complete checkpoint of the same run that comes before ``path``, if there is one."""
    earlier = [s for s in complete_steps(path.parent) if path.name.isdecimal() and s < int(path.name)]
    return path.with_name(str(earlier[-1])) if earlier else None


def is_half_written(path: Path) -> bool:
    """Whether ``path`` is a save under way, or has a step's name and lacks a part, perhaps set aside."""
    leftover = re.match(rf"\d+({re.escape(UNDER_WAY)}|{re.escape(_HALF_WRITTEN)})", path.name) is not None
    return leftover or (_is_step(path) and not _is_complete(path))


def set_aside(directory: Path) -> None:
    """Renames what has the name of a step and is no complete checkpoint, so that the run can save those
    steps; deletes nothing."""
    for path in entries(directory):
        if _is_step(path) and is_half_written(path):
            names = (f"{path.name}{_HALF_WRITTEN}{number or ''}" for number in itertools.count())
            free = (path.with_name(name) for name in names)
            path.rename(next(to for to in free if not to.exists() and not to.is_symlink()))


def entries(directory: Path) -> list[Path]:
    """What lies in a directory, by name; nothing if there is none."""
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _is_step(path: Path) -> bool:
    """Whether the name is one that a save gives, which would replace what is there; ``08`` is none."""
    return re.fullmatch(r"0|[1-9][0-9]*", path.name) is not None


def _is_complete(path: Path) -> bool:
    files = (
        "_CHECKPOINT_METADATA",
        "params/_METADATA",
        "rest/_METADATA",
        "run/metadata",
        "tokenizer/tokenizer.json",
    )
    return all((path / item).is_dir() for item in _ITEMS) and all((path / file).is_file() for file in files)
