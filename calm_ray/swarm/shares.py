"""Temporary: helper A replaces this file."""
def balance(bandwidths, *, is_sender, can_reduce):
    n = sum(can_reduce)
    return [1.0 / n if c else 0.0 for c in can_reduce]
