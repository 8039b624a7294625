"""Errors a user can mend; the command line prints them as one line and exits with code 2."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. The message is one line: what is wrong, then what to do about it."""


class RanksError(Exception):
    """Processes that train together lost each other, or came apart; the message says how to go on."""


class StoppedError(Exception):
    """A run was interrupted and its state saved; the message says how to go on."""
