"""`fit`, `validate` and `test`: Lightning's CLI over recipes, with our precedence and copies."""

import contextlib
import logging
import shlex
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from yolo_lightning.callbacks import DataReport, RunRecord
from yolo_lightning.callbacks.run_record import RUN_ID_FILE
from yolo_lightning.checkpoints import read_checkpoint
from yolo_lightning.datamodules import CombinedDataModule
from yolo_lightning.errors import InputError
from yolo_lightning.recipe_errors import readable
from yolo_lightning.tracking import RunLogger

_NETWORK = ("trunk", "head_channels", "passthrough_channels", "reorg")

BEST, LAST = "best.ckpt", "last.ckpt"


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
        self.tracked_run: str | None = None
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; where a checkpoint is named, parse again above what it holds.

        Raises:
            InputError: a reference to a value that does not exist, or no checkpoint to be found.
        """
        self.config = _parse(parser, args)
        config = self.config[self.config.subcommand]
        if self.config.subcommand != "fit" and not config.ckpt_path:
            config.ckpt_path = str(_newest_checkpoint(_root(config, RecipeParser.recipes)))
            print(f"checkpoint: {config.ckpt_path}")
        path = config.ckpt_path
        if not path:
            return
        if not Path(path).is_file():
            raise InputError(f"--ckpt_path {path!r}: no such file")
        checkpoint = read_checkpoint(path)
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

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint override the command line."""

    def before_instantiate_classes(self) -> None:
        """Choose the run's own folder; checkpoints go there unless the recipe says where."""
        config = self.config[self.config.subcommand]
        if self.config.subcommand == "fit":
            self.run_folder = _run_folder(_root(config, RecipeParser.recipes), config.ckpt_path)
            config.trainer.default_root_dir = str(self.run_folder)
            checkpoints = str(self.run_folder / "checkpoints")
        else:
            checkpoints = str(Path(config.ckpt_path).parent)
        # one training is one MLflow run: resuming goes on with it, figures of a checkpoint join it
        self.tracked_run = _run_id_beside(checkpoints)
        if self.config.subcommand != "fit" and self.tracked_run is None:
            config.trainer.logger = False
        callbacks = config.trainer.callbacks or []
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            options = callback.get("init_args")
            if callback.class_path.endswith("ModelCheckpoint") and options.get("dirpath") is None:
                options["dirpath"] = checkpoints

    def instantiate_classes(self) -> None:
        """Build everything; what a component says about its values is not wrapped in more words.

        Raises:
            InputError: a component refuses a value.
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            if self.run_folder is not None:
                with contextlib.suppress(OSError):  # it holds a run, or only rank 0 has it
                    self.run_folder.rmdir()
            raise _input_error_behind(error) or error from None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add the callbacks that no recipe has to name."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(DataReport())  # type: ignore[attr-defined]
        if self.run_folder is not None and isinstance(trainer.logger, RunLogger):
            trainer.logger.suggest_name("/".join(self.run_folder.parts[-2:]))
        if self.tracked_run is not None and isinstance(trainer.logger, RunLogger):
            found = trainer.logger.resume(self.tracked_run)
            if not found and self.config.subcommand != "fit":
                trainer.logger = None
        if self.run_folder is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            written = {
                f"recipe{'' if k == 0 else f'-{k + 1}'}.yaml": Path(file).read_text(
                    encoding="utf-8"
                )
                for k, file in enumerate(RecipeParser.recipes)
            }
            written["command.txt"] = shlex.join(["yolo-lightning", *self.command_line]) + "\n"
            record = RunRecord(self.run_folder, written, self._resolved())
            trainer.callbacks.insert(0, record)  # type: ignore[attr-defined]
        # Lightning wants checkpoint callbacks last
        trainer.callbacks.sort(key=lambda c: isinstance(c, Checkpoint))  # type: ignore[attr-defined]
        return trainer

    def _resolved(self) -> dict[str, Any]:
        parser = self._parser(self.config.subcommand)
        config: Namespace = self.config[self.config.subcommand].clone()
        config.pop("config", None)
        return dict(yaml.safe_load(parser.dump(config, skip_none=False, skip_validation=True)))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def after_validate(self) -> None:
        """Print the figures of each class."""
        if self.trainer.is_global_zero and hasattr(self.model, "table"):
            print(f"\n{self.model.table()}")

    def after_test(self) -> None:
        """Print the figures of each class."""
        self.after_validate()

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
        if trainer.is_global_zero:
            print(f"run folder: {self.run_folder}")


class DataCLI(RecipeCLI):
    """Builds the data of a recipe and nothing else: no network, no trainer, no folder.

    Args:
        args: a recipe's path, and options that override its values.

    Attributes:
        datamodule: not set up yet.
        recipe: the values.

    Raises:
        InputError: whatever is wrong with the recipe.
    """

    datamodule: CombinedDataModule

    def __init__(self, args: Sequence[str]) -> None:
        quiet()
        super().__init__(["fit", "--config", *args])
        self.recipe: Namespace = self.config[self.config.subcommand]

    def before_instantiate_classes(self) -> None:
        """Choose no folder."""

    def _set_seed(self) -> None:
        """Leave the process's random numbers alone: data has its own seed."""

    def instantiate_classes(self) -> None:
        """Build the datamodule."""
        config = self.config[self.config.subcommand]
        try:
            built = self._parser("fit").instantiate_classes(Namespace(data=config.data))
        except Exception as error:
            raise _input_error_behind(error) or error from None
        if not isinstance(built.data, CombinedDataModule):
            raise InputError(f"data is {config.data.class_path}; needed: CombinedDataModule")
        self.datamodule = built.data

    def _run_subcommand(self, subcommand: str) -> None:
        """Train nothing."""


