"""The backend on one Redis or Valkey server."""
