"""The sample API of `ratelimit-mw demo`, with traffic of its own.

`app.py` is the API, `pages.py` its pages for a browser, `traffic.py` its simulated callers, `demo.toml` its
settings.
"""
