"""Names that tell of a secret: what never enters a log, a checkpoint, a report or a command line (no torch)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"

# An environment variable (capitals) is one if these stand anywhere in it: GITHUBTOKEN, PGPASSWORD, MYAPIKEYS.
_PARTS = ("AUTH", "CREDENTIAL", "KEY", "PASSPHRASE", "PASSWD", "PASSWORD", "SECRET", "TOKEN")
# Any other name goes by whole words, so that `n_tokens` and `keyboard` are none and `apiKey`, `hub-token` are.
_WORDS = frozenset(
    {
        "apikey", "auth", "authorization", "bearer", "cookie", "cookies", "credential", "credentials", "creds", "jwt",
        "key", "netrc", "passphrase", "passwd", "password", "passwords", "pat", "pwd", "secret", "secrets", "token",
        "webhook",
    }
)  # fmt: skip
_HARMLESS = frozenset({"PWD", "OLDPWD", "TOKENIZERS_PARALLELISM", "XAUTHORITY", "SSH_AUTH_SOCK"})
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_BETWEEN = re.compile(r"[^A-Za-z0-9]+")
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_PASSWORD_OF_URL = re.compile(r"://[^/@\s:]*:[^/@\s]+@")
# A signed URL's query: X-Amz-Signature, X-Goog-Credential, AWSAccessKeyId, Azure's sig, access_token.
_OF_QUERY = re.compile(
    r"([?&](?:sig|[\w.~%-]*(?:signature|credential|token|key|secret|password|passwd|auth)[\w.~%-]*)=)[^&#\s'\"]+",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether a variable, key or option of this name may hold a secret: TOKEN, KEY, SECRET, PASSWORD, CREDENTIAL …"""
    if name in _HARMLESS:
        return False
    if name == name.upper() and any(part in name for part in _PARTS):
        return True
    return any(word.lower() in _WORDS for word in _BETWEEN.split(_HUMP.sub("_", name)))


def holds_user(text: str) -> bool:
    """Whether ``text`` has a URL with a name, password or signature in it: a name alone may be a token of a service's."""
    return _USER_OF_URL.search(text) is not None or holds_secret(text)


def holds_secret(text: str) -> bool:
    """Whether ``text`` has a URL with a password or a signature in it: ``https://user:password@host/``, ``…?sig=…``."""
    return _PASSWORD_OF_URL.search(text) is not None or ("://" in text and _OF_QUERY.search(text) is not None)


def hidden(text: str) -> str:
    """``text`` without the users, passwords and signatures of the URLs in it."""
    text = _USER_OF_URL.sub(HIDDEN, text)
    return _OF_QUERY.sub(rf"\1{HIDDEN}", text) if "://" in text else text


def redacted(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``mapping`` for people and files, at every depth without the values of secret names and users of URLs."""
    return {
        name: HIDDEN if is_secret(name) and value not in (None, "") else _within(value)
        for name, value in mapping.items()
    }


def _within(value: Any) -> Any:
    if isinstance(value, Mapping):
        return redacted(value)
    if isinstance(value, (list, tuple)):
        return [_within(item) for item in value]
    return hidden(value) if isinstance(value, str) else value
