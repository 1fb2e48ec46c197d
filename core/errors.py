"""Every error a user can cause, under one base class.

Each message names the thing that is wrong, says what was expected and what to do about it.
"""

from __future__ import annotations


class StitchError(Exception):
    """Base class: anything StitchVM raises on purpose. The CLI prints it without a traceback and exits with 2."""


class UnknownNameError(StitchError, KeyError):
    """A backbone, reward, aligner or dataset that no plugin offers."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class PluginLoadError(StitchError):
    """A plugin that could not be imported, or offers something that is not a valid record."""


class PluginConflictError(StitchError):
    """Two distributions claim the same name."""


class SpecVersionError(PluginLoadError):
    """A plugin written for another version of the hook specification."""


class ConfigError(StitchError, ValueError):
    """A registry file, a settings file or an option with an unknown key or a wrong value."""


class SliceError(StitchError, ValueError):
    """A cut that does not exist, or an input whose shape does not fit the network."""


class NoiseLevelError(StitchError, ValueError):
    """A sigma outside [0, 1]."""


class DataError(StitchError):
    """An image source that is empty or unreadable."""


class WeightsError(StitchError):
    """A checkpoint that is missing, gated, truncated, of another architecture, or unsafe to load."""


class ArtefactError(StitchError):
    """A saved value model that is incomplete or belongs to another backbone."""


class OutputError(StitchError, OSError):
    """An output folder that cannot be written: read-only, full, or occupied by something else."""


class NonFiniteError(StitchError, ArithmeticError):
    """A loss or a value that is not finite; the last good checkpoint is kept."""
