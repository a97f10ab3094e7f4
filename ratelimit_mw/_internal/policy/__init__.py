"""Rules that a request falls under: its caller, its route, and the limits of both.

- `lookup.py`: finds the policy of a request, and remembers it.
- `api_key_reader.py`, `client_address.py`, `identity.py`, `networks.py`: who is calling.
- `routing.py`, `loose_paths.py`, `sample_paths.py`: which rule of `[[routes]]` a path falls under.
- `policy.py`: puts plan, key and route together. `counters.py`: where each limit is counted.
- `code_limits.py`, `extended.py`, `by.py`: limits that the app declares in its code.
- `decision.py`: an outcome in words. `rate_limited.py`: `RateLimited`. `key_entry.py`: `KeyEntry`.
"""
