"""Helpers of the tests: servers, apps, oracles, traffic."""
