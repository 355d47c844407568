"""Verification: compare every kernel with the reference in float64, and time a GPU."""
