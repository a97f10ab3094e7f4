"""Everything about limits that is written to clients.

- `headers.py`: `HeaderWriter` has the headers that tell how a caller stands. A new one goes into
  `HeaderWriter.__call__`, and into `of_admitted`, its short cut for the responses to admitted requests.
- `refusals.py`: `RefusalWriter` has status, headers and body of refusals. It takes the headers above, and
  adds those that only refusals have.
- `header_sender.py`: adds the headers when the app's response starts.
- `writers.py`: both writers for one state of the settings.

Answers that say nothing of a caller's limits have none of these headers: those of `RefusalWriter.error`
and `unidentified`, and the dashboard's. The modules are compiled where a `.pxd` lies beside them: a new
method needs a line there only if C types help it.

Their settings are `ResponseSettings` in `settings/tables.py`. `ratelimit_mw/openapi.py` documents
refusals and their headers.
"""
