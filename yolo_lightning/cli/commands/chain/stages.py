"""The stages of a chain of trainings: how far each is, and whether it fits the one before."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from yolo_lightning.checkpoints.io import verify
from yolo_lightning.checkpoints.validation import first_difference, read_checkpoint
from yolo_lightning.cli import runs
from yolo_lightning.cli.data import DataCLI
from yolo_lightning.cli.recipe_errors import find_input_error
from yolo_lightning.errors import (
    InputError,
    compose_yaml,
    expand,
    mask_secrets,
    read_text,
    require_file,
)
from yolo_lightning.models.backbones import backbone_layers
from yolo_lightning.models.layers import layers_to_rows
from yolo_lightning.tracking.names import flatten_params
from yolo_lightning.tree.wordtree import WordTree

# what a finished stage may not change of its trainer and of its callbacks
_TRAINER_KEYS = (
    "max_steps", "max_epochs", "max_time", "accumulate_grad_batches", "gradient_clip_val",
    "gradient_clip_algorithm", "sync_batchnorm",
)  # fmt: skip
_PARTS = ("model", "data")
_CALLBACKS = ("MultiScale", "ModelCheckpoint", "WeightAveraging")


class StageCLI(DataCLI):
    """Parse the recipe of a stage; nothing is built before `check_model_and_data`."""

    def before_instantiate_classes(self) -> None:
        """Keep the values as a run would."""
        self.requested_config = self.config[self.config.subcommand].clone()

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def check_model_and_data(self) -> None:
        """Build the model and the data, and find the classes of all labels.

        Raises:
            InputError: a wrong value, an unknown label, or two trees that differ.
        """
        super().instantiate_classes()
        try:
            parser = self._parser(self.config.subcommand)
            model = parser.instantiate_classes(Namespace(model=self.recipe.model)).model
        except Exception as error:
            raise find_input_error(error) or error from None
        data_rows, rows = self.datamodule.tree.rows, model.tree.rows
        if data_rows != rows:
            difference = first_difference(data_rows, rows, "the data", "the model")
            raise InputError(f"data.tree differs from model.tree: {difference}")
        self.datamodule.setup("fit")


@dataclass
class Stage:
    """One training of a chain, and how far it is."""

    recipe: str
    root: Path  # folder of its runs
    cli: StageCLI
    run: Path | None = None  # the finished or interrupted run
    finished_step: int | None = None
    checkpoint: Path | None = None  # the best one if finished, else that to resume from

    @property
    def model(self) -> Any:
        """The arguments of the model."""
        return self.cli.recipe.model.init_args


def plan(folder: Path, recipes: Sequence[str], options: Sequence[str]) -> list[Stage]:
    """Return the checked stages of a chain.

    Args:
        folder: of the chain, with a folder for each stage.
        recipes: in the order of training.
        options: of `fit`, for all stages.

    Raises:
        InputError: bad input of a stage, or stages that do not fit each other.
    """
    stages = []
    for number, recipe in enumerate(recipes, 1):
        root = folder / f"{number}-{Path(recipe).stem}"
        stages.append(Stage(recipe, root, StageCLI([recipe, *options])))
    for stage in stages:
        _find_run(stage)
    for first, second in pairwise(stages):
        _check_backbones(first, second)
    for before, stage in zip([None, *stages], stages, strict=False):
        try:
            _check_stage(before, stage)
        except InputError as error:
            raise InputError(f"stage {stage.root.name}: {error}") from None
    return stages


def _again(stage: Stage) -> str:
    return f"move {stage.root} away to train it again"


def _find_run(stage: Stage) -> None:
    """Set the finished run of a stage, or the interrupted one and its checkpoint."""
    markers = sorted(stage.root.glob(f"*/{runs.FINISHED}"), key=lambda path: path.stat().st_mtime)
    if markers:
        stage.run = markers[-1].parent
        values: dict[str, Any] = {}
        with contextlib.suppress(InputError):
            values = _read_values(markers[-1])
        step, checkpoint = values.get("step"), str(values.get("checkpoint"))
        if type(step) is not int or not re.fullmatch(r"checkpoints/[\w.=-]+\.ckpt", checkpoint):
            raise InputError(
                f"{markers[-1]}: expected the keys step and checkpoint; remove it, and the stage "
                "resumes at its last checkpoint"
            )
        stage.finished_step, stage.checkpoint = step, stage.run / checkpoint
        return
    stage.checkpoint = runs.find_resume_checkpoint(stage.root)
    if stage.checkpoint is not None:
        stage.run = stage.checkpoint.parent.parent


def _check_backbones(before: Stage, after: Stage) -> None:
    """Raise `InputError` if the weights of a stage's backbone do not fit the next one's."""
    first, second = (_backbone_rows(stage) for stage in (before, after))
    if first != second:
        names = before.root.name, after.root.name
        raise InputError(
            f"model.backbone of {names[0]} and of {names[1]} differ, so nothing can be handed on: "
            f"{first_difference(first, second, *names)}"
        )


def _backbone_rows(stage: Stage) -> list[Any]:
    backbone = stage.model.backbone
    if isinstance(backbone, Namespace):  # a class of the user's
        return [backbone.as_dict()]
    return list(layers_to_rows(backbone_layers(backbone)))


def _check_stage(before: Stage | None, stage: Stage) -> None:
    """Raise `InputError` if a stage cannot go on, or was changed after it finished."""
    if stage.run is not None and before is not None:
        _check_origin(before, stage)
    if stage.finished_step is not None:
        _check_unchanged(stage)
        return
    start = stage.model.pretrained if before is None else None
    if before is not None and before.finished_step is not None and before.checkpoint is not None:
        what = f"the best checkpoint of {before.root.name}"
        require_file(before.checkpoint, what, _again(before))
        verify(before.checkpoint)
    elif start is not None and stage.run is None:
        require_file(runs.find_pretrained(start), "model.pretrained", "null: random weights")
    stage.cli.check_model_and_data()


def _check_origin(before: Stage, stage: Stage) -> None:
    """Raise `InputError` unless a run started from the stage before as it is now."""
    if before.finished_step is None or before.checkpoint is None:
        raise InputError(
            f"has a run, but {before.root.name}, which it starts from, is not finished: "
            f"{_again(stage)}"
        )
    started_from = str(_record(stage)["model"]["init_args"].get("pretrained"))
    # the folder of all runs may have moved
    if Path(started_from).parts[-3:] != before.checkpoint.parts[-3:]:
        raise InputError(
            f"was started from {started_from}, but the best checkpoint of {before.root.name} is "
            f"{before.checkpoint}: {_again(stage)}"
        )


def _record(stage: Stage) -> dict[str, Any]:
    """Return the recipe as the last process of a run resolved it."""
    assert stage.run is not None
    files = [*stage.run.glob("resolved.yaml"), *stage.run.glob("resumed-*-resolved.yaml")]
    if not files:
        raise InputError(f"{stage.run} has no resolved.yaml, so it is no run: {_again(stage)}")
    newest = max(files, key=lambda path: path.stat().st_mtime)
    values = _read_values(newest)
    if not all(isinstance((values.get(key) or {}).get("class_path"), str) for key in _PARTS):
        raise InputError(f"{newest}: no recipe with a model and data; {_again(stage)}")
    return values


def _read_values(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file of a run; {} if it holds none."""
    text = read_text(file, "run")
    compose_yaml(text, file)  # within bounds
    try:
        values = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{file}: not YAML ({' '.join(str(error).split())[:100]})") from None
    return values if isinstance(values, dict) else {}


