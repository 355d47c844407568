"""Memory that the C library keeps from one pass to the next."""

from __future__ import annotations

import torch

# Just below the largest block (32 MB) that glibc takes as an example.
_BYTES = 31 << 20


def keep_freed_memory() -> None:
    """Let glibc keep up to 62 MB of freed memory for the next pass.

    It gives free memory at the end of its heap back to the system from a bound on, which is twice
    the largest block that it ever mapped and then freed. Where the bound is below what a pass
    frees, the system has to map thousands of pages anew in each pass, which takes up to a quarter
    of the time of an iteration. So one large block is freed here, of which no page is ever used.
    Bounds that the user has set (``MALLOC_TRIM_THRESHOLD_``) stay, and other C libraries ignore it.
    """
    torch.empty(_BYTES, dtype=torch.uint8, device="cpu")
