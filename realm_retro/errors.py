"""The one exception that command lines turn into a single readable line."""


class UserError(ValueError):
    """Something that the user can mend: a path, a value, a file, an environment.

    The message is one line that names the file, the value, the limit and the
    remedy. Command lines print it without a traceback and exit with status 2.
    """

    def __init__(self, message: str):
        # What it names (a path, a field of a file, a library's error) may hold breaks.
        super().__init__(" ".join(message.splitlines()))
