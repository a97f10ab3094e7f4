"""Hashing of API keys: a key is written down as a hash, everywhere and always.

A clear key lives in a request's memory only. Backend keys, logs, metrics, errors and the dashboard see the
hash that `hash_api_key` returns.
"""

import hashlib
import hmac
from functools import lru_cache


def hash_api_key(api_key: str | bytes, secret: str = "") -> str:
    """Return `hmac-sha256:<64 hex>` of the key under `secret`; `sha256:<64 hex>` where that is empty.

    `secret` is `identity.hash_secret` of the settings. A `str` is hashed as UTF-8.
    Prefer a secret: without one, a leaked list of hashes can be searched for guessable keys.
    """
    if isinstance(api_key, str):
        api_key = api_key.encode("utf-8", "surrogatepass")
    if secret:
        keyed = _keyed(secret).copy()
        keyed.update(api_key)
        return "hmac-sha256:" + keyed.hexdigest()
    return "sha256:" + hashlib.sha256(api_key).hexdigest()


@lru_cache(maxsize=4)
def _keyed(secret: str) -> hmac.HMAC:
    """Return the HMAC that every key under a secret starts from: half the work of a hash is in the secret."""
    return hmac.new(secret.encode(), digestmod="sha256")
