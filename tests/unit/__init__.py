"""Tests of one part, or of several in this process, without a server."""
