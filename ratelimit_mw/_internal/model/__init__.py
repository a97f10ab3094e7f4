"""Values of rate limiting, which all other folders speak in.

- `limits.py`: windows, slots and budgets. `metered.py`: units such as tokens. `money.py`, `periods.py`.
- `charge.py`: what a request asks of the backend. `outcome.py`: the answer. `status.py`: how one limit
  stands.
- `reservation.py`: what an admitted charge holds. `backend.py`: the interface of backends, and their
  errors.
- `limit_text.py`: limits in words. `header_window.py`: the window that headers tell of. `api_key_hash.py`.
"""
