"""Seconds: whole inversions, single ops, single objectives, and where a step spends its time."""
