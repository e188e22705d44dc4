"""Compressed request bodies, unpacked without ever holding more than the limit."""

from __future__ import annotations

import zlib

from regraft.serve.refusals import Kind, Refusal, invalid

_GZIP = 16 + zlib.MAX_WBITS


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """The body behind ``Content-Encoding``.

    Args:
        body: as it came.
        encoding: the header's value; ``identity``, ``gzip`` or ``deflate``.
        limit: bytes that may come out.

    Raises:
        Refusal: another encoding, damaged data, or more than the limit.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise Refusal(
            Kind.UNKNOWN_ENCODING,
            f"Content-Encoding is {encoding[:40]!r}; expected gzip, deflate or identity",
        )
    try:
        if encoding == "gzip":
            return _unpack(body, _GZIP, limit)
        try:
            return _unpack(body, zlib.MAX_WBITS, limit)
        except zlib.error:  # some clients send the bare stream, without zlib's frame
            return _unpack(body, -zlib.MAX_WBITS, limit)
    except zlib.error:
        raise invalid(f"the body is not {encoding} data") from None


def _unpack(body: bytes, window: int, limit: int) -> bytes:
    stream = zlib.decompressobj(window)
    unpacked = stream.decompress(body, limit + 1)
    if len(unpacked) > limit:
        raise Refusal(
            Kind.TOO_LARGE, f"the body is more than {limit} bytes when decompressed; expected less"
        )
    if not stream.eof or stream.unused_data:
        raise zlib.error("cut short, or something follows")
    return unpacked
