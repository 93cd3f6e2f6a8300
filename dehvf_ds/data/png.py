"""PNG files without the texts and colour profiles that PIL refuses to read."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_CHUNK_BYTES = 1 << 20
"""Longest text or profile that is kept, unpacked; PIL's own limit, beyond which it refuses the picture."""

MAX_TOTAL_BYTES = 1 << 24
"""Most of them together; PIL refuses above four times this."""

_KINDS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def without_large_texts(data: bytes) -> bytes:
    """A PNG's bytes without its large text and profile chunks; other bytes as they are.

    They do not change a pixel here, for profiles are ignored. Nothing is unpacked beyond ``MAX_CHUNK_BYTES``:
    a chunk that claims gigabytes costs no more than one that holds a megabyte.
    """
    if not data.startswith(SIGNATURE):
        return data
    kept, begin, total = [], 0, 0
    for kind, start, end in _chunks(data):
        if kind not in _KINDS:
            continue
        size = end - start - 12
        if kind != b"tEXt":
            size = _unpacked_size(kind, data[start + 8 : end - 4])
        if size > MAX_CHUNK_BYTES or total + size > MAX_TOTAL_BYTES:
            kept.append(data[begin:start])
            begin = end
        else:
            total += size
    return b"".join([*kept, data[begin:]]) if kept else data


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and end of every whole chunk: length, kind, content, checksum."""
    start = len(SIGNATURE)
    while start + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        if end > len(data):
            return
        yield kind, start, end
        start = end


def _unpacked_size(kind: bytes, content: bytes) -> int:
    """Bytes of a text or profile, at most one more than is kept."""
    if kind == b"iTXt":
        _, _, rest = content.partition(b"\0")
        is_packed = rest[:1] == b"\1"
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        is_packed = True
        packed = content.partition(b"\0")[2][1:]
    if not is_packed:
        return len(content)
    unpacker = zlib.decompressobj()
    try:
        size = len(unpacker.decompress(packed, MAX_CHUNK_BYTES))
    except zlib.error:
        # PIL leaves such a text out by itself.
        return len(content)
    return size + bool(unpacker.unconsumed_tail)
