"""Learning-rate schedules, per optimizer step: a factor on the recipe's rate."""

from bisect import bisect_right
from dataclasses import dataclass, field

from yolo_lightning.errors import InputError

BURN_IN_POWER = 4


@dataclass
class Schedule:
    """A constant rate after the burn-in.

    Attributes:
        burn_in_steps: the rate rises by a power of 4 over this many steps; 0 for none.

    Source: the original program; the paper does not mention a burn-in.
    """

    burn_in_steps: int = 0

    def __post_init__(self) -> None:
        if self.burn_in_steps < 0:
            raise InputError(f"schedule: burn_in_steps is {self.burn_in_steps}; allowed: 0 or more")

    def __call__(self, step: int) -> float:
        """Return the factor of optimizer step `step`, counted from 0."""
        if step < self.burn_in_steps:
            return float(((step + 1) / self.burn_in_steps) ** BURN_IN_POWER)
        return self.after_burn_in(step)

    def after_burn_in(self, step: int) -> float:
        """Return the factor once the burn-in is over."""
        return 1.0


@dataclass
class StepDecay(Schedule):
    """Multiply the rate at given steps.

    Attributes:
        milestones: optimizer steps, ascending.
        factors: the multiplier at each of them.

    Source: YOLO9000, section 3, "Training for detection": a tenth at epochs 60 and 90.
    """

    milestones: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.milestones) != len(self.factors) or self.milestones != sorted(self.milestones):
            raise InputError(
                f"schedule: milestones {self.milestones} and factors {self.factors} have to be "
                "equally many, milestones ascending"
            )

    def after_burn_in(self, step: int) -> float:
        """Return the product of the factors whose milestones are reached."""
        product = 1.0
        for factor in self.factors[: bisect_right(self.milestones, step)]:
            product *= factor
        return product


@dataclass
class PolynomialDecay(Schedule):
    """Fall to zero as a power of the remaining share of training.

    Attributes:
        total_steps: optimizer steps of the whole training.
        power: 4 in the paper's classification training.

    Source: YOLO9000, section 3, "Training for classification".
    """

    total_steps: int = 0
    power: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_steps < 1 or self.power < 0:
            raise InputError(
                f"schedule: total_steps is {self.total_steps}, power {self.power}; allowed: "
                "1 or more steps (such as ${...trainer.max_steps}), power 0 or more"
            )

    def after_burn_in(self, step: int) -> float:
        """Return (1 - step / total_steps) ** power, 0 past the end."""
        return float(max(0.0, 1 - step / self.total_steps) ** self.power)
