"""The keys of sticky cookies: one secret for the mesh, from which the key of each calling service follows.

So every instance of a service has the same key, whichever replica tells it, and no service can work out another's.
Pure; randomness and time are arguments. Invariants: a secret stands in no text that people are shown; what is told of
a service says nothing of the secret, nor of another service's key.
"""

import hmac
from typing import Any

from .records import COOKIE_SECRETS_MAX, CookieSecret, CookieSecrets
from .resources import COOKIES, Resource, resource

SINCE_MINOR = 2  # of the protocol: older sidecars would refuse the resource
KEEP_S, KEEP_S_MAX = 24 * 3600.0, 400 * 86400.0  # how long what a former secret has made is honoured
_LABEL = b"pillion sticky cookies 1\0"


def service_key(secret: CookieSecret, service: str) -> bytes:
    """HMAC-SHA256 as a key derivation: the secret has 256 bits of its own, so nothing is to be extracted first."""
    return hmac.digest(bytes.fromhex(secret.secret), _LABEL + service.encode(), "sha256")


def keys_of(secrets: CookieSecrets, service: str) -> Resource:
    """What the sidecars of a service are told: the key by which they make cookies, then those that they still honour,
    and until when."""
    keys: list[dict[str, Any]] = []
    for number, each in enumerate(secrets.secrets):
        told: dict[str, Any] = {"key": service_key(each, service).hex()}
        keys.append({**told, "until": each.until} if number else told)
    return resource(COOKIES, {"keys": keys})


def rotated(before: CookieSecrets | None, fresh: str, now: float, keep_s: float) -> CookieSecrets:
    """Another secret from now on; the one before is honoured for `keep_s` more, and those before that as was said."""
    kept: list[CookieSecret] = []
    for number, each in enumerate(before.secrets if before is not None else ()):
        until = now + keep_s if number == 0 else min(each.until, now + keep_s)
        if until > now:
            kept.append(CookieSecret(each.secret, until))
    return CookieSecrets((CookieSecret(fresh), *kept[: COOKIE_SECRETS_MAX - 1]), now)
