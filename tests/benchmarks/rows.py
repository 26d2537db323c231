"""A row of the benchmarks' table, and functions timed in turn."""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

HEAD = ("what", "against", "goal", "ratio of seconds", "of processor time", "ours")


class Seconds(NamedTuple):
    """Wall clock, and user time of all threads of the process: less sensitive to other programs."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Row:
    """What was measured; ratios are ours by the other's, so that less is better, unless it says."""

    what: str
    ours: str
    goal: str = "–"
    against: str = "–"
    ratio: str = "–"
    cpu_ratio: str = "–"

    def cells(self) -> tuple[str, ...]:
        """Return the row in the order of `HEAD`."""
        return (self.what, self.against, self.goal, self.ratio, self.cpu_ratio, self.ours)

    def versus(self, ours: Sequence[Seconds], theirs: Sequence[Seconds]) -> "Row":
        """Return the row with the ratios of the seconds, round by round."""
        pairs = list(zip(ours, theirs, strict=True))
        return replace(
            self,
            ratio=spread([a.wall / b.wall for a, b in pairs]),
            cpu_ratio=spread([a.cpu / b.cpu for a, b in pairs if b.cpu]),
        )


def clock() -> Seconds:
    """Return the time."""
    return Seconds(time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime)


def seconds_of(function: Callable[[], Any]) -> Seconds:
    """Call a function, and return how long it took."""
    start = clock()
    function()
    end = clock()
    return Seconds(end.wall - start.wall, end.cpu - start.cpu)


def in_turn(rounds: int, *functions: Callable[[], Any]) -> list[list[Seconds]]:
    """Call functions in turn, every second round backwards; return the seconds of each one.

    A first round is not counted.
    """
    found: list[list[Seconds]] = [[] for _ in functions]
    for number in range(rounds + 1):
        order = range(len(functions)) if number % 2 else reversed(range(len(functions)))
        for k in order:
            found[k].append(seconds_of(functions[k]))
    return [one[1:] for one in found]


def spread(values: Sequence[float], form: str = ".3g", unit: str = "") -> str:
    """Return the median and, in brackets, the smallest and the largest value."""
    if not values:
        return "–"
    median, low, high = (format(v, form) for v in (statistics.median(values), *limits(values)))
    return f"{median}{unit} ({low} … {high})"


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and the largest value."""
    return min(values), max(values)


def wall(found: Sequence[Seconds], form: str = ".3g", scale: float = 1, unit: str = " s") -> str:
    """Return the spread of the wall clock."""
    return spread([scale * one.wall for one in found], form, unit)
