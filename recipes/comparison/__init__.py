"""Comparing variants of training: what each costs, and where it ends."""
