"""Where the host waits for a CUDA device, and why; and where the device computes in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WAITS: Mapping[str, str] = {}
"""The reason for each function (`path:name`) that makes the host wait within a step."""

DOUBLES: Mapping[str, str] = {}
"""The reason for each function that makes tensors of float64 on the device within a step."""

ANSWERS: Mapping[str, Any] = {}
"""The values that these functions read from the device; all others read 0."""
