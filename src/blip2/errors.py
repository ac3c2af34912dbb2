"""The one exception a user is meant to read."""


class InputError(ValueError):
    """Something a user gave cannot be used.

    The message is one line that says what was found, what was expected and what to do. The command line prints
    it without a traceback and exits with status 2; everything else that is raised is a bug of ours.
    """
