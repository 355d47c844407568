"""Pools: folders of inverted images, with their masks and provenance."""

from smi_fast.pool.pool import (
    CONTACT_SHEET,
    LOSS_CURVES,
    MANIFEST,
    SETTINGS,
    UNFINISHED,
    Pool,
    PoolError,
    write_atomically,
)

__all__ = [
    "CONTACT_SHEET",
    "LOSS_CURVES",
    "MANIFEST",
    "SETTINGS",
    "UNFINISHED",
    "Pool",
    "PoolError",
    "write_atomically",
]
