"""Private parts of the package: users import from `ratelimit_mw` and from the modules beside this folder.

Each folder is one idea, and its own docstring says which module does what. The way of a request:

    asgi/middleware.py > policy/lookup.py > limiter/decider.py > backends/ > responses/ > lease/manager.py

- `asgi/`: the middleware. It asks for a decision, calls the app or refuses, and ends the lease.
- `policy/`: who is calling, and which limits the request meets.
- `limiter/`: the decision, for the middleware and for `Limiter`. `limiter/engine.py` owns all parts.
- `cache/`: answers without the backend: remembered refusals, units taken ahead.
- `backends/`: the counts, in memory or in Redis. All that is atomic happens here.
- `responses/`: headers and refusals, as clients see them. A new header goes here.
- `lease/`: release, renewal, settle and detach: all that happens to a request after its admission.
- `outage/`: decisions while the backend is away, and what it is told afterwards.

Beside this way: `settings/` reads the settings file, `live/` keeps settings and keys in force up to date,
`checks/` warns at start-up, `observe/` counts and logs, `fleet/` reads the figures of all workers for
`dashboard/` and `cli/`, and `demo/` is a sample app. Below it: `model/` has the plain values that all
folders speak in, and `runtime/` has helpers that know nothing of rate limits.

Words: a *policy* is the limits of one caller on one route. A *charge* is what a request asks of the
backend. An *outcome* is the answer in numbers, and a *decision* is the same answer in words. A
*reservation* is what an admitted charge holds: slots and an estimate. A *lease* is the object that the app
sees; it has the decision and the reservation.
"""
