"""The interface of the published class (Egg-Hu/SMI, ``synthesis.SMI``), implemented by smi_fast.

In a published script, ``from smi_fast.compat import SMI`` replaces ``from synthesis import SMI``.
"""

from smi_fast.compat.smi import SMI

__all__ = ["SMI"]