def _check_unchanged(stage: Stage) -> None:
    """Raise `InputError` with the first value that differs from those of the finished run."""
    text = mask_secrets(yaml.safe_dump(stage.cli.resolved_config(), sort_keys=False))
    now, then = (_flat(_kept(values)) for values in (yaml.safe_load(text), _record(stage)))
    changed = [key for key in {**now, **then} if now.get(key) != then.get(key)]
    if changed:
        key = changed[0]
        raise InputError(
            f"{key} is {now.get(key)}, but was {then.get(key)} when the stage was trained; change "
            f"it back, or {_again(stage)}"
        )
    tree, saved = stage.model.tree, stage.run / "tree.tsv" if stage.run else Path()
    if saved.is_file() and (not isinstance(tree, str) or expand(tree).is_file()):
        rows, saved_rows = (WordTree.from_source(source).rows for source in (tree, str(saved)))
        if rows != saved_rows:
            difference = first_difference(rows, saved_rows, "the tree now", "that of the run")
            raise InputError(f"model.tree was changed after the stage was trained: {difference}")


def _kept(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a recipe that decide what is learnt."""
    trainer = values.get("trainer") or {}
    model, data = (dict(values[name].get("init_args") or {}) for name in ("model", "data"))
    for name in ("num_workers", "tree"):  # the rows of trees are compared instead
        data.pop(name, None)
    # preparation is that of the data, and a resumed run has it from its checkpoint
    model = {k: v for k, v in model.items() if k not in ("pretrained", "tree", *data)}
    callbacks = trainer.get("callbacks") or []
    return {
        "seed_everything": values.get("seed_everything"),
        "model": {"class_path": values["model"]["class_path"], **model},
        "data": {"class_path": values["data"]["class_path"], **data},
        "trainer": {name: trainer.get(name) for name in _TRAINER_KEYS},
        "callbacks": [c for c in callbacks if c["class_path"].endswith(_CALLBACKS)],
    }


def _flat(values: dict[str, Any]) -> dict[str, str]:
    """Return all values by dotted key; of a path, its last part."""
    flat = flatten_params(values)
    return {key: Path(value).name if "/" in value else value for key, value in flat.items()}


def describe(stages: Sequence[Stage]) -> Iterator[str]:
    """Yield one line for each stage: finished, resumes or starts, and from which checkpoint."""
    for before, stage in zip([None, *stages], stages, strict=False):
        name = f"  {stage.root.name:<{max(len(one.root.name) for one in stages)}}  "
        if stage.finished_step is not None:
            yield f"{name}finished at step {stage.finished_step}: {stage.checkpoint}"
        elif stage.checkpoint is not None:
            step = read_checkpoint(stage.checkpoint)["global_step"]
            yield f"{name}resumes at step {step}: {stage.checkpoint}"
        elif before is not None:
            best = before.checkpoint if before.finished_step is not None else None
            yield f"{name}starts from {best or f'the best checkpoint of {before.root.name}'}"
        else:
            yield f"{name}starts from {stage.model.pretrained or 'random weights'}"


def arguments(before: Stage | None, stage: Stage, name: str) -> list[str]:
    """Return the recipe of a stage and its options of `fit`."""
    options = [stage.recipe, f"--trainer.default_root_dir={stage.root}"]
    if before is not None:
        # its best checkpoint is not known while a job waits for another one
        known = before.checkpoint if before.finished_step is not None else None
        options.append(f"--model.pretrained={known or before.root}")
    if stage.checkpoint is not None:  # for a new job; its own checkpoints go first
        options.append(f"--ckpt_path={stage.checkpoint}")
    logger = stage.cli.recipe.trainer.logger
    if isinstance(logger, Namespace) and logger.get("class_path", "").endswith("RunLogger"):
        options.append(f"--trainer.logger.tags.chain={name}")
    return options
