"""Leases: everything that happens to an admitted request or job until it ends.

- `lease.py`: `Lease`, which the app sees. Its methods are done by `Leases` in `manager.py`.
- `manager.py`: release, end, detach, resume and undo.
- `renewals.py`: renews slots and estimates while the work goes on.
- `settling.py`: settles; `background.py`: how long anybody waits for them. `verdicts.py`: limits that count
  some answers.
- `token.py`: the signed token of a detached job.

Release: a slot is an entry under the lease's random id, and to release it is to remove that id: done
twice, the second finds nothing (`MemoryBackend.finish`; `backends/redis/lua/releases.lua`). A renewal
never adds an id that is gone (`SlotSet.renew`; `backends/redis/lua/renew.lua`). A release whose answer is
lost is sent again. A charge whose answer is lost is given back once no server can execute it any more
(`backends/redis/doubtful.py`).

Settle while the backend is away: `Arrival.wait` waits `backend.timeout` at most, and raises no error of
the backend. What becomes of it:

- The backend admitted the request, with an estimate: the operation stays in the backlog
  (`backends/redis/backlog.py`) and is sent when the server is back, before the operation that ends its
  lease (`backends/redis/lines.py`).
- The backend admitted the request, without an estimate; or this process admitted it during the outage:
  `OutageReconciler` (`outage/reconcile.py`) settles here, and tells the backend later.
- It was let through by `on_failure = "allow"`: nothing was charged, so there is nothing to settle.

A process that is closed before that waits some seconds for the backend; then the settles are lost and the
log says how many. A process that is killed loses them without a word. At most 10,000 wait; the oldest go
first.
"""
