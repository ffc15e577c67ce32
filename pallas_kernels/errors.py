"""The error for what a caller may ask for and cannot have."""


class RequestError(ValueError):
    """A setting that is out of range, or that cannot run here; the message is one sentence for whoever asked.

    A program may show it as it stands, without a traceback. A plain ValueError, as for arrays of the wrong
    shape, is a mistake in the calling code.
    """
