"""Rules that a request falls under: its caller, its route, and the limits of both."""
