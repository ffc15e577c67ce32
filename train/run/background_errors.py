"""Keeps off the terminal what orbax's background tasks print of errors that orbax also raises."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
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
    undo = keep_quiet()
    try:
        yield
    finally:
        undo()


def keep_quiet() -> Callable[[], None]:
    """Begins what `kept_quiet` does inside, and returns what ends it: a program that does not call that is
    quiet to its end, where Python collects what is left."""
    unraisable, uncaught = sys.unraisablehook, sys.excepthook
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    loggers = [logger for logger in loggers if _is_worth_logging not in logger.filters]

    def when_unraisable(found: Any) -> None:
        if not _is_cut_off(found.exc_value):
            unraisable(found)

    def when_uncaught(kind: Any, error: Any, traceback: Any) -> None:
        if not _is_cut_off(error):
            uncaught(kind, error, traceback)

    for logger in loggers:
        logger.addFilter(_is_worth_logging)
    sys.unraisablehook, sys.excepthook = when_unraisable, when_uncaught

    def undo() -> None:
        for logger in loggers:
            logger.removeFilter(_is_worth_logging)
        sys.unraisablehook, sys.excepthook = unraisable, uncaught

    return undo


def _is_cut_off(error: Any) -> bool:
    """Whether it is of a read or write that was under way when the first error ended orbax's event loop: some
    notice that it is closed, in TensorStore's threads too, others are cut off when they are collected."""
    return str(error) == "Event loop is closed" or isinstance(
        getattr(error, "__cause__", None), GeneratorExit
    )


def _is_worth_logging(record: logging.LogRecord) -> bool:
    """Drops what orbax logs of exceptions that it also raises, and of checkpoints without a held-out CE."""
    message = record.getMessage()
    if record.name == "asyncio":
        return "exception was never retrieved" not in message
    return not ("orbax" in record.pathname and (record.exc_info or "did not provide metrics" in message))
