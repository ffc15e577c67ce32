"""Keeps off the terminal what orbax's background tasks print of errors that orbax also raises."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

# Makes the logger "absl", whose records name the file that logs. A plain logger of that name, if one were
# made here first, would name absl's own file in all of them, and orbax's could not be told from others.
import absl.logging  # noqa: F401


@contextlib.contextmanager
def kept_quiet() -> Iterator[None]:
    """Inside, tracebacks of tasks that an error has cut off are dropped; every other one is shown as ever.

    Python complains of such tasks when it collects them; to collect inside what is left of them, drop the
    error and call ``gc.collect``.
    """
    previous = sys.unraisablehook
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]

    def hook(unraisable: Any) -> None:
        # Reads and writes still under way when the first error ends orbax's event loop: some notice that it
        # is closed, others are cut off (GeneratorExit) when they are collected.
        error = unraisable.exc_value
        if str(error) != "Event loop is closed" and not isinstance(
            getattr(error, "__cause__", None), GeneratorExit
        ):
            previous(unraisable)

    for logger in loggers:
        logger.addFilter(_is_worth_logging)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_worth_logging)
        sys.unraisablehook = previous


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Drops what orbax logs of exceptions that it also raises, and of checkpoints without a held-out CE."""
    message = record.getMessage()
    if record.name == "asyncio":
        return "exception was never retrieved" not in message
    return not ("orbax" in record.pathname and (record.exc_info or "did not provide metrics" in message))
