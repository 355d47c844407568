"""What a network learns that never saw data."""
