"""Decisions while the backend is away, and their return to it afterwards."""
