"""`fit`, `validate` and `test`: Lightning's CLI over recipes, with our precedence and copies."""

import logging
import os
import shlex
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from yolo_lightning.callbacks import (
    BatchDigests,
    DataReport,
    FiniteGuard,
    LastCheckpoint,
    PredictionGrid,
    Preemption,
    RunRecord,
    Throughput,
    ValidationReport,
)
from yolo_lightning.checkpoints.validation import read_checkpoint, sound_checkpoint
from yolo_lightning.cli import runs
from yolo_lightning.cli.launch import recipes_named
from yolo_lightning.cli.recipe_errors import input_error_behind, readable
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.detection import DetectionEvaluation
from yolo_lightning.evaluation.error_analysis import check_level
from yolo_lightning.evaluation.report import (
    ReportData,
    ReportOptions,
    check_options,
    image_reader,
    images_read,
    write_report,
)
from yolo_lightning.tracking.logger import run_loggers
from yolo_lightning.tree.seen_classes import seen_nodes

_RESUME_HELP = (
    "`auto`: go on with this job's run where it has a checkpoint, else begin; a job is one of "
    "SLURM's or torchrun's, elsewhere it is the newest run of the recipe"
)
_NETWORK = ("backbone", "head_channels", "passthrough_channels", "reorg")


class _Complaint(Exception):
    """The parser's own words, nested one level for each type that it tried."""


