"""The exceptions that reach the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line: what was given, what is allowed, what to do.

    The command line prints the message alone and exits with status 2; library callers catch it like any other.
    """


class Interrupted(Exception):
    """The user stopped the run; its state is that of the last complete step. The argument is its folder, if any."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """``"did you mean 'x'? "`` for the allowed name closest to ``name``; empty where none is close."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe(error: BaseException) -> str:
    """The error's type and the first line of its message, if any."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
