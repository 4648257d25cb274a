"""Every error gossamer raises on purpose.

One root, so that a caller can catch all of them; the leaf says whose turn it is to act.
Messages have one form: where - what was got - what is allowed - what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "DataError",
    "GossamerError",
    "ModelError",
    "PlanError",
    "RecipeError",
    "RunError",
    "StateError",
    "nearest",
]


class GossamerError(Exception):
    """Root of all errors raised on purpose. ``exit_code`` is what the command line returns."""

    exit_code = 2


class RecipeError(GossamerError):
    """A recipe, option, budget or command-line value is wrong."""


class PlanError(GossamerError):
    """The methods of a stack, or their phases and groups, do not fit together."""


class ModelError(GossamerError):
    """A model, checkpoint or weight file cannot be used as asked."""


class DataError(GossamerError):
    """A data source is missing, empty, malformed or does not fit the model."""


class StateError(GossamerError):
    """A run folder, checkpoint or saved model is in a state that forbids the call."""


class RunError(GossamerError):
    """A run failed while working (non-finite loss, missing disk, unmet bound)."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, else ``""``."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
