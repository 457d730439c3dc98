"""Reads the bodies of requests, up to a limit."""

from __future__ import annotations

import io
from typing import Any

import zstandard
from starlette.requests import Request

from cookbook.errors import RequestError
from cookbook.server.promises import Refusal
from cookbook.utils.json_files import JsonOrigin, object_of

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


def object_in(body: bytes, status: int) -> dict[str, Any]:
    """Returns the JSON object of a body. Raises Refusal with that status for anything else."""
    try:
        return object_of(body, JsonOrigin("The body", RequestError, ""))
    except RequestError as error:
        raise Refusal(status, str(error)) from error


def _too_large(max_mib: float) -> Refusal:
    return Refusal(
        413, f"The body is larger than {max_mib:g} MiB, the limit of this server (max_request_mib)."
    )
