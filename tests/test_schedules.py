"""Learning-rate schedules."""

import pytest

from yolo_lightning.errors import InputError
from yolo_lightning.schedules import PolynomialDecay, Schedule, StepDecay


def test_burn_in_rises_with_the_fourth_power():
    schedule = Schedule(burn_in_steps=10)
    assert schedule(0) == pytest.approx(1e-4)
    assert schedule(4) == pytest.approx(0.0625)
    assert schedule(9) == schedule(10) == schedule(10**6) == 1


def test_step_decay():
    schedule = StepDecay([60, 90], [0.1, 0.1])
    assert [schedule(s) for s in (0, 59, 60, 89)] == [1, 1, 0.1, 0.1]
    assert schedule(90) == pytest.approx(0.01)


def test_polynomial_decay():
    schedule = PolynomialDecay(100, power=4, burn_in_steps=0)
    assert [schedule(s) for s in (0, 50, 100, 101)] == [1, 0.0625, 0, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule(-1),
        lambda: StepDecay([1, 2], [0.1]),
        lambda: StepDecay([2, 1], [0.1, 0.1]),
        lambda: PolynomialDecay(0),
    ],
)
def test_invalid_schedules_are_rejected(make):
    with pytest.raises(InputError, match="schedule"):
        make()
