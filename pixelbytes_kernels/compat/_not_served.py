"""The error for what the real packages have and the stand-ins do not."""

from __future__ import annotations


class NotServed(NotImplementedError, ImportError):
    """Names the option. An ImportError too, so that code which tries an import and goes on without it still goes on."""
