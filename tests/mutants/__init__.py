"""Planted faults: each changes one line of the package, and its nearest tests must fail."""
