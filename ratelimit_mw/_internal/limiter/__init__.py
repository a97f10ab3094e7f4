"""The limiter, and the decider that is its core."""
