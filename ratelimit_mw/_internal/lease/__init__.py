"""Leases: everything that an admitted request or job holds until it ends."""
