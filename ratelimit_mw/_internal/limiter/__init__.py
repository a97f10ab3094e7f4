"""The limiter, and the decider that is its core.

- `limiter.py`: `Limiter`, for use without HTTP. `engine.py`: the parts of a limiter, which the middleware
  uses too.
- `decider.py`: decides about every request: at once, by the backend, or without it.
- `questions.py`: a request as the decider is asked about it. `late.py`: `lease.charge`.
- `turns.py`, `waiting_lines.py`: calls with `max_wait`, which wait in line where they are refused.
- `inspect_caller.py`: looks at all counts of a caller. `observers.py`: who is told of each decision.
"""
