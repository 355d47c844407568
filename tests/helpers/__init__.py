"""Teachers, inversions and guards that several test files share."""
