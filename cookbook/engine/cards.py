"""Memory and speed of common GPUs, for estimates without the GPU.

The memory is about what torch reports, which is less than the name of a card says. The peak is that of dense
products in bfloat16 (float16 on a T4) with sums in float32, from the vendor's data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
SHARE_OF_PEAK = 0.4
"""The share of the peak that a training step is taken to reach. It is an assumption, not a measurement."""


@dataclass(frozen=True)
class Card:
    name: str
    memory: float
    """In bytes."""
    peak_flops: float
    """Operations per second."""


CARDS = {
    key: Card(name, memory * GIB, peak * 1e12)
    for key, name, memory, peak in (
        ("t4", "T4 16 GB", 14.6, 65),
        ("4090", "RTX 4090 24 GB", 23.5, 165),
        ("5090", "RTX 5090 32 GB", 31.3, 209),
        ("l40s", "L40S 48 GB", 44.4, 362),
        ("a100", "A100 80 GB", 79.1, 312),
        ("h100", "H100 80 GB", 79.1, 989),
        ("h200", "H200 141 GB", 139.8, 989),
        ("b200", "B200 192 GB", 178.3, 2250),
    )
}
