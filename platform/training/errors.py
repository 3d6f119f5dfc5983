"""How a training ends other than by its last step."""

from __future__ import annotations


class TrainingFailed(RuntimeError):
    """Training stopped; the message holds the first worker's error, the cause all of them."""


class Stopped(RuntimeError):
    """Training was asked to end, and has written a checkpoint; the message says how to go on."""
