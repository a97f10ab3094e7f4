"""Leases: everything that happens to an admitted request or job until it ends.

- `lease.py`: `Lease`, which the app sees. Its methods are done by `Leases` in `manager.py`.
- `manager.py`: release, end, detach, resume and undo.
- `renewals.py`: renews slots and estimates while the work goes on.
- `settling.py`: settles; `owed.py`: how long anybody waits for them. `verdicts.py`: limits that count some
  answers.
- `token.py`: the signed token of a detached job.

Release: the process forgets the slots first, then the backend removes the lease's id. That is done once or
many times alike, so no slot is freed for two (`backends/redis/lua/slots.lua`, `backends/memory/counts.py`).

Settle while the backend is away: `Settling.settle` waits `backend.timeout` at most and raises nothing. The
operation must arrive: it stays in the backlog (`backends/redis/backlog.py`) and is sent when the server is
back, before the end of its lease (`backends/redis/lines.py`). If the request itself was admitted during the
outage, `OutageReconciler.settle` (`outage/reconcile.py`) settles here, and tells the backend later. A
process that ends before loses both, and logs it.
"""
