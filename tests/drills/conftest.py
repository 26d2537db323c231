"""The figures that the drills print at their end."""

from collections import defaultdict

import pytest

WORST = {"seconds", "MB", "growth %"}  # of these figures the largest counts, of others the sum


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what the tests recorded by `record_property`, as ``(drill, figure): number``."""
    figures: dict[str, dict[str, float]] = defaultdict(dict)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") != "call":
                continue
            for key, value in report.user_properties:
                drill, _, name = key.partition(": ")
                known = figures[drill].get(name, 0)
                figures[drill][name] = max(known, value) if name in WORST else known + value
    if figures:
        terminalreporter.section("drills")
    for drill, values in sorted(figures.items()):
        numbers = ", ".join(f"{name} {round(value, 2):g}" for name, value in values.items())
        terminalreporter.write_line(f"{drill}: {numbers}")
