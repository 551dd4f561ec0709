"""Where the bytes of a picture lie: a file, a span of a tar shard, a member of a zip archive. Nothing is extracted to disk."""

import os
import stat
import struct
import zlib
from typing import NamedTuple

from fastcm.data.decoding import BadImageError

MAX_BYTES = 1 << 30  # of one picture's file; a member that inflates beyond it is refused
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, lengths of name and extra field


class ChangedError(Exception):
    """The file is not the one that was listed; the text is its path."""


class Span(NamedTuple):
    """`size` bytes at `offset` of the file at `path`.

    mtime_ns: the file's modification time when it was listed. For the member of a zip archive the offset is that of its local header,
    crc the CRC-32 of its bytes (-1 elsewhere), and full_size, where it is deflated, how many they are (-1 elsewhere).
    """

    path: str
    offset: int
    size: int
    mtime_ns: int
    full_size: int = -1
    crc: int = -1


def read_span(span: Span) -> bytes:
    """The bytes of a picture's file. Raises BadImageError, or ChangedError where the file changed after it was listed."""
    if max(span.size, span.full_size) > MAX_BYTES:
        raise BadImageError(f"a file of {max(span.size, span.full_size):,} bytes ({MAX_BYTES:,} at most)")
    try:
        descriptor = os.open(span.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a named pipe must not hang
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("not a regular file")
        if status.st_mtime_ns != span.mtime_ns:
            raise ChangedError(span.path)
        if span.crc >= 0:
            return _zip_member(descriptor, span)
        return _exactly(descriptor, span.size, span.offset)
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from error
    finally:
        os.close(descriptor)


def _exactly(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size and (more := os.pread(descriptor, size - len(data), offset + len(data))):
        data += more
    if len(data) != size:
        raise BadImageError("truncated: the file ends inside it")
    return data


def _zip_member(descriptor: int, span: Span) -> bytes:
    signature, name_size, extra_size = LOCAL_HEADER.unpack(_exactly(descriptor, 30, span.offset))
    if signature != b"PK\3\4":
        raise BadImageError("damaged archive: no member where its directory says")
    data = _exactly(descriptor, span.size, span.offset + 30 + name_size + extra_size)
    if span.full_size >= 0:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, span.full_size + 1)
        except zlib.error as error:
            raise BadImageError(f"damaged archive: {error}") from error
    if len(data) != (span.size if span.full_size < 0 else span.full_size) or zlib.crc32(data) != span.crc:
        raise BadImageError("damaged archive: its checksum differs")
    return data
