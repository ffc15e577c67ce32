"""How the program ends while a thread still compiles what nobody will use any more.

Python waits for its threads before it exits, and a compilation, which may take minutes, cannot be cut off.
Nor can its thread be left to itself while the interpreter is taken down: native code that then returns into
Python aborts with a stack dump. So the process is ended without taking the interpreter down, once all that it
has written is flushed.
"""

import contextlib
import logging
import os
import sys
import threading

COMPILING = "compile-unasked"
"""What the names of such threads begin with."""


def exit_with(status: int) -> None:
    """Ends the process with ``status``, as ``sys.exit`` does, but waits for no thread of that name."""
    if not any(thread.name.startswith(COMPILING) for thread in threading.enumerate()):
        sys.exit(status)
    import jax  # it is there already: it compiles

    if status == 0 and jax.process_count() > 1:
        jax.distributed.shutdown()  # where the others wait for this process, as JAX does it at an exit
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it has left
            stream.flush()
    os._exit(status)
