"""Signs the URLs of files of checkpoints. Whoever has such a URL may read that file until it expires."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import UTC, datetime
from urllib.parse import urlencode

from cookbook.server.promises import Refusal

DOWNLOADS = "/api/v1/downloads/"
"""Where the files are. Requests for them carry a signature in place of the API key."""


class Signatures:
    """Signs with a secret of this server's life, so that URLs end with it."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def query(self, file: str, expires: datetime) -> str:
        """Returns the query of a URL for a file."""
        until = int(expires.timestamp())
        return urlencode({"expires": until, "signature": self._signature(file, until)})

    def check(self, file: str, expires: str, signature: str) -> None:
        """Raises Refusal if the signature is not that of the file, or has expired."""
        until = int(expires) if expires.isdecimal() and len(expires) < 12 else 0
        is_valid = hmac.compare_digest(self._signature(file, until).encode(), signature.encode())
        if not is_valid or until < datetime.now(UTC).timestamp():
            raise Refusal(
                403, "This URL is not valid, or not any more. Ask for the URLs of the checkpoint again."
            )

    def _signature(self, file: str, until: int) -> str:
        return hmac.new(self._secret, f"{until}:{file}".encode(), hashlib.sha256).hexdigest()
