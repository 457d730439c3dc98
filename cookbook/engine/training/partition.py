"""Partitions sequences over processes and into micro-batches, balanced by the tokens that are computed.

Sequences that share a beginning form a family, which stays together where it can: what is in one micro-batch
is computed once.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from cookbook.engine.model.prefix_tree import Family

_UNBALANCED = 1.25
"""A family is divided if it has more than this share of the tokens that each process would get."""


def partition(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Returns the indices of the sequences in each part.

    The longest sequence is assigned first, and each goes to the part with the fewest tokens. If there are
    fewer sequences than parts, some parts are empty. Indices ascend within each part.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    smallest = [(0, number) for number in range(num_parts)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        num_tokens, number = heapq.heappop(smallest)
        parts[number].append(index)
        heapq.heappush(smallest, (num_tokens + lengths[index], number))
    return [sorted(indices) for indices in parts]


def plan_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Returns the indices of the sequences in each micro-batch of at most `max_tokens`.

    There are as few micro-batches as can hold all sequences. A longer sequence is alone in its micro-batch.
    Indices ascend within each.
    """
    num_microbatches = max(1, -(-sum(lengths) // max_tokens))
    while True:
        plan = partition(lengths, num_microbatches)
        if all(len(part) <= 1 or sum(lengths[index] for index in part) <= max_tokens for part in plan):
            return sorted(part for part in plan if part)
        num_microbatches += 1


def partition_families(families: Sequence[Family], num_parts: int) -> list[list[Family]]:
    """Returns the families of each part, those of a part in their order.

    A family that would keep one process busy while others wait is divided.
    """
    units = list(families)
    while num_parts > 1:
        sizes = [unit.size() for unit in units]
        limit = _UNBALANCED * sum(sizes) / num_parts
        divided = [
            unit.divided() if size > limit and len(unit.indices) > 1 else (unit,)
            for unit, size in zip(units, sizes, strict=True)
        ]
        if all(len(parts) == 1 for parts in divided):
            break
        units = [part for parts in divided for part in parts]
    return [
        [units[place] for place in part] for part in partition([unit.size() for unit in units], num_parts)
    ]


def plan_families(
    families: Sequence[Family],
    size_of: Callable[[int], int],
    max_tokens: int,
    memory_of: Callable[[int], int],
    max_in_memory: int,
) -> list[list[Family]]:
    """Returns the families of each micro-batch.

    `size_of` and `memory_of` map the length of a sequence to its size. Families share a micro-batch of at
    most `max_tokens` by size. A larger family is alone, and divided only if it exceeds `max_in_memory`,
    because what its parts share would be computed for each.
    """
    units: list[Family] = []
    waiting = list(reversed(families))
    while waiting:
        unit = waiting.pop()
        if len(unit.indices) > 1 and unit.size(memory_of) > max_in_memory:
            waiting += reversed(unit.divided())
        else:
            units.append(unit)
    plan = plan_microbatches([unit.size(size_of) for unit in units], max_tokens)
    return [[units[place] for place in places] for places in plan]
