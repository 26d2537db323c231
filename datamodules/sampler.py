"""The order of samples, a pure function of (seed, step, rank, world size)."""

import itertools
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
    """Permute positions by a bijection of 0…size - 1 that depends on `key`."""
    # a Feistel network over the next even power of two, applied again to results outside the range
    # (cycle walking): no list of 14 million numbers is stored or shuffled
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
    """Mix the bits of 64-bit integers, as the finalisers of hash functions do."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class BatchPlan:
    """The samples of one rank at one step; see `DetectionBatch` for step and images_seen."""

    kind: Kind
    step: int
    images_seen: int
    image_size: int  # side of the images, px
    indices: list[int]  # in the source
    passes: list[int]  # number of the pass over the source, for each sample


@dataclass(frozen=True)
class JointOrder:
    """The samples of every step: detection and classification batches, evenly interleaved."""

    # each source is an endless sequence of permuted passes: a batch may contain the end of one and
    # the start of the next, and no sample is dropped

    detection_size: int  # samples; if 0, all batches are classification batches
    classification_size: int
    detection_batch_size: int  # over all ranks
    classification_batch_size: int
    ratio: Fraction  # classification batches per detection batch; 0 for none
    seed: int
    size_of_step: Callable[[int], int]  # side of the images of a step, px; the same on all ranks

    def batches_before(self, step: int) -> tuple[int, int]:
        """Return the numbers of detection and classification batches before a step."""
        if not self.detection_size:
            return 0, step
        classification = (
            step * self.ratio.numerator // (self.ratio.numerator + self.ratio.denominator)
        )
        return step - classification, classification

    @property
    def steps_per_pass(self) -> int:
        """Steps of one pass over the detection source, interleaved batches included."""
        if not self.detection_size:
            return -(-self.classification_size // self.classification_batch_size)
        batches = -(-self.detection_size // self.detection_batch_size)
        step = int(batches * (1 + self.ratio))
        while self.batches_before(step)[0] < batches:
            step += 1
        return step

    @property
    def first_steps(self) -> list[int]:
        """The first step of each kind of batch."""
        steps = [0]
        while self.ratio and self.detection_size and self.batches_before(steps[-1] + 1)[1] == 0:
            steps = [0, steps[-1] + 1]
        return steps

    def plan(self, step: int, rank: int = 0, world_size: int = 1) -> BatchPlan:
        """Return the plan of a rank at a step; the ranks' shares make up the global batch."""
        before = self.batches_before(step)
        kind = int(self.batches_before(step + 1)[1] > before[1])
        batch_sizes = (self.detection_batch_size, self.classification_batch_size)
        size = (self.detection_size, self.classification_size)[kind]
        share = batch_sizes[kind] // world_size
        first = before[kind] * batch_sizes[kind] + rank * share
        passes, positions = np.divmod(np.arange(first, first + share), size)
        indices = np.empty_like(positions)
        for number in np.unique(passes):
            rows = passes == number
            indices[rows] = permute(positions[rows], size, (self.seed, kind, int(number)))
        images_seen = before[0] * batch_sizes[0] + before[1] * batch_sizes[1]
        image_size = self.size_of_step(step)
        return BatchPlan(
            KINDS[kind], step, images_seen, image_size, indices.tolist(), passes.tolist()
        )


class AlternatingBatchSampler(Sampler[BatchPlan]):
    """Yield the plans of a rank, without end, from the first step that is not trained yet.

    The loader divides them into epochs.

    Raises:
        InputError: a global batch size that is not a multiple of `world_size`.
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
        """Return the number of steps of a full epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[BatchPlan]:
        # steps trained so far: a resumed epoch starts within it, and Lightning does not call
        # set_epoch on batch samplers
        steps = itertools.count(self.first_step())
        return (self.order.plan(step, self.rank, self.world_size) for step in steps)
