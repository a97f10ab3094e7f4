"""Tests of what may break: servers, networks, clocks, processes."""
