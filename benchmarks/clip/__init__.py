"""A real teacher and real photographs: CLIP's image tower, out of packages of PyPI."""
