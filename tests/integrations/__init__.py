"""Small runs of other packages, each in an environment of its own; see run.py."""
