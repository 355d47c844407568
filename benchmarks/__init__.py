"""Measurements of smi_fast, and the training of its embedded teacher. See README.md."""
