"""Typed errors that every room may use. Each message names the value, the limit and the cure.

Exit codes of the command line: 0 done, 1 failed, 2 usage or configuration, 75 saved on a signal (start again). An error's
class has its code, and nothing else decides: 2 where what was asked for cannot be (an unknown name, settings that do not go
together, a path that is missing, occupied or of the wrong kind), so that the same command would meet the same again and no
supervisor tries; 1 where something failed on the way (damaged files, a network, too many bad samples, another owner).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SAVED = 75


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A cure for a name that is not known: the nearest one, or all where none is near."""
    names = sorted({name for name in known if name})
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(word).lower(), lower, n=1, cutoff=0.5)
    return f"did you mean {lower[near[0]]!r}?" if near else f"known: {', '.join(names)}"


class LongskipError(Exception):
    """Base of everything longskip raises on purpose; shown without a traceback by the command line.

    ``cure`` says what the user can do; it is appended to the message. ``alike`` is set where every rank raises the same
    error, so that it is shown once. ``final`` is set where a start from the last commit would meet the same again, so
    that a supervisor does not try.
    """

    exit_code = EXIT_FAILED
    alike = False
    final: bool = False

    def __init__(self, message: str, *, cure: str | None = None) -> None:
        self.message = message
        self.cure = cure
        super().__init__(f"{message}\n  cure: {cure}" if cure else message)

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes an error is what it was, whatever its constructor takes."""
        return _as_it_was, (type(self), self.args, self.__dict__)


def _as_it_was(kind: type[LongskipError], arguments: tuple[Any, ...], state: dict[str, Any]) -> LongskipError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(state)
    return error


class ConfigError(LongskipError):
    """A configuration that cannot be run: unknown key, wrong type, contradiction."""

    exit_code = EXIT_USAGE
    final = True


class SpecError(ConfigError):
    """A model shape that cannot be built (heads that do not divide the width, patch that does not divide the latents)."""


class RunMismatchError(ConfigError):
    """A run folder that was made with another configuration."""


class EncoderError(ConfigError):
    """A frozen encoder's folder, or features that one made, that do not fit what is asked for."""


class KernelArgumentError(LongskipError, ValueError):
    """A kernel argument of the wrong dtype, device, shape or value."""


class BackendError(LongskipError):
    """A required kernel backend that is not usable here, or a derivative that a backend does not provide."""


class ConditioningError(LongskipError, ValueError):
    """A condition that the model's spec does not declare, or a declared one that is missing or misshaped."""


class DataError(LongskipError):
    """Data that cannot be used: empty, too small, of the wrong kind."""


class UnfitDataError(DataError):
    """Data that were named and cannot serve: missing, empty, too few, no folder of data; or a taken place for new ones."""

    exit_code = EXIT_USAGE
    final = True


class ShardError(DataError):
    """A shard that is missing, truncated, altered or not indexed."""


class RemoteError(DataError):
    """Data on a server that could not be fetched: it hangs, breaks off, refuses, or does not have them."""


class BadSampleError(DataError):
    """One sample that cannot be used; ``reason`` is the counter's name (``image_decode``, ``caption_missing``, ...)."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class TextTooLongError(BadSampleError):
    """A caption or prompt with more tokens than the encoder takes."""

    exit_code = EXIT_USAGE
    final = True

    def __init__(self, message: str, *, cure: str | None = None) -> None:
        super().__init__("text_too_long", f"{message}\n  cure: {cure}" if cure else message)


class CheckpointError(LongskipError):
    """A checkpoint that is missing, incomplete, altered or of another model."""


class NoCheckpointError(CheckpointError):
    """A checkpoint that was asked for and never was: a step that was not saved, no such file."""

    exit_code = EXIT_USAGE
    final = True


class DiskFullError(CheckpointError):
    """Not enough space to write a checkpoint; training may go on, the earlier checkpoint is intact."""


class RunFolderError(ConfigError):
    """A path or name that is no run folder, or a run folder with a file that cannot be read."""


class RendezvousError(LongskipError):
    """Ranks of one job that did not find each other in time."""


class PreflightError(ConfigError):
    """Nodes that do not fit one another or the run, found before the first step."""


class PeerLostError(LongskipError):
    """Another rank of this job that died or cannot be reached any more, met in a collective."""


class RunLockedError(LongskipError):
    """A second job on a run folder that another one owns."""


class NonFiniteLossError(LongskipError):
    """The loss or the gradient became NaN or infinite in too many steps in a row; none of them moved a weight."""

    final = True


class SpikeError(LongskipError):
    """Losses that jump again after as many rollbacks as are allowed between two commits."""

    final = True


class DesyncError(LongskipError):
    """Ranks that differ in what must be the same on all of them; a start from the last commit makes them alike again."""
