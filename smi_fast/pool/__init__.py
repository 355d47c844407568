"""Pools: folders of inverted images, with their masks and provenance."""

from smi_fast.pool.files import PoolError, write_atomically
from smi_fast.pool.layout import (
    CONTACT_SHEET,
    LOCK,
    LOSS_CURVES,
    METADATA,
    SECONDS,
    SETTINGS,
    UNFINISHED,
)
from smi_fast.pool.pool import Pool
from smi_fast.pool.remote import RemotePool

__all__ = [
    "CONTACT_SHEET",
    "LOCK",
    "LOSS_CURVES",
    "METADATA",
    "SECONDS",
    "SETTINGS",
    "UNFINISHED",
    "Pool",
    "PoolError",
    "RemotePool",
    "write_atomically",
]
