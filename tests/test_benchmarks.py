"""The benchmarks in tiny form, and their table."""

from typing import Any

import pytest
import torch

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import compiling, loading, naming, network, saving, start, step, waits
from tests.benchmarks.rehearsal_report import write_section
from tests.benchmarks.rows import HEAD, Row, Seconds, in_turn
from tests.helpers.training import train
from yolo_lightning import WordTree


@pytest.mark.parametrize("subject", [step, naming, network, loading, saving, compiling])
def test_rows_of_a_tiny_measurement_have_figures(subject: Any):
    rows = subject.measure(tiny=True)
    assert rows
    for row in rows:
        assert row.ours
        assert any(letter.isdigit() for letter in row.ratio) or "skipped" in row.ours
        assert "|" not in "".join(row.cells())


@pytest.mark.slow
def test_start_of_the_quickstart_is_measured():
    (row,) = start.measure(tiny=True)
    assert row.ours.startswith(f"{float(row.ours.split()[0])} s (")


@pytest.mark.end_to_end
def test_first_step_writes_the_age_of_its_process(tmp_path):
    train([start.FirstStep(str(tmp_path / "seconds"))], max_steps=1)
    elapsed, user = map(float, (tmp_path / "seconds").read_text().split())
    assert elapsed > 0
    assert user > 0


def test_waits_are_those_of_steps_that_are_not_logged():
    boxes, labels = "DetectionBatch", "ClassificationBatch"
    steps: list[Any] = [
        [boxes, False, 350, {"a": 1}], [boxes, False, 355, {"a": 1, "b": 2}],
        [labels, False, 270, {}], [boxes, True, 999, {"a": 9}], [labels, True, 999, {"a": 9}],
    ]  # fmt: skip
    rows = waits.to_rows({"detector": steps, "loss": [120, {"c": 2}]})
    assert [row.ours for row in rows] == [
        "1 … 3; 350 … 355 kernels", "0; 270 kernels", "120 kernels, 2 synchronisations",
    ]  # fmt: skip


def test_functions_take_turns_and_a_first_round_is_not_counted():
    calls: list[str] = []
    found = in_turn(2, lambda: calls.append("a"), lambda: calls.append("b"))
    assert "".join(calls) == "baabba"
    assert [len(seconds) for seconds in found] == [2, 2]


def test_a_ratio_is_the_median_of_the_rounds():
    ours = [Seconds(1, 4), Seconds(3, 4), Seconds(2, 4)]
    row = Row("what", "ours").versus(ours, [Seconds(1, 2), Seconds(2, 2), Seconds(8, 2)])
    assert row.ratio == "1 (0.25 … 1.5)"
    assert row.cpu_ratio == "2 (2 … 2)"


def test_table_is_written_between_its_comments(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## Other\n")
    for ours in ("old", "new"):
        text = benchmarks.render([Row("what", ours, "1")], 60)
        write_section(page, text, benchmarks.START, benchmarks.END)
    content = page.read_text()
    assert "| what | – | 1 | – | – | new |" in content
    assert "old" not in content
    assert content.count(f"| {' | '.join(HEAD)} |") == 1
    assert content.startswith("# Page\n\n## Other\n")


def test_the_command_runs_one_subject_and_writes_all_of_them(tmp_path, monkeypatch, capsys):
    subjects = {name: lambda name=name: [Row(f"row of {name}", "3 s")] for name in ("a", "b")}
    monkeypatch.setattr(benchmarks, "SUBJECTS", subjects)
    monkeypatch.setattr(benchmarks, "REPO", tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    page = tmp_path / "docs/benchmarks.md"
    page.parent.mkdir()
    page.write_text("# Page\n")
    assert benchmarks.main(["--only", "b"]) == 0
    printed = capsys.readouterr().out
    assert "| row of b |" in printed
    assert "row of a" not in printed
    assert page.read_text() == "# Page\n"
    assert benchmarks.main([]) == 0
    assert all(f"| row of {name} | – | – | – | – | 3 s |" in page.read_text() for name in "ab")


@pytest.mark.parametrize("kind", ["boxes", "labels"])
def test_the_dense_alternative_has_the_same_losses_and_gradients(kind):
    size = step.Size.of(tiny=True)
    ours, naive = (step.make_module(name, size, tiny=True) for name in ("tree", "naive"))
    naive.load_state_dict(ours.state_dict())
    batch = step.make_batch(kind, size, len(ours.tree))
    losses = [torch.stack(list(module.loss_terms(batch).values())) for module in (ours, naive)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.sum().backward()
    torch.testing.assert_close(naive.network.class_weight.grad, ours.network.class_weight.grad)


def test_the_naive_selection_selects_the_same_boxes():
    _, ours, naive = naming.selection(tiny=True)
    for selected, expected in zip(ours(), naive(), strict=True):
        assert selected.tolist() == expected.tolist()


@pytest.mark.parametrize("nodes", [20, 200])
def test_trees_of_the_naming_have_four_levels_and_their_number_of_nodes(nodes):
    tree = WordTree(naming.layered_tree(nodes))
    assert (len(tree), tree.paths.shape[1]) == (nodes, 4)
    (found,) = naming.naming(nodes, tiny=True)()
    assert len(found.labels) > 0
    assert set(found.labels.tolist()) <= set(tree.leaves.tolist())
