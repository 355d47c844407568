"""Filling a pool: the seed of each batch."""

from __future__ import annotations

from itertools import product

import torch

from smi_fast.batch_maker import batch_seed


def test_seeds_of_32_bits_decide_the_batches_that_they_always_did() -> None:
    assert batch_seed(0, 40) == 40
    assert batch_seed(3, 40) == 3 * 2**32 + 40
    assert batch_seed(2**32 - 1, 0) == (2**32 - 1) << 32


def test_every_seed_of_64_bits_gives_each_batch_a_seed_of_its_own() -> None:
    seeds = (0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1)
    found = [batch_seed(seed, start) for seed, start in product(seeds, (0, 1, 40, 999_999))]
    assert len(set(found)) == len(found)
    for seed in found:
        torch.Generator().manual_seed(seed)


def test_a_large_seed_decides_the_same_batches_for_ever() -> None:
    assert batch_seed(2**40, 80) == 8500269675886743056
