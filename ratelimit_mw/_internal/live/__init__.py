"""What can change while the app runs: the settings file, keys set live, keys that a hook looks up."""
