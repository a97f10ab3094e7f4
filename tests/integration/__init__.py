"""Tests of all parts together: real servers, processes and clients."""
