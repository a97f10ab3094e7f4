"""Reports of decisions: events, counts, logs, figures.

- `decision_counts.py`: counts of decisions. `stats.py`: `Limiter.stats()` and the names of metrics.
- `reporting.py`: reports to the fleet, each second. `sightings.py`: details of callers whom somebody looks
  at.
- `events.py`: what `on_event` is told. `refusal_log.py`: refusals in the log.
- `budget_warnings.py`, `uncounted_units.py`: warnings of budgets near their end, and of units that nobody
  counts.
"""
