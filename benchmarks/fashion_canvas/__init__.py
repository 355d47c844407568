"""The canvases, and the networks trained on them."""