def recipe_data(args: Sequence[str]) -> CombinedDataModule:
    """Return the datamodule of a recipe, not set up yet; see `DataCLI`."""
    return DataCLI(args).datamodule


def _input_error_behind(error: BaseException | None) -> InputError | None:
    """Return the message of ours that the parser has wrapped."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


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
    files = []
    for k, arg in enumerate(args):
        if arg in ("--config", "-c") and k + 1 < len(args):
            files.append(args[k + 1])
        elif arg.startswith("--config="):
            files.append(arg.removeprefix("--config="))
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

    Where the recipe names another trunk, the checkpoint says nothing about the network: the head
    of one on the trunk of another is neither.
    """
    name = checkpoint.get("module", "DetectorModule")
    values = dict(checkpoint["hyper_parameters"])
    named = any(arg.startswith(("--model.trunk", "--model.init_args.trunk")) for arg in args)
    for recipe in RecipeParser.recipes:
        model = (yaml.safe_load(Path(recipe).read_text(encoding="utf-8")) or {}).get("model") or {}
        named |= "trunk" in (model.get("init_args") or {})
    if named and config.model.init_args.get("trunk") != values.get("trunk"):
        values = {key: value for key, value in values.items() if key not in _NETWORK}
    return {"class_path": f"yolo_lightning.{name}", "init_args": values}


def _root(config: Namespace, recipes: Sequence[str]) -> Path:
    """Return the folder that holds the runs of a recipe."""
    name = Path(recipes[-1]).stem if recipes else "run"
    return Path(config.trainer.default_root_dir or f"outputs/{name}")


def _run_folder(root: Path, ckpt_path: str | None) -> Path:
    """Return the folder of the run that is resumed, else a fresh one."""
    if ckpt_path and (Path(ckpt_path).parent.parent / "resolved.yaml").is_file():
        return Path(ckpt_path).parent.parent
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        folder = root / (stamp if number == 1 else f"{stamp}-{number}")
        if _rank() != 0:
            return folder  # only rank 0's is used
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def _run_id_beside(checkpoints: str) -> str | None:
    file = Path(checkpoints).parent / RUN_ID_FILE
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _newest_checkpoint(root: Path) -> Path:
    """Return the best checkpoint of the newest run.

    Raises:
        InputError: no run holds one.
    """
    for name in (BEST, LAST):
        found = sorted(root.glob(f"*/checkpoints/{name}"), key=lambda p: p.stat().st_mtime)
        if found:
            return found[-1]
    deeper = sorted(str(path) for path in root.rglob(f"checkpoints/{LAST}"))
    hint = f"name one: {', '.join(deeper[-4:])}" if deeper else "train first"
    raise InputError(
        f"no --ckpt_path given, and no run under {str(root)!r} holds checkpoints/{BEST}; {hint}"
    )


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def quiet() -> None:
    """Silence what libraries say about themselves."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*skip_none parameter was deprecated.*")
    warnings.filterwarnings("ignore", message=".*instantiate_classes.* was deprecated.*")
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need.*")
    for name in ("mlflow", "alembic", "alembic.runtime.migration", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
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
