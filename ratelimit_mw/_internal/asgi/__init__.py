"""The ASGI middleware and all that is mounted with it."""
