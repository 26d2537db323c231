"""The check for machines with a GPU, as far as it runs without one."""

import json
from typing import Any

import pytest
import torch

from tests.benchmarks import gpu_check
from tests.benchmarks.gpu_sections import NEEDS_GPU, SECTIONS, Place, check_near

CPU = Place("cpu", tiny=True)


@pytest.mark.end_to_end
def test_all_sections_run_on_a_cpu_and_are_written_to_a_page(tmp_path, capsys):
    output, page = tmp_path / "found.json", tmp_path / "page.md"
    assert gpu_check.main(["--device", "cpu", "--tiny", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert [section["name"] for section in found["sections"]] == list(SECTIONS)
    assert all(section["rows"] for section in found["sections"])
    assert NEEDS_GPU in str(dict(found["sections"][4]["rows"]))  # the waits
    page.write_text("# Page\n")
    assert gpu_check.main(["--write", str(output), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("# Page\n")
    assert text.count("gradient of the loss, 32-true") == 1
    assert text.count("\n| ") == 2 + sum(len(section["rows"]) for section in found["sections"])
    assert gpu_check.render(found) in capsys.readouterr().out.replace("\r", "")


def test_a_failing_section_is_reported_and_the_others_go_on(capsys):
    def fail(place: Place) -> Any:
        raise RuntimeError("CUDA error | first line\nsecond line")

    found = gpu_check.run({"one": fail, "two": lambda place: [("what", "value")]}, CPU)
    first, second = found["sections"]
    assert first["error"] == "failed: RuntimeError: CUDA error | first line"
    assert (second["rows"], second["error"]) == ([("what", "value")], "")
    assert "| one | – | failed: RuntimeError: CUDA error / first line |" in gpu_check.render(found)


def test_sections_are_skipped_after_the_budget(capsys):
    found = gpu_check.run({"one": lambda place: [("what", "value")]}, CPU, budget_s=-1)
    assert found["sections"][0]["error"].startswith("skipped")
    assert not found["sections"][0]["rows"]


@pytest.mark.parametrize(
    ("found", "message"), [([0.0, 1.2], "0.2 of the range"), ([0.0, torch.nan], "not finite")]
)
def test_values_far_off_or_not_finite_are_refused(found, message):
    expected = torch.tensor([0.0, 1.0])
    assert check_near("x", expected + 0.01, expected, 0.1) == "1.0e-02 of the range"
    with pytest.raises(AssertionError, match=message):
        check_near("x", torch.tensor(found), expected, 0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_runs(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "--device cpu --tiny" in capsys.readouterr().err
