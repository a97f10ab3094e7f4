"""Decisions while the backend is away, and their return to it afterwards.

- `fallback.py`: `LocalPolicy` decides as `on_failure` says: in this process alone, "allow" or "deny".
- `reconcile.py`: `OutageReconciler` has the reservations that were made meanwhile: they are renewed,
  settled and ended here, and told to the backend when it is back. `unsynced.py`: what is told.
  `sync_task.py`: when.

Requests that were admitted before the outage stay with the backend: their releases and settles wait for
it (`lease/`). Only a settle of a request without an estimate is kept here, since the backend has nothing
to settle.
"""
