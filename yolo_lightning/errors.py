"""The one exception that people see as a message instead of a traceback."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Say what is wrong with something that a person gave: what, where, and what is allowed.

    The command line prints the message alone and exits with code 2.
    """


def nearest(word: str, allowed: Iterable[str], count: int = 3) -> str:
    """Return a hint such as ``did you mean 'apple' or 'apples'?``, empty where nothing is near."""
    found = difflib.get_close_matches(word, list(dict.fromkeys(allowed)), n=count, cutoff=0.6)
    return f"did you mean {' or '.join(repr(name) for name in found)}?" if found else ""
