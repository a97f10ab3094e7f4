"""Reports of decisions: events, counts, logs, figures."""
