"""What ``own_state`` counts in."""

COUNTS: list[int] = []
CALLS = 0
