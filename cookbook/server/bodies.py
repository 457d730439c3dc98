"""Reads the bodies of requests, up to a limit."""

from __future__ import annotations

import io

import zstandard
from starlette.requests import Request

from cookbook.server.promises import Refusal

_MIB = 2**20


async def read_body(request: Request, max_mib: float) -> bytes:
    """Returns the body, decompressed. Raises Refusal for one that is larger than the limit."""
    limit = int(max_mib * _MIB)
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(max_mib)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(max_mib)
        parts.append(part)
    body = b"".join(parts)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "identity":
        return body
    if encoding != "zstd":
        raise Refusal(415, f"Content-Encoding {encoding!r} is not supported. Use zstd or none.")
    try:
        with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(body)) as reader:
            content: bytes = reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise Refusal(400, f"The body is not compressed with zstd: {error}.") from error
    if len(content) > limit:
        raise _too_large(max_mib)
    return content


def _too_large(max_mib: float) -> Refusal:
    return Refusal(
        413, f"The body is larger than {max_mib:g} MiB, the limit of this server (max_request_mib)."
    )
