"""Letters and answers of the script's operations. The same names and values stand in `lua/constants.lua`."""

ACQUIRE = b"A"
PEEK = b"P"
ACQUIRE_AGAIN = b"O"
"""Charges what may have been charged before, under the same id."""
TAKE_AHEAD = b"T"
FINISH = b"F"
RENEW = b"N"
SETTLE = b"S"
KEEP = b"K"
DELETE = b"D"

WINDOW = b"W"
SLOTS = b"C"
BUDGET = b"B"

DISJOINT = b"D"
"""Begins a batch in which no two charges share a key, and none has a budget."""
SHARED = b"S"
"""Begins any other batch."""

FAILED = b"E"
DONE = b"\1"
