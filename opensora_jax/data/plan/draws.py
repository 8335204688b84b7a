"""The draws of `np.random.default_rng(seed).random()` for millions of seeds at once, bit for bit.

The original makes a generator per row of its table, which takes 12 us and more; here the same integers are worked
out for whole arrays. Sources: SeedSequence in numpy/random/bit_generator.pyx (after M. E. O'Neill's seed_seq),
and PCG64, the XSL-RR form with 128 bits of state, of O'Neill 2014, "PCG: A family of simple fast
space-efficient statistically good algorithms for random number generation". The 128 bits are pairs of 64.
"""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from jaxtyping import Float64, Int, UInt32, UInt64

Words: TypeAlias = UInt32[np.ndarray, " N"]
Pair: TypeAlias = tuple[UInt64[np.ndarray, "..."], UInt64[np.ndarray, "..."]]  # the high and the low 64 bits

POOL = 4  # words of SeedSequence
HASH_ENTROPY, HASH_OUTPUT = (0x43B0D7E5, 0x931E8875), (0x8B51F9DD, 0x58F38DED)  # start and multiplier
MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645  # of PCG64
LOW_32, SHIFT_32 = np.uint64(0xFFFFFFFF), np.uint64(32)


class Generators:
    """One generator for each seed; those that `make` left out are made when they are first drawn from."""

    def __init__(self, seeds: UInt64[np.ndarray, " N"]):
        self.seeds = seeds
        self._made = np.zeros(len(seeds), bool)
        self._state, self._increment = _empty_pair(len(seeds)), _empty_pair(len(seeds))

    def make(self, which: Int[np.ndarray, " M"]) -> None:
        """Makes these generators at once, which is faster than a few at a time."""
        fresh = which[~self._made[which]]
        if len(fresh):
            state, increment = _seeded(self.seeds[fresh])
            _put(self._state, fresh, state)
            _put(self._increment, fresh, increment)
            self._made[fresh] = True

    def random(self, which: Int[np.ndarray, " M"]) -> Float64[np.ndarray, " M"]:
        """Returns the next draw, in [0, 1), of each of these generators; none of them may come twice."""
        self.make(which)
        state = _add(_multiply(_take(self._state, which)), _take(self._increment, which))
        _put(self._state, which, state)
        high, low = state
        return _to_unit(_rotate(high ^ low, high >> np.uint64(58)))


def _empty_pair(count: int) -> Pair:
    return np.empty(count, np.uint64), np.empty(count, np.uint64)


def _take(pair: Pair, which: Int[np.ndarray, " M"]) -> Pair:
    return pair[0].take(which), pair[1].take(which)


def _put(pair: Pair, which: Int[np.ndarray, " M"], values: Pair) -> None:
    pair[0][which], pair[1][which] = values


def _seeded(seeds: UInt64[np.ndarray, " M"]) -> tuple[Pair, Pair]:
    """Returns the states and the increments of the generators of these seeds."""
    words = [words.astype(np.uint64) for words in _seed_words(seeds)]
    start_high, start_low, high, low = (a | b << SHIFT_32 for a, b in zip(words[::2], words[1::2], strict=True))
    one = np.uint64(1)
    increment = (high << one | low >> np.uint64(63), low << one | one)
    return _add(_multiply(_add((start_high, start_low), increment)), increment), increment


def _seed_words(seeds: UInt64[np.ndarray, " M"]) -> list[Words]:
    """Returns the eight words that SeedSequence(seed) makes of each seed below 2**64."""
    zero = np.zeros_like(seeds, np.uint32)
    constants = _constants(*HASH_ENTROPY)
    entropy = [(seeds & LOW_32).astype(np.uint32), (seeds >> SHIFT_32).astype(np.uint32), zero, zero]
    pool = [_hash(word, constants) for word in entropy]
    for source in range(POOL):
        for target in range(POOL):
            if source != target:
                pool[target] = _mix(pool[target], _hash(pool[source], constants))
    constants = _constants(*HASH_OUTPUT)
    return [_hash(pool[i % POOL], constants) for i in range(2 * POOL)]


def _constants(value: int, multiplier: int) -> Iterator[np.uint32]:
    """Yields the numbers that successive calls of the hash use, each twice."""
    while True:
        yield np.uint32(value)
        value = value * multiplier & 0xFFFFFFFF
        yield np.uint32(value)


def _hash(words: Words, constants: Iterator[np.uint32]) -> Words:
    words = words ^ next(constants)
    words *= next(constants)
    words ^= words >> np.uint32(16)
    return words


def _mix(first: Words, second: Words) -> Words:
    mixed = first * np.uint32(0xCA01F9DD)
    mixed -= second * np.uint32(0x4973F715)
    mixed ^= mixed >> np.uint32(16)
    return mixed


def _multiply(number: Pair) -> Pair:
    """Returns the number times PCG64's multiplier, modulo 2**128."""
    high, low = number
    by_high, by_low = np.uint64(MULTIPLIER >> 64), np.uint64(MULTIPLIER & (1 << 64) - 1)
    b1, b0 = by_low >> SHIFT_32, by_low & LOW_32
    a1, a0 = low >> SHIFT_32, low & LOW_32
    middle = a1 * b0 + (a0 * b0 >> SHIFT_32)  # neither sum exceeds 64 bits
    carried = a1 * b1 + (middle >> SHIFT_32) + ((a0 * b1 + (middle & LOW_32)) >> SHIFT_32)
    return carried + high * by_low + low * by_high, low * by_low


def _add(first: Pair, second: Pair) -> Pair:
    low = first[1] + second[1]
    return first[0] + second[0] + (low < second[1]), low


def _rotate(bits: UInt64[np.ndarray, " M"], count: UInt64[np.ndarray, " M"]) -> UInt64[np.ndarray, " M"]:
    """Returns the bits rotated to the right."""
    return bits >> count | bits << (-count & np.uint64(63))


def _to_unit(bits: UInt64[np.ndarray, " M"]) -> Float64[np.ndarray, " M"]:
    return (bits >> np.uint64(11)) * 2.0**-53
