"""Draws for many seeds at once, against NumPy's own generators one by one."""

import numpy as np
import pytest

from opensora_jax.data.plan.draws import Generators

EDGES = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 7, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1]


def expected(seeds, count):
    return np.stack([np.random.default_rng(seed).random(count) for seed in seeds])


def test_seeds_of_all_sizes_give_the_draws_of_numpy():
    drawn = np.random.default_rng(3).integers(0, 2**64, (16, 29), np.uint64, endpoint=False) >> np.arange(
        0, 64, 4, dtype=np.uint64
    ).reshape(16, 1)
    seeds = [*EDGES, *range(300), *drawn.ravel().tolist()]
    generators, every = Generators(np.array(seeds, np.uint64)), np.arange(len(seeds))
    found = np.stack([generators.random(every) for _ in range(7)], axis=1)
    assert found.tobytes() == expected(seeds, 7).tobytes()


def test_each_generator_goes_on_from_its_own_last_draw():
    seeds, rng = [42 + 393 * row for row in range(101)], np.random.default_rng(0)
    generators, streams = Generators(np.array(seeds, np.uint64)), expected(seeds, 30)
    used = np.zeros(101, int)
    for _ in range(30):
        which = rng.permutation(101)[: rng.integers(0, 101)]
        np.testing.assert_array_equal(generators.random(which), streams[which, used[which]])
        used[which] += 1


def test_the_draws_do_not_change_with_the_version_of_numpy():
    assert Generators(np.array([0], np.uint64)).random(np.array([0])).tolist() == [0.6369616873214543]


@pytest.mark.parametrize("dtype", [np.int16, np.int64])
def test_nothing_is_drawn_for_nobody(dtype):
    assert Generators(np.zeros(3, np.uint64)).random(np.zeros(0, dtype)).shape == (0,)
