"""The order of samples: computed from (seed, step, rank, world size), never remembered."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from yolo_lightning.errors import InputError

Kind = Literal["detection", "classification"]
KINDS: tuple[Kind, Kind] = ("detection", "classification")

_ROUNDS = 6


def permute(positions: NDArray[np.int64], size: int, key: tuple[int, ...]) -> NDArray[np.int64]:
    """Map positions 0…size - 1 to themselves by a bijection drawn from `key`.

    A Feistel network over the next even power of two, walked again where it leaves the range: no
    list of 14 million numbers is stored or shuffled.

    Args:
        positions: int64 (N,), each in 0…size - 1.
        size: number of samples, at least 1.
        key: the numbers that choose the permutation.
    """
    half_bits = max(1, (int(size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    round_keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def walk(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> shift, values & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        return (left << shift) | right

    values = walk(np.asarray(positions, dtype=np.uint64))
    outside = values >= size
    while outside.any():
        values[outside] = walk(values[outside])
        outside = values >= size
    return values.astype(np.int64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit integers; wrapping multiplication, as hash finalisers do."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class BatchPlan:
    """What one rank reads at one step.

    Attributes:
        kind: which source.
        step: number of the batch since training began.
        images_seen: images of both kinds that all ranks read before this batch.
        indices: samples of the source.
        passes: the pass over the source that each belongs to.
    """

    kind: Kind
    step: int
    images_seen: int
    indices: list[int]
    passes: list[int]


@dataclass(frozen=True)
class JointOrder:
    """Which samples each step reads: detection and classification batches, interleaved evenly.

    Each source is an endless stream of permuted passes; a batch takes the next positions of its
    stream, so passes may meet inside a batch and nothing is dropped.

    Attributes:
        detection_size, classification_size: samples of each source; without detection samples,
            every batch holds labels.
        detection_batch_size, classification_batch_size: *global* batch sizes, over all ranks.
        ratio: classification batches per detection batch; 0 for none.
        seed: chooses the permutations.
    """

    detection_size: int
    classification_size: int
    detection_batch_size: int
    classification_batch_size: int
    ratio: Fraction
    seed: int

    def batches_before(self, step: int) -> tuple[int, int]:
        """Return how many detection and classification batches precede a step."""
        if not self.detection_size:
            return 0, step
        classification = (
            step * self.ratio.numerator // (self.ratio.numerator + self.ratio.denominator)
        )
        return step - classification, classification

    @property
    def steps_per_pass(self) -> int:
        """Steps that hold one pass of the detection source, with what is interleaved."""
        if not self.detection_size:
            return -(-self.classification_size // self.classification_batch_size)
        batches = -(-self.detection_size // self.detection_batch_size)
        step = int(batches * (1 + self.ratio))
        while self.batches_before(step)[0] < batches:
            step += 1
        return step

    @property
    def first_steps(self) -> list[int]:
        """The first step of each kind that takes part."""
        steps = [0]
        while self.ratio and self.detection_size and self.batches_before(steps[-1] + 1)[1] == 0:
            steps = [0, steps[-1] + 1]
        return steps

    def plan(self, step: int, rank: int = 0, world_size: int = 1) -> BatchPlan:
        """Return what a rank reads at a step; the ranks' shares join to the global batch."""
        before = self.batches_before(step)
        which = int(self.batches_before(step + 1)[1] > before[1])
        batch_sizes = (self.detection_batch_size, self.classification_batch_size)
        size = (self.detection_size, self.classification_size)[which]
        share = batch_sizes[which] // world_size
        first = before[which] * batch_sizes[which] + rank * share
        passes, positions = np.divmod(np.arange(first, first + share), size)
        indices = np.empty_like(positions)
        for number in np.unique(passes):
            chosen = passes == number
            key = (self.seed, which, int(number))
            indices[chosen] = permute(positions[chosen], size, key)
        seen = before[0] * batch_sizes[0] + before[1] * batch_sizes[1]
        return BatchPlan(KINDS[which], step, seen, indices.tolist(), passes.tolist())


class AlternatingBatchSampler(Sampler[BatchPlan]):
    """Yield the plans of an epoch's remaining steps.

    Args:
        order: which samples each step reads.
        steps_per_epoch: number of steps between two epoch ends.
        first_step: asked at each iteration for the number of steps trained so far. Nobody calls
            ``set_epoch`` on a batch sampler, and a resumed epoch starts in its middle: asking the
            trainer covers both.
        rank, world_size: this process among all.

    Raises:
        InputError: a global batch that the ranks cannot share equally.
    """

    def __init__(
        self,
        order: JointOrder,
        steps_per_epoch: int,
        first_step: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        used = ["detection_batch_size"] if order.detection_size else []
        used += ["classification_batch_size"] if order.ratio or not order.detection_size else []
        for name in used:
            if getattr(order, name) % world_size:
                raise InputError(
                    f"data.{name} is the global batch: {getattr(order, name)} images cannot be "
                    f"shared equally by {world_size} ranks"
                )
        self.order, self.steps_per_epoch, self.first_step = order, steps_per_epoch, first_step
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Return the number of steps of a whole epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[BatchPlan]:
        first = self.first_step()
        end = (first // self.steps_per_epoch + 1) * self.steps_per_epoch
        for step in range(first, end):
            yield self.order.plan(step, self.rank, self.world_size)
