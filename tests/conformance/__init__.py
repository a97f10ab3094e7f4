"""Rules that every backend keeps."""
