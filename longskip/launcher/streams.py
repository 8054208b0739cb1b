"""Output whose reader may leave before the end, as ``head`` and a closed pager do."""

from __future__ import annotations

import io
import os
import stat
import sys
from typing import Any


class _Outlived(io.FileIO):
    """A pipe that becomes ``/dev/null`` once nobody reads it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """From here on a reader of stdout or stderr that leaves changes nothing: what is under way goes on to its own end, a
    training too, and the exit code says how that was. Streams that are no pipes stay as they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue
        kind = os.fstat(stream.fileno()).st_mode
        if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
            stream.flush()
            pipe = io.BufferedWriter(_Outlived(stream.fileno(), "wb", closefd=False))
            outlived = io.TextIOWrapper(
                pipe, stream.encoding, stream.errors, line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )  # fmt: skip
            setattr(sys, name, outlived)
