"""Everything about limits that is written to clients.

- `headers.py`: `HeaderWriter` has the headers of every response. A new header goes into
  `HeaderWriter.__call__`.
- `refusals.py`: `RefusalWriter` has status, headers and body of refusals. It takes the headers above, and
  adds those that only refusals have.
- `header_sender.py`: adds the headers when the app's response starts.
- `writers.py`: both writers for one state of the settings.

Their settings are `ResponseSettings` in `settings/tables.py`. `ratelimit_mw/openapi.py` documents the
headers.
"""
