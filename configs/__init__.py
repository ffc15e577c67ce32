"""Presets: each module holds ``config``, a whole training run; ``load`` finds it by its name."""

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING

from train.errors import UserError

if TYPE_CHECKING:
    from train.config import TrainConfig


def names() -> list[str]:
    """The presets that there are, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> "TrainConfig":
    """The preset of that name.

    Raises:
      UserError: there is none; the sentence names the nearest.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"config must be one of {', '.join(known)}; got {name!r}{hint}")
    return importlib.import_module(f"{__name__}.{name}").config
