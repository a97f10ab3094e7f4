"""How an API key is written down: hashed, everywhere and always.

A clear key lives in a request's memory only. Backend keys, logs, metrics, errors and the dashboard see
what `hash_api_key` returns.
"""

import hashlib
import hmac


def hash_api_key(api_key: bytes, secret: str) -> str:
    """Return `hmac-sha256:<64 hex>` of the key under `secret`; `sha256:<64 hex>` where that is empty.

    Prefer a secret: without one, a leaked list of hashes can be searched for guessable keys.
    """
    if secret:
        return "hmac-sha256:" + hmac.new(secret.encode(), api_key, hashlib.sha256).hexdigest()
    return "sha256:" + hashlib.sha256(api_key).hexdigest()