class RecipeParser(LightningArgumentParser):
    """A parser that raises its message instead of printing its usage and leaving."""

    recipes: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raise the message; parsers call each other, so it is made readable outside."""
        raise _Complaint(message) from None


class RecipeCLI(LightningCLI):
    """Lightning's CLI with values from the command line, then the recipe, then the checkpoint.

    Args:
        args: the command line, subcommand first.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.command_line = list(args)
        self.run_folder: Path | None = None
        self.job_folder: Path | None = None
        self.values = Namespace()
        self.held_run: str | None = None
        self.held_step = 0
        RecipeParser.recipes = _config_files(args)
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False},
            # relative references are resolved after the command line's values are in
            parser_kwargs={"parser_mode": "omegaconf+"},
            parser_class=RecipeParser,
            args=list(args),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Leave out the options that would load arbitrary objects from a checkpoint."""
        skipped = {"weights_only"}
        return {
            name: options | skipped
            for name, options in LightningCLI.subcommands().items()
            if name != "predict"
        }

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--resume", type=Literal["auto"] | None, help=_RESUME_HELP)
        else:
            parser.add_class_arguments(ReportOptions, "report")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; where a checkpoint is named, parse again above what it holds.

        Raises:
            InputError: a reference to a value that does not exist, or no checkpoint to be found.
        """
        check_options(args)
        self.config = _parse(parser, args)
        config = self.config[self.config.subcommand]
        if self.config.subcommand != "fit" and not config.ckpt_path:
            config.ckpt_path = str(
                runs.newest_checkpoint(runs.root_of(config, RecipeParser.recipes))
            )
            print(f"checkpoint: {config.ckpt_path}")
        path = config.ckpt_path
        if self.config.subcommand == "fit":
            path = self._resumed_from(config)
        if not path:
            return
        checkpoint = read_checkpoint(path)
        self.held_run, self.held_step = checkpoint.get("mlflow_run_id"), checkpoint["global_step"]
        with tempfile.TemporaryDirectory() as folder:
            held = Path(folder) / "checkpoint.yaml"
            model = _model_of(checkpoint, config, args)
            held.write_text(yaml.safe_dump({"model": model}))
            below = [args[0], "--config", str(held), *args[1:]]
            self.config = _parse(parser, below)
        config = self.config[self.config.subcommand]
        config.ckpt_path = path
        if self.config.subcommand == "fit" and "optimizer_states" not in checkpoint:
            rank_zero_only(print)(f"{path}: holds weights alone; training begins with them")
            config.model.init_args.pretrained, config.ckpt_path = path, None

    def _resumed_from(self, config: Namespace) -> str | None:
        """Return the checkpoint to go on from, the one before it where that is damaged.

        Raises:
            InputError: none of both is sound.
        """
        if config.resume != "auto":
            return str(sound_checkpoint(config.ckpt_path)) if config.ckpt_path else None
        root = runs.root_of(config, RecipeParser.recipes)
        job = runs.job_of(os.environ)
        self.job_folder = None if job is None else root / job
        found = runs.newest_state(root if self.job_folder is None else self.job_folder)
        if found is None and config.ckpt_path:  # the first start of a job that goes on from it
            found = sound_checkpoint(config.ckpt_path)
        rank_zero_only(print)(f"resuming: {found}" if found else "nothing to resume: beginning")
        return None if found is None else str(found)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint override the command line."""

    def before_instantiate_classes(self) -> None:
        """Choose the run's own folder; checkpoints go there unless the recipe says where."""
        config = self.config[self.config.subcommand]
        self.values = config.clone()
        if self.config.subcommand == "fit":
            root = runs.root_of(config, RecipeParser.recipes)
            self.run_folder = runs.run_folder(root, config.ckpt_path, self.job_folder)
            runs.hold(self.run_folder)
            config.trainer.default_root_dir = str(self.run_folder)
            checkpoints = str(self.run_folder / "checkpoints")
        else:
            checkpoints = str(Path(config.ckpt_path).parent)
        if self.config.subcommand != "fit" and not (self._tracked or self.held_run):
            config.trainer.logger = False
        callbacks = config.trainer.callbacks or []
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            options = callback.get("init_args")
            if callback.class_path.endswith("ModelCheckpoint") and options.get("dirpath") is None:
                options["dirpath"] = checkpoints

    @property
    def _tracked(self) -> Path | None:
        """The folder of the MLflow run that a measured checkpoint belongs to."""
        return runs.tracked(self.config[self.config.subcommand].ckpt_path)

    def instantiate_classes(self) -> None:
        """Build everything; what a component says about its values is not wrapped in more words.

        Raises:
            InputError: a component refuses a value.
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            if self.run_folder is not None:
                runs.leave(self.run_folder)
            raise input_error_behind(error) or error from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add the callbacks that no recipe has to name."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks += self._own_callbacks(trainer)  # type: ignore[attr-defined]
        # one training is one MLflow run: resuming goes on with it, figures of a checkpoint join it
        folder = self.run_folder or self._tracked or self._untracked
        for logger in run_loggers(trainer):
            name = "/".join(folder.parts[-2:])
            logger.place(folder, name, self.held_run, self._measured_step)
        if self.run_folder is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            written = {
                f"recipe{'' if k == 0 else f'-{k + 1}'}.yaml": Path(file).read_text(
                    encoding="utf-8"
                )
                for k, file in enumerate(RecipeParser.recipes)
            }
            written["command.txt"] = shlex.join(["yolo-lightning", *self.command_line]) + "\n"
            recipe = Path(RecipeParser.recipes[-1]).stem if RecipeParser.recipes else "run"
            record = RunRecord(self.run_folder, written, self._resolved(), recipe)
            trainer.callbacks.insert(0, record)  # type: ignore[attr-defined]
        # Lightning wants checkpoint callbacks last
        trainer.callbacks.sort(key=lambda c: isinstance(c, Checkpoint))  # type: ignore[attr-defined]
        return trainer

    @property
    def _measured_step(self) -> int | None:
        """The step that figures of a checkpoint belong to, as training numbers them."""
        return None if self.run_folder is not None else max(self.held_step - 1, 0)

    @property
    def _untracked(self) -> Path:
        """Where the journal lies of figures whose checkpoint lies apart from its run."""
        config = self.config[self.config.subcommand]
        return runs.root_of(config, RecipeParser.recipes) / "measured" / str(self.held_run)

    def _own_callbacks(self, trainer: pl.Trainer) -> list[pl.Callback]:
        """Return what every run needs, where the recipe does not say it otherwise."""
        if self.config.subcommand != "fit":
            return [DataReport()]
        kinds: list[type[pl.Callback]] = [
            DataReport,
            FiniteGuard,
            BatchDigests,
            Throughput,
            PredictionGrid,
            ValidationReport,
            LastCheckpoint,
            Preemption,
        ]
        named = {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]
        return [kind() for kind in kinds if kind not in named]

    def _resolved(self) -> dict[str, Any]:
        parser = self._parser(self.config.subcommand)
        # as asked for, without this run's own folder: it serves as a recipe of the next one
        config: Namespace = self.values.clone()
        config.pop("config", None)
        config.pop("resume", None)
        return dict(yaml.safe_load(parser.dump(config, skip_none=False, skip_validation=True)))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    @property
    def _report_options(self) -> ReportOptions:
        options: ReportOptions = self.config_init[self.subcommand].report
        return options

    @property
    def _boxes(self) -> DetectionEvaluation | None:
        """What a detector's figures come from; None where the model is no detector."""
        evaluation = getattr(self.model, "evaluation", None)
        return evaluation if isinstance(evaluation, DetectionEvaluation) else None

    def before_validate(self) -> None:
        """Look at the options of the report before anything is measured.

        Raises:
            InputError: they do not fit the model.
        """
        options, evaluation = self._report_options, self._boxes
        if evaluation is None:
            if options != ReportOptions():
                raise InputError("report: its options are for detectors, and this is none")
            return
        check_level(evaluation.tree, options.level)
        if options.seen is not None:
            evaluation.seen = seen_nodes(evaluation.tree, options.seen)

    before_test = before_validate

    def after_validate(self) -> None:
        """Print the figures of each class, and write a report where they are a detector's."""
        trainer = self.trainer
        if trainer.is_global_zero and hasattr(self.model, "table"):
            print(f"\n{self.model.table()}")
            if self._boxes is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._report(self._boxes)
        for logger in run_loggers(trainer):
            logger.close()

    after_test = after_validate

    def _report(self, evaluation: DetectionEvaluation) -> None:
        """Write the report, say where it is, and put it into the MLflow run."""
        data, options = self.datamodule, self._report_options
        source = data.test if self.subcommand == "test" else data.validation
        found = ReportData.of(evaluation, self._about(len(source)))
        folder = Path(options.folder) if options.folder else self._fresh_report_folder()
        said = write_report(folder, found, image_reader(source), source.image_name, options)
        print("\n".join(["", *said, f"report: {folder}"]))
        for logger in run_loggers(self.trainer):
            logger.log_folder(folder, folder.name)

    def _fresh_report_folder(self) -> Path:
        """Make a folder in that of the checkpoint's run, else where the recipe's runs are."""
        config = self.config[self.subcommand]
        root = runs.folder_of(config.ckpt_path) or runs.root_of(config, RecipeParser.recipes)
        return runs.numbered_folder(root, str(self.subcommand))

    def _about(self, images: int) -> dict[str, Any]:
        """Return where the figures come from, of a source with so many images."""
        trainer, testing = self.trainer, self.subcommand == "test"
        batches = trainer.num_test_batches if testing else trainer.num_val_batches
        return {
            "command": self.subcommand,
            "recipe": Path(RecipeParser.recipes[-1]).name if RecipeParser.recipes else None,
            "checkpoint": self.config[self.subcommand].ckpt_path,
            "image_size": self.datamodule.image_size,
            "images": images_read(batches, self.datamodule, trainer.world_size, images),
            "seen": self._report_options.seen,
        }

    def after_fit(self) -> None:
        """Assert that training went as far as the recipe says.

        Raises:
            RuntimeError: it ended early without a reason.
        """
        trainer = self.trainer
        limits = []
        if trainer.max_steps > 0:
            limits.append(trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            batches = trainer.max_epochs * int(trainer.num_training_batches)
            limits.append(-(-batches // trainer.accumulate_grad_batches))
        finished = not limits or trainer.global_step >= min(limits)
        if not finished and not trainer.should_stop and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise RuntimeError(
                f"training ended at step {trainer.global_step} of {min(limits)} without a reason"
            )
        if trainer.fast_dev_run and self.run_folder is not None:  # type: ignore[attr-defined]
            runs.leave(self.run_folder)
        elif trainer.is_global_zero:
            print(f"run folder: {self.run_folder}")


def _parse(parser: LightningArgumentParser, args: Sequence[str]) -> Namespace:
    """Parse a command line; what is wrong with it is told in one message with the recipe's name."""
    where = "".join(f"{recipe}: " for recipe in RecipeParser.recipes)
    try:
        return parser.parse_args(list(args))
    except OmegaConfBaseException as error:
        raise InputError(f"{where}{error.full_key}: {str(error).splitlines()[0]}") from None
    except _Complaint as error:
        raise InputError(where + readable(str(error), RecipeParser.recipes)) from None


def _config_files(args: Sequence[str]) -> list[str]:
    """Return the recipes that a command line names, refusing those that are missing."""
    files = recipes_named(args)
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"recipe {file!r} not found (working folder: {Path.cwd()})")
        try:
            empty = not Path(file).read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"recipe {file!r} is not UTF-8 text ({error})") from None
        if empty:
            raise InputError(f"recipe {file!r} is empty")
    return files


def _model_of(checkpoint: dict[str, Any], config: Namespace, args: Sequence[str]) -> dict[str, Any]:
    """Return the model that a checkpoint describes, as a recipe would.

    Where the recipe names another backbone, the checkpoint says nothing about the network: the head
    of one on the backbone of another is neither.
    """
    name = checkpoint.get("module", "DetectorModule")
    values = dict(checkpoint["hyper_parameters"])
    named = any(arg.startswith(("--model.backbone", "--model.init_args.backbone")) for arg in args)
    for recipe in RecipeParser.recipes:
        model = (yaml.safe_load(Path(recipe).read_text(encoding="utf-8")) or {}).get("model") or {}
        named |= "backbone" in (model.get("init_args") or {})
    if named and config.model.init_args.get("backbone") != values.get("backbone"):
        values = {key: value for key, value in values.items() if key not in _NETWORK}
    return {"class_path": f"yolo_lightning.{name}", "init_args": values}


def quiet() -> None:
    """Silence what libraries say about themselves."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*skip_none parameter was deprecated.*")
    warnings.filterwarnings("ignore", message=".*instantiate_classes.* was deprecated.*")
    warnings.filterwarnings("ignore", message=".*compute.. method of metric .* was called before")
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need.*")
    for name in (
        "mlflow",
        "alembic",
        "alembic.runtime.migration",
        "mlflow.store.db.utils",
        "urllib3",
    ):
        logging.getLogger(name).setLevel(logging.ERROR if name == "urllib3" else logging.WARNING)
    tip = logging.Filter()
    tip.filter = lambda record: "💡 Tip" not in record.getMessage()  # type: ignore[method-assign]
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(tip)


def main(args: Sequence[str]) -> RecipeCLI:
    """Run `fit`, `validate` or `test`.

    Raises:
        InputError: bad input, or options of the trainer that do not go together.
    """
    quiet()
    try:
        return RecipeCLI(args)
    except MisconfigurationException as error:
        raise InputError(str(error)) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise InputError(
            f"a loader process died ({str(error).splitlines()[0]}); memory that ran out is the "
            "usual reason: fewer data.num_workers, or more memory, /dev/shm included"
        ) from None
