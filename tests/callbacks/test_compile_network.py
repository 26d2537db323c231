"""Compilation: once for each shape, in DDP too, and never silently left out."""

import json
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
import torch._dynamo.config as settings

from tests.callbacks.test_first_step import Recorder, fit
from tests.helpers.processes import ENVIRONMENT
from yolo_lightning.callbacks import CompileNetwork, MultiScale
from yolo_lightning.errors import InputError

SIZES = [32, 64, 96]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    before = settings.get_config_copy()
    yield
    assert settings.get_config_copy() == before, "the settings are restored"


@pytest.mark.slow
@pytest.mark.parametrize(("dynamic", "most"), [(False, 6), (True, 3)])
def test_losses_are_those_without_and_graphs_are_few(tmp_path, dynamic, most):
    """Two kinds of batches, of 4 and 2 images, and three sizes."""
    plain, compiled = Recorder(), Recorder()
    fit(tmp_path, [MultiScale(SIZES, 1), plain], steps=12)
    compile_network = CompileNetwork("aot_eager", dynamic=dynamic)
    model, trainer = fit(tmp_path, [MultiScale(SIZES, 1), compiled, compile_network], steps=12)
    assert set(compiled.sizes) == set(SIZES)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert 1 <= trainer.callback_metrics["train/compiled_graphs"] <= most
    assert not [name for name in model.state_dict() if "_orig_mod" in name]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.network.body(torch.zeros(1, 3, 128, 128))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "not compiled now"


@pytest.mark.slow
def test_more_shapes_than_sizes_are_an_error(tmp_path):
    class Growing(MultiScale):
        def _size_at(self, step, *_):
            return 32 + 32 * step

    with pytest.raises(InputError, match="CompileNetwork: more than 6 graphs; allowed: two"):
        fit(tmp_path, [Growing([32]), CompileNetwork("aot_eager")])


def test_what_cannot_be_compiled_is_an_error(tmp_path):
    class Printing(torch.nn.Identity):
        def forward(self, features):
            print("the mean cannot be read while compiling", features.mean().item())
            return features

    class AddLayer(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.network.body.append(Printing())

    with pytest.raises(InputError, match="CompileNetwork: torch.compile .* failed"):
        fit(tmp_path, [AddLayer(), CompileNetwork("eager")])


def test_disabled_compilation_is_an_error(tmp_path, monkeypatch):
    with settings.patch(disable=True), pytest.raises(InputError, match="TORCH_COMPILE_DISABLE"):
        fit(tmp_path, [CompileNetwork("eager")])
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(InputError, match="TORCHDYNAMO_DISABLE"):
        fit(tmp_path, [CompileNetwork("eager")])


def test_a_network_that_runs_uncompiled_is_an_error(tmp_path):
    with torch.compiler.set_stance("force_eager"), pytest.raises(InputError, match="nothing"):
        fit(tmp_path, [CompileNetwork("eager")])


@pytest.mark.slow
def test_later_trainings_of_a_process_have_graphs_of_their_own(tmp_path):
    for batch_size in (4, 6, 8):
        callbacks = [MultiScale(SIZES, 1), CompileNetwork("eager")]
        _, trainer = fit(tmp_path, callbacks, steps=12, detection_batch_size=batch_size)
        # those of the two images with labels are used again
        assert 1 <= trainer.callback_metrics["train/compiled_graphs"] <= 6


def test_unknown_backend_is_rejected():
    with pytest.raises(InputError, match="backend is 'inductr'; allowed: .*inductor"):
        CompileNetwork(backend="inductr")


WORKER = """
import json, sys
import lightning.pytorch as pl
from tests.callbacks.test_first_step import Recorder, make_module_and_data
from yolo_lightning.callbacks import CompileNetwork, MultiScale

found = []
for compiled in (False, True):
    model, data = make_module_and_data()
    recorder = Recorder()
    callbacks = [MultiScale([32, 64], 1), recorder]
    trainer = pl.Trainer(
        max_steps=8, accelerator="cpu", devices=2, strategy="ddp", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=sys.argv[1], use_distributed_sampler=False,
        callbacks=callbacks + [CompileNetwork("aot_eager")] * compiled)
    trainer.fit(model, data)
    weights = float(sum(p.double().abs().sum() for p in model.parameters()))
    graphs = float(trainer.callback_metrics.get("train/compiled_graphs", 0))
    found.append([recorder.losses, weights, graphs])
with open(f"{sys.argv[1]}/rank{trainer.global_rank}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_two_ranks_train_compiled_as_they_train_without(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{k}.json").read_text()) for k in (0, 1)]
    for (losses, weights, _), (compiled, compiled_weights, graphs) in ranks:
        assert compiled == pytest.approx(losses, rel=1e-4)
        assert compiled_weights == pytest.approx(weights, rel=1e-5)
        assert graphs >= 1
    assert ranks[0][1][1] == ranks[1][1][1]
