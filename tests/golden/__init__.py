"""Golden answers: fixed traffic, and every answer to it, recorded to be compared with."""
