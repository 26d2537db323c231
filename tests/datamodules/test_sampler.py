import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolo_lightning.datamodules.sampler import AlternatingBatchSampler, JointOrder, permute
from yolo_lightning.errors import InputError


def order(ratio: str = "1", sizes: tuple[int, int] = (10, 7), batch: tuple[int, int] = (4, 6)):
    return JointOrder(*sizes, *batch, Fraction(ratio), seed=3, size_of_step=lambda step: 32)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 10**6))
def test_permutation_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, (key,)).tolist()) == list(range(size))


def test_permutation_is_uniform_and_differs_between_keys():
    size, draws = 8, 4000
    places = np.zeros((size, size))
    for key in range(draws):
        places[np.arange(size), permute(np.arange(size), size, (key,))] += 1
    expected = draws / size
    chi_square = ((places - expected) ** 2 / expected).sum()
    assert chi_square < 100  # 49 degrees of freedom; 100 is beyond the 0.9999 quantile
    assert not np.array_equal(
        permute(np.arange(100), 100, (0,)), permute(np.arange(100), 100, (1,))
    )


def test_permutation_of_fourteen_million_positions():
    found = permute(np.array([0, 7, 13_999_999]), 14_000_000, (1, 2))
    assert len(set(found.tolist())) == 3
    assert found.max() < 14_000_000


@pytest.mark.parametrize(
    ("ratio", "kinds"),
    [("1", "dcdcdcdc"), ("0", "dddddddd"), ("4", "dccccdcc"), ("1/2", "ddcddcdd")],
)
def test_kinds_alternate_in_the_ratio(ratio, kinds):
    assert "".join(order(ratio).plan(step).kind[0] for step in range(8)) == kinds


def test_each_pass_reads_a_source_once_and_batches_span_passes():
    joint = order()
    plans = [joint.plan(step) for step in range(40)]
    for kind, size in (("detection", 10), ("classification", 7)):
        seen = [
            (number, index)
            for plan in plans
            if plan.kind == kind
            for number, index in zip(plan.passes, plan.indices, strict=True)
        ]
        for number in range(len(seen) // size):
            members = [index for passed, index in seen if passed == number]
            assert sorted(members) == list(range(size))
        assert [n for n, _ in seen] == sorted(n for n, _ in seen)
    first, second = ([i for n, i in zip(p.passes, p.indices, strict=True)] for p in plans[:2])
    assert first != second
    assert any(len(set(plan.passes)) > 1 for plan in plans)


def test_shares_of_ranks_make_up_the_global_batch():
    joint = order(batch=(4, 6))
    for step in range(12):
        whole = joint.plan(step)
        shares = [joint.plan(step, rank, 2) for rank in range(2)]
        assert sum((share.indices for share in shares), []) == whole.indices
        assert {share.kind for share in shares} == {whole.kind}
        assert {share.images_seen for share in shares} == {whole.images_seen}


def test_images_seen_counts_both_kinds():
    assert [order().plan(step).images_seen for step in range(5)] == [0, 4, 10, 14, 20]


@pytest.mark.parametrize(("ratio", "steps"), [("0", 3), ("1", 6), ("4", 15), ("1/2", 4)])
def test_epoch_is_one_pass_of_the_detection_source(ratio, steps):
    joint = order(ratio)
    assert joint.steps_per_pass == steps
    kinds = Counter(joint.plan(step).kind for step in range(steps))
    assert kinds["detection"] == 3


def test_plans_go_on_from_the_trained_step():
    trained = 0
    sampler = AlternatingBatchSampler(order(), 6, lambda: trained)
    plans = list(itertools.islice(sampler, 20))
    trained = 9
    iterator = iter(sampler)
    trained = 11  # the step at which the iteration began counts
    assert list(itertools.islice(iterator, 11)) == plans[9:]
    assert [plan.step for plan in plans] == list(range(20))
    assert [p.indices for p in plans[:6]] != [p.indices for p in plans[6:12]]
    assert len(sampler) == 6


def test_batch_size_that_ranks_cannot_share_raises():
    with pytest.raises(InputError, match="detection_batch_size is the global batch: 4 images"):
        AlternatingBatchSampler(order(), 6, lambda: 0, rank=0, world_size=3)
    unused = order("0", batch=(3, 64))
    assert len(AlternatingBatchSampler(unused, 6, lambda: 0, rank=0, world_size=3)) == 6


def test_classification_source_alone_is_read_in_full_passes():
    alone = order(sizes=(0, 7), batch=(4, 3))
    assert alone.steps_per_pass == 3
    plans = [alone.plan(step) for step in range(14)]
    assert {plan.kind for plan in plans} == {"classification"}
    read = [index for plan in plans for index in plan.indices]
    for k in range(6):
        assert sorted(read[7 * k : 7 * k + 7]) == list(range(7))
    assert read[:7] != read[7:14]
    assert [plan.images_seen for plan in plans[:3]] == [0, 3, 6]
    AlternatingBatchSampler(alone, 3, lambda: 0, 0, 3)  # the unused batch of four is nobody's
    with pytest.raises(InputError, match="classification_batch_size is the global batch: 3"):
        AlternatingBatchSampler(alone, 3, lambda: 0, 0, 2)
