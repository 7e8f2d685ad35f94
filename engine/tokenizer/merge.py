"""Joining of adjacent symbols, best pair first: the step that SPM and BPE share."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush

# Lower joins earlier; None forbids the join.
Priority = Callable[[bytes, bytes], "float | None"]


def join_symbols(symbols: list[bytes], priority: Priority) -> list[bytes]:
    """Join the adjacent pair of lowest priority, leftmost first among equals, until none is left.

    Parameters
    ----------
    symbols : list of bytes
        None of them empty. The list is used up.
    priority : callable
        Rank of joining a left and a right symbol, or None when they never join.

    Returns
    -------
    list of bytes
        The symbols that remain, in order.

    Notes
    -----
    A heap with lazy deletion over a doubly linked list: O(n log n) for n symbols. An absorbed
    symbol becomes empty, and a symbol only ever grows, so an entry is stale exactly when a side is
    empty or the pair's total length is no longer the one noted.
    """
    n = len(symbols)
    before = list(range(-1, n - 1))
    after = list(range(1, n + 1))
    heap = []
    for left in range(n - 1):
        rank = priority(symbols[left], symbols[left + 1])
        if rank is not None:
            heap.append((rank, left, left + 1, len(symbols[left]) + len(symbols[left + 1])))
    heapify(heap)

    while heap:
        _, left, right, size = heappop(heap)
        a, b = symbols[left], symbols[right]
        if not a or not b or len(a) + len(b) != size:
            continue
        joined = a + b
        symbols[left] = joined
        symbols[right] = b""
        following = after[left] = after[right]
        if following < n:
            before[following] = left
            rank = priority(joined, symbols[following])
            if rank is not None:
                heappush(heap, (rank, left, following, size + len(symbols[following])))
        previous = before[left]
        if previous >= 0:
            rank = priority(symbols[previous], joined)
            if rank is not None:
                heappush(heap, (rank, previous, left, size + len(symbols[previous])))
    return [symbol for symbol in symbols if symbol]
