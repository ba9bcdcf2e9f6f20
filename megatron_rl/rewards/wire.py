"""Messages between the reward service and its workers: a 4-byte big-endian length, then JSON.

JSON and not pickle, because the messages carry model text.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

_LENGTH = struct.Struct(">I")

MEMORY_FULL = errno.ENOMEM
"""Exit code of a worker that ran out of memory: a message would need some."""


def encode(message: dict[str, Any]) -> bytes:
    """Return one message as bytes; lone surrogates in model text survive as JSON escapes."""
    body = json.dumps(message).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def read(stream: BinaryIO) -> dict[str, Any] | None:
    """Read one message and block until it is there; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length)
    return None if len(body) < length else dict(json.loads(body))


def take(buffer: bytearray) -> Iterator[dict[str, Any]]:
    """Remove and yield the whole messages at the front of ``buffer``; a partial one stays."""
    while len(buffer) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(buffer)
        end = _LENGTH.size + length
        if len(buffer) < end:
            return
        body = bytes(buffer[_LENGTH.size : end])
        del buffer[:end]
        yield json.loads(body)
