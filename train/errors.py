"""The one exception that reaches a user as a sentence instead of a traceback."""


class UserError(Exception):
    """A mistake the user can mend: says what was expected, what was found, and what to do."""


class LostProcessError(UserError):
    """Another process of the run does not answer any more, and this one cannot go on without it."""


def short_reason(error: Exception) -> str:
    """One short line of a message that may have many."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:120]
