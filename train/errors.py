"""The one exception that reaches a user as a sentence instead of a traceback."""


class UserError(Exception):
    """A mistake the user can mend: says what was expected, what was found, and what to do."""
