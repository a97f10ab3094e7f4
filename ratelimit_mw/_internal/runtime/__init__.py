"""Tools that know nothing of rate limiting.

- `event_loop.py`, `threads.py`, `upkeep.py`: work in event loops, beside them, and again and again.
- `forks.py`, `process_end.py`, `liveness.py`: processes that fork, end, or share a folder.
- `bounded.py`, `layered.py`: caches with a bound, mappings of which little changes.
- `leaf.py` (`leaf.pyx` in C), `compiled.py`: what is compiled, and whether it is in use.
- `printable.py`: texts from outside, made safe. `plain_hooks.py`: checks of hooks. `version.py`.
"""
