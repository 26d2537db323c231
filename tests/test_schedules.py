"""Learning-rate schedules."""

import pytest

from yolo_lightning.errors import InputError
from yolo_lightning.schedules import PolynomialDecay, Schedule, StepDecay


def test_burn_in_rises_with_the_fourth_power():
    """The first update has the rate of Darknet's batch 1, the burn-in ends at batch 10."""
    schedule = Schedule(burn_in_steps=10)
    assert schedule(0) == pytest.approx(1e-4)
    assert schedule(4) == pytest.approx(0.0625)
    assert schedule(8) == pytest.approx(0.6561)
    assert schedule(9) == schedule(10) == schedule(10**6) == 1
    assert Schedule()(0) == Schedule(burn_in_steps=1)(0) == 1


def test_step_decay():
    """Darknet's `steps=60,90`: its batch 60, the 60th update, is the first at the new rate."""
    schedule = StepDecay([60, 90], [0.1, 0.1])
    assert [schedule(s) for s in (0, 58, 59, 60, 88)] == [1, 1, 0.1, 0.1, 0.1]
    assert schedule(89) == schedule(90) == pytest.approx(0.01)


def test_the_released_tiny_network_has_a_tenth_of_the_rate_for_99_updates():
    """`yolov2-tiny-voc.cfg`: learning_rate=0.001, steps=-1,100,20000,30000, scales=.1,10,.1,.1."""
    schedule = StepDecay([-1, 100, 20_000, 30_000], [0.1, 10, 0.1, 0.1])
    rates = [0.001 * schedule(batch - 1) for batch in (1, 99, 100, 19_999, 20_000, 30_000)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-3, 1e-3, 1e-4, 1e-5])


def test_the_burn_in_hides_milestones_before_its_end():
    """Darknet's burn-in comes before its policy, whose factors then hold at once."""
    schedule = StepDecay([5, 12], [0.5, 0.1], burn_in_steps=10)
    assert [schedule(batch - 1) for batch in (5, 9, 10, 11, 12)] == pytest.approx(
        [0.0625, 0.6561, 0.5, 0.5, 0.05]
    )


def test_polynomial_decay():
    """The last update has the rate of batch 100 of 100: zero, as in the original program."""
    schedule = PolynomialDecay(100, power=4, burn_in_steps=0)
    assert [schedule(s) for s in (49, 99, 100, 101)] == [0.0625, 0, 0, 0]
    assert [schedule(s) for s in (0, 98)] == pytest.approx([0.99**4, 1e-8])


def test_polynomial_decay_after_a_burn_in():
    """The decay counts from the start of training, not from the end of the burn-in."""
    schedule = PolynomialDecay(100, power=1, burn_in_steps=20)
    assert [schedule(batch - 1) for batch in (10, 19, 20, 21)] == pytest.approx(
        [0.0625, 0.81450625, 0.8, 0.79]
    )


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
