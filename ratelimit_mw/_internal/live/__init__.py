"""Settings and keys that change while the app runs: the file, keys set live, keys that a hook looks up."""
