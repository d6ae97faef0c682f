"""The error that the command prints as one sentence, without a traceback."""


class UserError(ValueError):
    """Something the user can mend: the message says what."""
