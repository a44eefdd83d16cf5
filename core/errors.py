"""Errors meant for a person: what was wrong, the value found, and what to do."""

from __future__ import annotations


class OneStepError(ValueError):
    """A mistake a person can mend; the message says what was wrong, the value found, and what to do."""
