"""Settings and keys that change while the app runs: the file, keys set live, keys that a hook looks up.

- `state.py`: `Live`, the rules in force. `rules.py`: `Rules`, one object, replaced as a whole.
- `reload.py`: the watched settings file.
- `registry.py`: keys and networks that are set live; `known_entries.py`, `sound_keys.py`, `key_entries.py`,
  `network_entries.py` and `timed_entries.py` are what it knows of them.
- `resolve.py`: the hook `resolve=`. `adoption.py`: identities that the app names.
- `audit.py`: who changed what. `rights.py`: whether the backend lets this process change keys.
"""
