"""Ranks that train the same weights."""
