"""The heap against the definition: look for the best pair again after every join."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from engine.tokenizer.merge import Priority, join_symbols


def join_by_definition(symbols: list[bytes], priority: Priority) -> list[bytes]:
    symbols = list(symbols)
    while True:
        ranks = [priority(a, b) for a, b in pairwise(symbols)]
        known = [rank for rank in ranks if rank is not None]
        if not known:
            return symbols
        left = ranks.index(min(known))
        symbols[left : left + 2] = [symbols[left] + symbols[left + 1]]


def by_rank(ranks: dict[tuple[bytes, ...], int]) -> Priority:
    return lambda left, right: ranks.get((left, right))


def test_the_heap_does_what_the_definition_says(rng: np.random.Generator) -> None:
    n_joined = 0
    for _ in range(500):
        ranks: dict[tuple[bytes, ...], int] = {}
        letters = [b"a", b"b", b"c"]
        known = list(letters)
        for _ in range(int(rng.integers(1, 25))):
            pair = tuple(known[i] for i in rng.integers(0, len(known), 2))
            # Few different ranks, so that many are equal, and not in order of making.
            ranks[pair] = int(rng.integers(0, 6))
            known.append(b"".join(pair))
        symbols = [letters[i] for i in rng.integers(0, 3, int(rng.integers(0, 40)))]
        expected = join_by_definition(symbols, by_rank(ranks))
        joined = join_symbols(list(symbols), by_rank(ranks))
        assert joined == expected
        n_joined += len(symbols) - len(joined)
    assert n_joined > 1000


def test_no_symbols_and_one_symbol_stay() -> None:
    assert join_symbols([], lambda a, b: 0) == []
    assert join_symbols([b"a"], lambda a, b: 0) == [b"a"]
    assert join_symbols([b"a", b"b", b"c"], lambda a, b: 0) == [b"abc"]
