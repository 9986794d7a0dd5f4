"""What can go wrong in a run, by class."""

from __future__ import annotations


class PtxError(ValueError):
    """The text is no PTX that can be run here; the message gives the statement."""


class KernelFault(AssertionError):
    """The kernel did what a GPU forbids or leaves undefined; the message says where and what."""
