"""The load test: what the middleware costs, next to the bare app and to its peers."""
