"""The exceptions that reach the command line."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one line: what was given, what is allowed, what to do.

    The command line prints the message alone and exits with status 2; library callers catch it like any other.
    """


class Interrupted(Exception):
    """The user stopped the run; its state is that of the last complete step. The argument is its folder, if any."""
