"""Every error a user can meet, in one tree.

::

    RegraftError                  one line for the user; the command line prints it and exits 1
    +-- InputError                something handed in is wrong: a path, an option, an image folder
    |   +-- UsageError            options that do not go together; the command line exits 2
    |   +-- ImageError            one image cannot be decoded
    |   +-- ModelError            MODEL or its weights cannot be loaded, or do not fit the method
    |   +-- NeuronsError          neurons.json is malformed or belongs to another model
    |   +-- OutputExistsError     the output is there already and ``--force`` was not given
    +-- BundleError               a bundle is damaged, incomplete or of a newer schema
    +-- EngineError               an engine is missing, cannot run the bundle, or failed
    +-- RewriteError              the graph does not have the form a rewrite needs
    +-- GateError                 a gate failed: parity, finding, verification

A message says what was looked at, what came, what was expected and how to mend it. Anything that
is not a :class:`RegraftError` is a bug and keeps its traceback.
"""

from __future__ import annotations


class RegraftError(Exception):
    """Base of all errors that regraft raises on purpose."""


class InputError(RegraftError):
    """Something the user handed in is wrong."""


class UsageError(InputError):
    """Options do not go together, or one is wrong whatever the files hold."""


class ImageError(InputError):
    """One image cannot be decoded or is refused."""


class ModelError(InputError):
    """A model or its weights cannot be loaded or do not fit the method."""


class NeuronsError(InputError):
    """A neurons file is malformed or belongs to another model."""


class OutputExistsError(InputError):
    """An output exists and may not be overwritten."""


class BundleError(RegraftError):
    """A bundle is damaged, incomplete or of a schema this version cannot read."""


class EngineError(RegraftError):
    """An engine is missing, cannot run this bundle, or failed while running."""


class RewriteError(RegraftError):
    """A graph does not have the form that a rewrite needs; the message names the node."""


class GateError(RegraftError):
    """A gate failed; the message says which figure missed which limit."""


def how_to_install(distribution: str, extra: str = "") -> str:
    """What to run for something that is not installed, from a registry or from a checkout.

    Args:
        distribution: ``regraft-runtime`` or ``regraft-export``.
        extra: one of its extras.
    """
    extras = f"[{extra}]" if extra else ""
    folder = distribution.removeprefix("regraft-")
    return (
        f"pip install '{distribution}{extras}', or in a checkout of regraft "
        f"pip install './{folder}{extras}'"
    )
