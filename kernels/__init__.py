"""The Triton kernels, installed as ``smi_fast.kernels``.

Modules here import one another relatively, and nothing is imported in this file: importing
``smi_fast`` must never import triton.
"""
