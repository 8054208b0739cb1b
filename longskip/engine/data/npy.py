"""The header of ``.npy`` members, read strictly and never with pickle: dtype, shape, where the numbers begin."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from longskip.errors import BadSampleError

MAX_HEADER = 1 << 12
_MAGIC = b"\x93NUMPY"
_DICT = re.compile(
    r"\{'descr': '(?P<descr>[<>|=]?[A-Za-z]\d*)', 'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>(?:\d{1,18}, )*(?:\d{1,18},?)?)\), \} *\n"
)
_DTYPES = {"<f2": "fp16", "<f4": "fp32", "|u1": "uint8"}
STORED = {name: np.dtype(descr) for descr, name in _DTYPES.items()}
"""The dtypes that features are stored in, by the names that ``index.json`` has for them."""


class Header(NamedTuple):
    """What a ``.npy`` file begins with; ``offset`` is the first byte of the numbers, C order follows."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def header_of(data: bytes | bytearray | memoryview) -> Header:
    """The header at the start of ``data``, which may go on past it.

    Raises ``BadSampleError`` with the reason ``feature_format`` for anything that numpy's own writer would not write
    for a plain array (versions 1.0 and 2.0), and ``feature_dtype`` for other numbers than fp16, fp32 and uint8.
    """
    start = bytes(data[:12])
    if start[:6] != _MAGIC:
        raise BadSampleError("feature_format", f"no .npy: it starts with {start[:8]!r}")
    width = {b"\1\0": 2, b"\2\0": 4}.get(start[6:8])
    if width is None:
        raise BadSampleError("feature_format", f".npy version {tuple(start[6:8])}; (1, 0) and (2, 0) are read")
    offset = 8 + width + int.from_bytes(start[8 : 8 + width], "little")
    if len(data) < offset or offset > MAX_HEADER:
        raise BadSampleError(
            "feature_format", f".npy header to byte {offset} of {len(data)}, the limit is {MAX_HEADER}"
        )
    return parse_header(bytes(data[:offset]))


@lru_cache(maxsize=1024)
def parse_header(head: bytes) -> Header:
    """``header_of`` exactly these bytes, remembered: most members of a data set begin alike."""
    width = 2 if head[6] == 1 else 4
    text = head[8 + width :].decode("latin1")
    found = _DICT.fullmatch(text)
    if found is None:
        raise BadSampleError("feature_format", f"the .npy header {text[:100]!r} is not that of a plain array")
    if found["fortran"] == "True":
        raise BadSampleError("feature_format", "the .npy array is in Fortran order; C order is read")
    if found["descr"] not in _DTYPES:
        kind = "Python objects, which can run code when read" if "O" in found["descr"] else f"{found['descr']!r}"
        raise BadSampleError("feature_dtype", f"the .npy array holds {kind}; one of {', '.join(STORED)} is read")
    shape = tuple(int(side) for side in found["shape"].replace(",", " ").split())
    return Header(STORED[_DTYPES[found["descr"]]], shape, len(head))


def array_of(data: bytes | memoryview) -> np.ndarray:
    """The array of a whole ``.npy`` file, read-only and without a copy. Raises ``BadSampleError`` as ``header_of``."""
    header = header_of(data)
    if header.size != len(data):
        raise BadSampleError("feature_format", f"the .npy of {header.shape} needs {header.size} bytes, has {len(data)}")
    return np.frombuffer(data, header.dtype, math.prod(header.shape), header.offset).reshape(header.shape)
