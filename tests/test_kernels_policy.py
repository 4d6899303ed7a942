"""How the keys of latents are split among threadgroups, as the policy counts turns."""

from __future__ import annotations

import numpy as np
import pytest
from mlxrewrite.kernels import policy

PROCESSORS = policy.THREADGROUPS["cuda"] // 2


def parts(lengths, pieces=2, tile=64):
    tiles = -(-np.array(lengths) // tile)
    each = policy.latent_split(tiles, np.full(len(tiles), pieces), tile)
    return -(-tiles // each)


@pytest.mark.parametrize("length", [2048, 2049, 2111, 2304, 3000, 4095, 4096, 4097, 9000])
def test_threadgroups_that_fill_the_device_are_not_split(length):
    """A key more than a power of two must not cost a second turn."""
    assert set(parts([length] * 64)) == {1}


def test_few_sequences_fill_the_device():
    for count, length in ((1, 8192), (2, 8192), (8, 4096), (16, 4096), (32, 8192)):
        found = int(parts([length] * count).sum()) * 2
        assert PROCESSORS / 3 < found <= PROCESSORS


def test_a_threadgroup_has_at_least_256_keys():
    assert set(parts([255, 256])) == {1}
    for tile in (32, 64):
        each = policy.latent_split(np.array([1000]), np.array([1]), tile)
        assert each * tile >= 256


def test_one_long_sequence_among_short_ones_is_split():
    found = parts([64 * 1024, *[256] * 20])
    assert found[0] > 8 and set(found[1:]) == {1}
