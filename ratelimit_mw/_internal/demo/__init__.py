"""The sample API of `ratelimit-mw demo`, with traffic of its own."""
