"""What the program says of an error: one sentence where it is the user's to mend."""

from train.errors import UserError


def sentence_of(error: Exception) -> str | None:
    """What to tell the user, or None if this is no mistake of theirs."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the operating system'}: {error.strerror}"

    # Imported only now: they bring JAX along.
    import jax

    from pallas_kernels.errors import RequestError

    if isinstance(error, RequestError):
        return str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return (
            "the device must have room for model and batch; it ran out of memory: lower the batch size or "
            "the context length, or in training raise --optimizer.accumulation or set --model.remat full"
        )
    return None
