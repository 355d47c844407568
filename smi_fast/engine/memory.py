"""What libraries keep from one pass to the next: freed memory, and the code of products."""

from __future__ import annotations

import os

import torch

# Just below the largest block (32 MB) that glibc takes as an example.
_BYTES = 31 << 20
# Row counts of a batch of 128 images in each of two phases, times some twenty products.
_PRODUCTS = "8192"


def keep_freed_memory() -> None:
    """Let glibc keep up to 62 MB of freed memory for the next pass.

    It gives free memory at the end of its heap back to the system from a bound on, which is twice
    the largest block that it ever mapped and then freed. Where the bound is below what a pass
    frees, the system has to map thousands of pages anew in each pass, which takes up to a quarter
    of the time of an iteration. So one large block is freed here, of which no page is ever used.
    Bounds that the user has set (``MALLOC_TRIM_THRESHOLD_``) stay, and other C libraries ignore it.
    """
    torch.empty(_BYTES, dtype=torch.uint8, device="cpu")


def keep_products() -> None:
    """Let oneDNN keep the code of 8192 products, in place of 1024.

    It generates code for each shape of a product. A batch that images leave one by one has more
    shapes than that, and their code would be generated again and again, which takes up to a tenth
    of the time of a small teacher. oneDNN reads the number from the environment at its first
    product, so this comes too late for a process that has multiplied before. A number that the user
    has set (``ONEDNN_PRIMITIVE_CACHE_CAPACITY``) stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _PRODUCTS)
