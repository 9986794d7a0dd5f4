"""The one error that the command line turns into a line for people."""

from __future__ import annotations


class StackError(Exception):
    """A failure that the user can act on.

    Args:
        message: One line: what failed, naming the file, option or patch.
        hint: One line: what to do next; printed after ``->``.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
