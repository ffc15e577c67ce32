"""What the program says of an error: one sentence where it is the user's to mend."""

import dis

from train.errors import UserError

_OUR_PACKAGES = ("train", "sparse_lm", "pallas_kernels", "configs")


def sentence_of(error: Exception) -> str | None:
    """What to tell the user, or None if this is no mistake of theirs."""
    if isinstance(error, UserError):
        return str(error)
    if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
        return (
            "the device must have room for model and batch; it ran out of memory: lower the batch size or "
            "the context length, or in training raise --optimizer.accumulation or set --model.remat full"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the operating system'}: {error.strerror}"
    return str(error) if isinstance(error, ValueError) and _is_raised_by_us(error) else None


def _is_raised_by_us(error: Exception) -> bool:
    """Whether a ``raise`` of our packages made the error, so that its text is a sentence for the user."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    package = trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    instruction = dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]]
    return package in _OUR_PACKAGES and instruction == "RAISE_VARARGS"
