"""Verification: every kernel against the reference in float64, and times on a GPU."""
