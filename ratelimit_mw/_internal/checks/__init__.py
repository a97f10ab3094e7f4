"""What is said at start-up of settings and surroundings that limit less than they seem to."""
