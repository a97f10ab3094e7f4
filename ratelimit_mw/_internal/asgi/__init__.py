"""The ASGI middleware and all that is mounted with it.

- `middleware.py`: the way of a request, from its scope to the end of its lease. Begin here.
- `hooks.py`, `hook_errors.py`: the app's hooks `identify=` and `price=`, and answers to what they raise.
- `estimate_hooks.py`: asking the hooks `price=` and `estimate=`.
- `request_lease.py`: `get_lease`. `raised_refusals.py`: refusals that the app itself raises.
- `marks.py`, `marked_routes.py`, `asked_limits.py`: limits in code, from the decorator to the request.
- `route_names.py`: patterns of the app's routes, for figures.
- `layers.py`, `route_walk.py`, `app_routes.py`: where in an app the middleware is, and which routes it has.
- `answers.py`, `usage.py`: responses in place of the app's. `lifespan.py`: start and stop with the server.
"""
