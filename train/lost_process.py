"""A run of several processes when one of them dies: each of the others ends with one sentence.

JAX raises an error where the others wait for an answer, or its distributed runtime aborts them: its client,
which has no callback that Python could set, writes a stack trace to file descriptor 2 and calls ``abort``.
`abort_as_sentence` reads what native code writes there, and ends the process itself when it finds that; the
abort is made to wait for it.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax

from train.errors import LostProcessError, short_reason

_ABORTING = b"JAX distributed service detected fatal errors"  # what its client writes before it aborts
_BURST_SECONDS = 0.05  # lines that belong together come within microseconds of each other


@contextlib.contextmanager
def losing_no_process() -> Iterator[None]:
    """Turns what the runtime raises when another process of the run has died into LostProcessError, and its
    abort into the same sentence; a run of one process is left as it is."""
    if jax.process_count() == 1:
        yield
        return
    with abort_as_sentence(f"sparse-lm: {lost_process('it does not answer any more')}"):
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise lost_process(short_reason(error)) from error


def lost_process(reason: str) -> LostProcessError:
    """What to say of another process's death."""
    return LostProcessError(
        f"process {jax.process_index()} of {jax.process_count()} has lost another process of the run "
        f"({reason}); checkpoints are intact: start all processes again, or another number of them, to go on "
        "from the newest"
    )


@contextlib.contextmanager
def abort_as_sentence(sentence: str) -> Iterator[None]:
    """Inside, where JAX's distributed runtime would abort the process with a stack trace, the process ends
    with ``sentence`` on its standard error and a status of 1. All else that is written there passes.

    A LostProcessError that leaves the context ends the process as well, so that the abort stays held back
    behind it, and only Python writes to standard error from then on.

    Args:
      sentence: without the end of the line.
    """
    terminal, ending = os.dup(2), threading.Lock()
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    relay = threading.Thread(
        target=_relay, args=(reading, terminal, sentence, ending), name="stderr", daemon=True
    )
    relay.start()
    # Python's own handlers run between two bytecodes of the main thread, which is too late for an abort.
    handler = _set_abort_handler(_sleep_of_libc())
    try:
        yield
    except LostProcessError:
        ending.acquire()  # for ever; whoever comes second waits for the first to end the process
        sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1, errors="backslashreplace")
        raise
    except BaseException:
        _give_back(handler, relay, reading, terminal)
        raise
    else:
        _give_back(handler, relay, reading, terminal)


def _give_back(handler: int | None, relay: threading.Thread, reading: int, terminal: int) -> None:
    """Lets native code write to the terminal again, and abort at once."""
    os.dup2(terminal, 2)
    relay.join(timeout=1)  # a child process may hold the pipe open for longer
    _set_abort_handler(handler)
    if not relay.is_alive():
        os.close(reading)
        os.close(terminal)


def _relay(reading: int, terminal: int, sentence: str, ending: threading.Lock) -> None:
    """Passes on what is written, up to the announcement of an abort, or until the process ends otherwise."""
    while True:
        select.select([reading], [], [])
        time.sleep(_BURST_SECONDS)
        written = os.read(reading, 1 << 16)
        if not written:
            return
        aborting = _ABORTING in written
        if ending.locked() or (aborting and not ending.acquire(blocking=False)):
            continue
        with contextlib.suppress(OSError):  # a terminal that hung up takes no more text
            os.write(terminal, f"{sentence}\n".encode() if aborting else written)
        if aborting:
            os._exit(1)


def _set_abort_handler(handler: int | None) -> int | None:
    """Sets the C function that ``abort`` calls first, as an address, and returns the one before."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    previous: int | None = libc.signal(signal.SIGABRT, handler)
    return previous


def _sleep_of_libc() -> int | None:
    """As the handler of a signal it sleeps for as many seconds as the signal's number, which is 6."""
    return ctypes.cast(ctypes.CDLL(None).sleep, ctypes.c_void_p).value
