"""Training problems of the stable Anderson acceleration papers, configured with Hydra."""
