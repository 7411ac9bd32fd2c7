"""What stands beside every number, see `empf/machine.py`; and how numbers are summed up."""

import statistics
from collections.abc import Iterable

from empf.machine import machine

__all__ = ["machine", "spread"]


def spread(values: Iterable[float], digits: int = 4) -> dict:
    """Median and quartiles."""
    values = list(values)
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(middle, digits), "quartiles": [round(low, digits), round(high, digits)]}
