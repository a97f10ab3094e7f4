"""Connections to servers: TLS, sockets, sentinels, clients for the stores."""
