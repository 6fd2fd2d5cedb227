"""Errors that are shown as one line, and suggestions for misspelled names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class Stopped(BaseException):
    """The system asked the program to end, and its work so far is kept.

    Like ``KeyboardInterrupt`` it is no ``Exception``: a sweep must not go on to its next job.
    """


class RankLost(BaseException):
    """Another process of this program has ended: shown as one line, exit code 1."""


class UserError(Exception):
    """A mistake of the user: shown as one line without a traceback, exit code 2."""


class ReportedElsewhere(BaseException):
    """A mistake of the user that another process reports: exit code 2, no output.

    It is no ``Exception``: no handler of this process's own errors may take it for one.
    """


def nearest(word: object, choices: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` for the choice most like ``word``, or nothing."""
    close = get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'? " if close else ""
