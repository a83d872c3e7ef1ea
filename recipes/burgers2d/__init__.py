"""Burgers' equation in one space dimension and time, solved by a physics-informed network."""
