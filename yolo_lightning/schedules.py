"""Learning-rate schedules per optimizer step, as factors of the recipe's learning rate.

Source: the original program, which counts the images of a step before it updates the weights: its
first update has the rate of batch 1.
"""

from bisect import bisect_right

from yolo_lightning.errors import InputError

BURN_IN_POWER = 4


class Schedule:
    """A constant rate after the burn-in.

    Args:
        burn_in_steps (optimizer steps): over which the factor rises to 1, as a power of 4: keeps
            fresh weights from diverging; 0 for none. Source: Darknet; 1,000 in yolov2.cfg.

    Source: the original program; the paper does not mention a burn-in.

    Deviation: with a polynomial decay, the original program burns in with the power of the decay.
    """

    def __init__(self, burn_in_steps: int = 0) -> None:
        if burn_in_steps < 0:
            raise InputError(f"schedule: burn_in_steps is {burn_in_steps}; allowed: 0 or more")
        self.burn_in_steps = burn_in_steps

    def __call__(self, step: int) -> float:
        """Return the factor of an optimizer step, counted from 0."""
        number = step + 1
        if number < self.burn_in_steps:
            return float((number / self.burn_in_steps) ** BURN_IN_POWER)
        return self.after_burn_in(number)

    def after_burn_in(self, number: int) -> float:
        """Return the factor of optimizer step `number`, counted from 1, after the burn-in."""
        return 1.0


class StepDecay(Schedule):
    """Multiply the rate by a factor at each milestone.

    Args:
        milestones (optimizer steps): numbers, counted from 1, of the first steps at a new rate,
            ascending. Source: YOLO9000, section 3.
        factors (factor): of the rate from each milestone on, one per milestone. Source: YOLO9000,
            section 3.
        burn_in_steps (optimizer steps): over which the factor rises to 1, as a power of 4: keeps
            fresh weights from diverging; 0 for none. Source: Darknet; 1,000 in yolov2.cfg.

    Source: YOLO9000, section 3, "Training for detection": a tenth at epochs 60 and 90.
    """

    def __init__(self, milestones: list[int], factors: list[float], burn_in_steps: int = 0) -> None:
        super().__init__(burn_in_steps)
        if len(milestones) != len(factors) or milestones != sorted(milestones):
            raise InputError(
                f"schedule: milestones are {milestones}, factors {factors}; allowed: one factor "
                "per milestone, milestones ascending"
            )
        self.milestones, self.factors = milestones, factors

    def after_burn_in(self, number: int) -> float:
        """Return the product of the factors of all milestones up to this step."""
        product = 1.0
        for factor in self.factors[: bisect_right(self.milestones, number)]:
            product *= factor
        return product


class PolynomialDecay(Schedule):
    """Decay to zero as a power of the remaining fraction of training.

    Args:
        total_steps (optimizer steps): of the whole training, 1 or more; the rate of the last one is
            0. Source: YOLO9000, section 3.
        power (exponent): 0 or more: higher lowers the rate earlier; 4 in the paper's classification
            training. Source: YOLO9000, section 3.
        burn_in_steps (optimizer steps): over which the factor rises to 1, as a power of 4: keeps
            fresh weights from diverging; 0 for none. Source: Darknet; 1,000 in yolov2.cfg.

    Source: YOLO9000, section 3, "Training for classification".
    """

    def __init__(self, total_steps: int, power: float = 4.0, burn_in_steps: int = 0) -> None:
        super().__init__(burn_in_steps)
        if total_steps < 1 or power < 0:
            raise InputError(
                f"schedule: total_steps is {total_steps}, power {power}; allowed: 1 or more "
                "steps, power 0 or more"
            )
        self.total_steps, self.power = total_steps, power

    def after_burn_in(self, number: int) -> float:
        """Return (1 - number / total_steps) ** power; 0 from the last step on."""
        return float(max(0.0, 1 - number / self.total_steps) ** self.power)
