"""What vtprune raises. Every message says what was given, what is allowed, and what to do."""

from __future__ import annotations


class VTPruneError(Exception):
    """Base of all errors of this package."""


class ConfigError(VTPruneError, ValueError):
    """An argument is not usable: unknown name, unknown option, value out of range."""


class UnsupportedError(VTPruneError, NotImplementedError):
    """A combination of model, strategy and call that cannot give a right answer."""


class InputError(VTPruneError, ValueError):
    """The tensors of one call do not fit together."""


class HookError(VTPruneError, RuntimeError):
    """A hook did not see what it was installed for, or could not be installed."""
