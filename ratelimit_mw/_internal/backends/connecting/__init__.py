"""Connections to servers: TLS, sockets, sentinels, clients for the stores.

- `connectors.py` chooses by URL: `connector.py` opens connections to one server, `sentinel.py` to a
  primary.
- `connection.py`: one connection, for the batcher. `client.py`, `clients.py`: commands of the stores.
- `shared.py`: commands of the stores over the batcher's connection.
- `hosts.py`: several hosts in a URL. `loop_end.py`: closing with the event loop.
- `errors.py`, `failures.py`: errors as backends raise them.
"""
