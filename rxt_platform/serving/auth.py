"""The bearer token of the HTTP side. Only its hash goes to the replicas; it is never logged."""

import hashlib
import hmac
import os
import re
from pathlib import Path

from rxt_platform.errors import ConfigError

VARIABLE = "RXT_SERVE_TOKEN"
_FIX = (
    f"set {VARIABLE} or give --token-file, for example after "
    "python -c 'import secrets; print(secrets.token_urlsafe(32))' > token"
)


def read_token(path: Path | None = None) -> str:
    """The token in a file, or that of RXT_SERVE_TOKEN. Raises ConfigError without one that is hard to guess."""
    if path is not None:
        try:
            token = path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise ConfigError(f"token file {path}: {reason}: {_FIX}") from None
        place = f"token file {path}"
    else:
        token, place = os.environ.get(VARIABLE, "").strip(), VARIABLE
    if not token:
        raise ConfigError(f"{place}: no token: {_FIX}")
    if not re.fullmatch(r"[!-~]{16,}", token):
        raise ConfigError(f"{place}: a token has at least 16 characters, ASCII without spaces: {_FIX}")
    return token


def digest(token: str) -> str:
    """What a replica knows of the token."""
    return hashlib.sha256(token.encode()).hexdigest()


def is_allowed(header: str | None, expected: str | None) -> bool:
    """Whether an Authorization header carries the token with that digest; takes as long for any wrong one."""
    scheme, _, given = (header or "").partition(" ")
    right = hmac.compare_digest(digest(given.strip()), expected or "")
    return right and scheme.lower() == "bearer" and expected is not None
