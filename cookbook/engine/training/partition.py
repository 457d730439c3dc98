"""A batch dealt out over processes, and what they make of it put together again.

Every process has the whole batch and deals it out by itself, so nothing is sent before results are.

Shape suffixes: N positions of all the batch's sequences end to end, S scored positions of a micro-batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch

from cookbook.engine.model.packing import Layout, copy_to
from cookbook.engine.processes import World
from cookbook.engine.training.results import Scored


def deal_out(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Which sequences go to which share: the longest first, each to the share that has the fewest tokens.

    Where there are fewer sequences than shares, some are empty. Indices ascend within each.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    emptiest = [(0, number) for number in range(num_shares)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        held, number = heapq.heappop(emptiest)
        shares[number].append(index)
        heapq.heappush(emptiest, (held + lengths[index], number))
    return [sorted(indices) for indices in shares]


def put_together(
    world: World, scored: Scored, lengths: Sequence[int], device: torch.device, with_argmax: bool
) -> Scored:
    """What the micro-batches of all processes came to, as one that holds the whole batch.

    Each process fills in its part of a row of zeros, and the rows are added up: x + 0 is x.
    """
    if world.is_alone:
        return scored
    ends = np.cumsum(lengths)
    starts = ends - lengths
    num_tokens = int(ends[-1])
    logprobs_N = torch.zeros(num_tokens, device=device)
    likeliest_N = torch.zeros(num_tokens if with_argmax else 0, device=device)
    for number, (indices, layout) in enumerate(zip(scored.plan, scored.layouts, strict=True)):
        row = np.concatenate([np.arange(starts[index], ends[index]) for index in indices])
        places_S = copy_to(device, row[layout.scored_S])
        logprobs_N.index_copy_(0, places_S, scored.logprobs[number])
        if with_argmax:
            likeliest_N.index_copy_(0, places_S, scored.likeliest[number].float())
    loss = torch.stack(scored.losses).sum() if scored.losses else torch.zeros((), device=device)
    world.all_reduce_sum([logprobs_N, likeliest_N, loss])
    segments = list(zip(starts.tolist(), ends.tolist(), strict=True))
    whole = Layout(segments, np.arange(num_tokens), num_tokens)
    return Scored(
        plan=[list(range(len(lengths)))],
        layouts=[whole],
        logprobs=[logprobs_N],
        losses=[loss],
        likeliest=[likeliest_N] if with_argmax else [],
    )
