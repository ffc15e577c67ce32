"""The one exception of a conversion that cannot be made."""


class ConversionError(ValueError):
    """A directory or a model that cannot be converted: says what was expected, what was found, what to do."""
