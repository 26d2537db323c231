"""The exception that users see as a message instead of a traceback."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Invalid user input; the message names the input, the problem and the allowed values.

    The command line prints the message and exits with code 2.
    """


def nearest(word: str, allowed: Iterable[str], count: int = 3) -> str:
    """Return a hint such as ``did you mean 'apple' or 'apples'?``; empty if no word is similar."""
    matches = difflib.get_close_matches(word, list(dict.fromkeys(allowed)), n=count, cutoff=0.6)
    return f"did you mean {' or '.join(repr(name) for name in matches)}?" if matches else ""
