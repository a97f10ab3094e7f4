"""The backend in this process's memory.

- `backend.py`: `MemoryBackend`, with the lock and the stores.
- `prepared.py`: decides about one charge: all of its limits are charged, or none is.
- `counts.py`: a window's log and a slot set. A slot is the id of its lease, so nobody frees another's slot.
- `budgets.py`, `meters.py`: estimates and settles of money, and of metered units.
- `bounded_store.py`: the store that drops dead states.
"""
