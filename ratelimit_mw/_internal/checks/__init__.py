"""Start-up checks, which report settings and surroundings that limit less than they seem to."""
