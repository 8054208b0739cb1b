"""crc32 of members, on every read: ISA-L's where it is installed (13 times zlib's speed), zlib's otherwise."""

from __future__ import annotations

__all__ = ["CRC32_BY", "crc32"]

try:
    from isal.isal_zlib import crc32

    CRC32_BY = "isal"
except ImportError:  # the same polynomial and the same values
    from zlib import crc32

    CRC32_BY = "zlib"
