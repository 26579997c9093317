"""The one exception for bad input: the command line prints it as a single line and exits with status 2."""


class InputError(Exception):
    """What the user asked for cannot be done; the message names the key or file and what would be right."""
