"""Errors that users meet. Each says what was wrong, what was expected and what to do."""

from __future__ import annotations


class SparseCompileError(Exception):
    """Base of every error this library raises on purpose."""


class ConfigError(SparseCompileError, ValueError):
    """An option is unknown, has a wrong type or value, or contradicts another one."""


class DeclinedSiteError(SparseCompileError):
    """`strict=True` and a site was left as it was, or a pass failed."""


class TargetError(SparseCompileError, ValueError):
    """`inspect` cannot find its TARGET, or what it names does not give a model and its inputs."""


class ModelError(SparseCompileError):
    """The user's model failed by itself; the original exception is the cause."""


class UnsupportedEnvironmentError(SparseCompileError, RuntimeError):
    """This machine lacks what was asked for: a GPU, a PyTorch version, a package."""


class WeightsError(SparseCompileError, RuntimeError):
    """Pretrained weights could not be found, fetched or verified."""


class OperatorError(SparseCompileError, ValueError):
    """A tensor given to one of our operators has a wrong shape, dtype or device."""


class RatesError(SparseCompileError, RuntimeError):
    """A device's rates could not be measured, or not be written."""


class OutOfPagesError(SparseCompileError, RuntimeError):
    """A pool has fewer pages left than were asked for; nothing was changed."""


class PageError(SparseCompileError, ValueError):
    """A page is given back, shared or written that is not held; nothing was changed."""


class TooLongError(SparseCompileError, ValueError):
    """A sequence would be longer than its block table or its pool; nothing was changed."""
