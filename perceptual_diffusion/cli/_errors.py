"""The error that the command prints as one sentence, without a traceback."""


class UserError(ValueError):
    """Something the user can mend: the message says what."""


def plain(text: object) -> str:
    """Give a text with all that a terminal would obey, or that breaks a line, written as escapes: names come from anywhere."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
