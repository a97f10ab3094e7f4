"""Answers that a process gives without asking the backend: remembered refusals, units taken ahead.

- `refusals.py`: refusals by windows, remembered for a second at most.
- `prefetch.py`, `prefetch_state.py`: units of a plan with `prefetch`, taken ahead in blocks.
- `shared_units.py`: units of limits that all callers share.
"""
