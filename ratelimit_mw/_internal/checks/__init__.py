"""Start-up checks, which report settings and surroundings that limit less than they seem to.

- `startup.py` runs them. `plain.py` lists those that need the settings alone: `amounts.py`, `networks.py`,
  `prefetch.py`, `routes.py`.
- `surroundings.py`: those that need the process and the app. `processes.py`: how many workers there are.
- `code_limits.py`: limits in code.
"""
