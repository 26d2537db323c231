"""The commands `fit`, `validate` and `test`, based on LightningCLI."""

import contextlib
import logging
import os
import shlex
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, LambdaCallback, ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from yolo_lightning.callbacks import (
    BatchDigests,
    DataReport,
    FiniteGuard,
    LabelGrid,
    LastCheckpoint,
    PredictionGrid,
    Preemption,
    ResultsTable,
    RunRecord,
    Throughput,
    TrainingProgress,
    ValidationReport,
)
from yolo_lightning.callbacks.training_progress import final_step
from yolo_lightning.checkpoints.validation import read_checkpoint, resumable_checkpoint
from yolo_lightning.cli import fit_summary, runs
from yolo_lightning.cli.launch import is_command, recipe_paths
from yolo_lightning.cli.monitors import check_monitors
from yolo_lightning.cli.recipe_errors import find_input_error
from yolo_lightning.cli.recipe_parser import (
    ANY_MODEL,
    PRINT_CONFIG,
    RecipeParser,
    describe_preparation,
    model_from_checkpoint,
    parse,
    take_from_model,
)
from yolo_lightning.cli.recipe_paths import absolute
from yolo_lightning.cli.recipe_policy import allow_options, has_modules, restrict_parser
from yolo_lightning.cli.reports import (
    apply_report_options,
    metrics_table,
    model_evaluation,
    save_report,
)
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.report import ReportOptions, check_report_options
from yolo_lightning.tracking.logger import run_loggers
from yolo_lightning.tracking.names import valid_run_id
from yolo_lightning.training_module import TrainingModule

_RESUME_HELP = (
    "`auto`: resume from the last checkpoint, or start a new run if there is none; in a SLURM or "
    "torchrun job this is the job's run, otherwise the newest run of the recipe"
)

_LIGHTNING_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.fabric.utilities.seed",
)
_NEEDLESS = (
    "Found current_model_state in the checkpoint",  # to resume with averaged weights
    "Tip",
    "PU available: ",
    "Automatic Mixed Precision",
    "Seed set to",
    "LOCAL_RANK",
    "Tensor Cores",
    "`Trainer.fit` stopped: `max_",
    "Restoring states",
    "Restored all states",
    "Loaded model weights",
)


class RecipeCLI(LightningCLI):
    """LightningCLI for recipes; the command line overrides the recipe, the recipe the checkpoint.

    Attributes:
        run_folder: of `fit`; None for the other commands.
        job_folder: run folder of the cluster job, or of the run to resume; None for a new one.
        requested_config: values of recipe and command line, without the paths of this run.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.command_line = list(args)
        self.run_folder: Path | None = None
        self.job_folder: Path | None = None
        self.requested_config = Namespace()
        self.checkpoint_run_id: str | None = None
        self.checkpoint_step = 0
        self.checkpoint: dict[str, Any] = {}  # its module and hyper-parameters
        self.recipes = recipe_paths(args)
        restrict_parser()
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False},
            # relative references are resolved after the command line is applied
            parser_kwargs={"parser_mode": "omegaconf+"},
            parser_class=RecipeParser,
            args=list(args),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's subcommands without `predict`, and options without use or unsafe."""
        return {
            name: options | {"weights_only", "verbose"}
            for name, options in LightningCLI.subcommands().items()
            if name != "predict"
        }

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        if subcommand != self.command_line[0]:
            return self.init_parser(**kwargs)  # stays empty: its options would take time, unused
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--resume", type=Literal["auto"] | None, help=_RESUME_HELP)
        else:
            parser.add_class_arguments(ReportOptions, "report")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line; with a checkpoint, parse again with its values as defaults.

        `--print_config` prints the values of the last parse, and exits.

        Raises:
            InputError: an invalid value, or no checkpoint found.
        """
        check_report_options(args)
        command = args[0]
        # until the checkpoint is known, any model stands for what an evaluation need not repeat
        quiet = [arg for arg in args if not arg.startswith(PRINT_CONFIG)]
        self.config = parse(parser, quiet, self.recipes, None if command == "fit" else ANY_MODEL)
        config = self.config[command]
        if len(quiet) < len(args) and not config.ckpt_path:
            parse(parser, args, self.recipes)
        if command != "fit" and not config.ckpt_path:
            config.ckpt_path = str(runs.find_best_checkpoint(runs.runs_root(config, self.recipes)))
            print(f"checkpoint: {config.ckpt_path}")
        path = self._checkpoint_to_resume(config) if command == "fit" else config.ckpt_path
        checkpoint = read_checkpoint(path) if path else {}
        if path:
            self.checkpoint_run_id = valid_run_id(checkpoint.get("mlflow_run_id"))
            self.checkpoint_step = checkpoint["global_step"]
            self.checkpoint = {key: checkpoint.get(key) for key in ("module", "hyper_parameters")}
            model = model_from_checkpoint(checkpoint, config, args, self.recipes)
            if command == "fit" and "optimizer_states" not in checkpoint:
                # weights alone: their training prepared images otherwise
                model["init_args"].pop("interpolation", None)
            self.config = parse(parser, args, self.recipes, model)
            config = self.config[command]
            config.ckpt_path = path
        if path and command == "fit" and "optimizer_states" not in checkpoint:
            rank_zero_only(print)(f"{path}: contains weights only; training starts from them")
            config.model.init_args.pretrained, config.ckpt_path = path, None
        elif path and command == "fit" and config.resume != "auto":
            rank_zero_only(print)(f"resuming: {path}")
        take_from_model(config)

    def _checkpoint_to_resume(self, config: Namespace) -> str | None:
        """Return the checkpoint to resume from, or the previous one if it is damaged."""
        if config.resume != "auto":
            return str(resumable_checkpoint(config.ckpt_path)) if config.ckpt_path else None
        root = runs.runs_root(config, self.recipes)
        job = runs.cluster_job_id(os.environ)
        self.job_folder = None if job is None else root / job
        path = runs.find_resume_checkpoint(root if self.job_folder is None else self.job_folder)
        if path is None and self.job_folder is None:  # killed before its first checkpoint
            self.job_folder = runs.newest_run(root)
        if path is None and config.ckpt_path:  # first start of a job that resumes another run
            path = resumable_checkpoint(config.ckpt_path)
        if path is not None:
            message = f"resuming: {path}"
        elif self.job_folder is not None and self.job_folder.is_dir():
            message = f"starting again: {self.job_folder} has no checkpoint yet"
        else:
            message = "nothing to resume: starting a new run"
        rank_zero_only(print)(message)
        return None if path is None else str(path)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: in Lightning, the checkpoint would override the command line."""

    def before_instantiate_classes(self) -> None:
        """Set the run folder, and the folder of checkpoints if the recipe does not set it."""
        config = self.config[self.config.subcommand]
        if self.config.subcommand == "fit":
            _find_pretrained(config)
        self.requested_config = config.clone()
        if self.config.subcommand == "fit":
            root = runs.runs_root(config, self.recipes)
            self.run_folder = runs.prepare_run_folder(root, config.ckpt_path, self.job_folder)
            runs.lock(self.run_folder)
            if runs.rank() == 0:  # until its end is reached again
                (self.run_folder / runs.FINISHED).unlink(missing_ok=True)
            config.trainer.default_root_dir = str(self.run_folder)
            checkpoints = str(self.run_folder / "checkpoints")
        else:
            checkpoints = str(Path(config.ckpt_path).parent)
            if not (self._tracked_run_folder or self.checkpoint_run_id):
                config.trainer.logger = False
        callbacks = config.trainer.callbacks or []
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            options = callback.get("init_args")
            if callback.class_path.endswith("ModelCheckpoint") and options.get("dirpath") is None:
                options["dirpath"] = checkpoints

    def _run_subcommand(self, subcommand: str) -> None:
        with self._without_empty_folder():
            _check_restart(self.trainer)
            super()._run_subcommand(subcommand)

    @contextlib.contextmanager
    def _without_empty_folder(self) -> Iterator[None]:
        """Remove the run folder if an error or a stop leaves it empty."""
        try:
            yield
        except BaseException:
            if self.run_folder is not None:
                runs.remove_if_empty(self.run_folder)
            raise

    def instantiate_classes(self) -> None:
        """Build model, data and trainer.

        Raises:
            InputError: that of a component, or a value that Lightning does not accept.
        """
        try:
            with self._without_empty_folder():
                super().instantiate_classes()
                self._record_backbone()
                has_check = hasattr(self.datamodule, "require_training_data")
                if self.run_folder is not None and has_check:
                    self.datamodule.require_training_data()
                # classes that the user allows may log other metrics
                if self.run_folder is not None and not has_modules():
                    check_monitors(self.trainer, self.model)
        except Exception as error:
            refused = find_input_error(error)
            # of classes that the user allows, the traceback is needed
            is_value = isinstance(
                error, ValueError | TypeError | RuntimeError | MemoryError | ImportError
            )
            if refused is None and is_value and not has_modules():
                refused = InputError(_reason(error))
            raise refused or error from None

    def _record_backbone(self) -> None:
        """Save the init_args of a custom backbone in the hyper-parameters of the checkpoints."""
        if isinstance(self.requested_config.get("model.init_args.backbone"), Namespace):
            backbone = self.resolved_config()["model"]["init_args"]["backbone"]
            saved = self.model.hparams.get("backbone")
            if isinstance(saved, dict) and "class_path" in saved:
                saved["init_args"] = backbone.get("init_args", {})

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build the trainer with the callbacks that every run needs."""
        named = self._get(self.config_init, "trainer")["callbacks"] or []
        named = [*named] if isinstance(named, list) else [named]
        trainer = super().instantiate_trainer(**kwargs)
        method = getattr(trainer.strategy, "_start_method", "popen")
        if method != "popen":  # the results would stay in the processes that it starts
            raise InputError(
                f"trainer.strategy starts processes by {method}; allowed: auto, ddp, fsdp, which "
                "start the command once for each device"
            )
        has_bar = _remove_default_output(trainer, named)
        trainer.callbacks += self._default_callbacks(trainer, has_bar)  # type: ignore[attr-defined]
        # resuming and evaluating a checkpoint continue its MLflow run
        folder = self.run_folder or self._tracked_run_folder or self._evaluation_folder
        # training numbers steps from 0
        evaluated_step = None if self.run_folder is not None else max(self.checkpoint_step - 1, 0)
        for logger in run_loggers(trainer):
            name = "/".join(folder.parts[-2:])
            logger.configure_run(folder, name, self.checkpoint_run_id, evaluated_step)
        if self.run_folder is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            record = self._run_record(self.run_folder)
            trainer.callbacks.insert(0, record)  # type: ignore[attr-defined]
        # Lightning expects checkpoint callbacks last
        trainer.callbacks.sort(key=lambda c: isinstance(c, Checkpoint))  # type: ignore[attr-defined]
        return trainer

    def _default_callbacks(self, trainer: pl.Trainer, has_bar: bool) -> list[pl.Callback]:
        """Return the callbacks of every run, except those that the recipe configures itself."""
        bar: list[type[pl.Callback]] = [TrainingProgress] if has_bar else []
        if self.config.subcommand != "fit":
            return [DataReport(), *(callback() for callback in bar)]
        defaults: list[type[pl.Callback]] = [
            DataReport,
            FiniteGuard,
            BatchDigests,
            Throughput,
            *bar,  # shows the speed, and ends before others print
            LabelGrid,
            PredictionGrid,
            ResultsTable,
            ValidationReport,
            LastCheckpoint,
            Preemption,
        ]
        configured = {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]
        return [callback() for callback in defaults if callback not in configured]

    @property
    def _tracked_run_folder(self) -> Path | None:
        """Folder of the MLflow run that the evaluated checkpoint belongs to."""
        return runs.tracked_run_folder(self.config[self.config.subcommand].ckpt_path)

    @property
    def _evaluation_folder(self) -> Path:
        """Folder of the journal if the checkpoint is outside of its run folder."""
        config = self.config[self.config.subcommand]
        root = runs.runs_root(config, self.recipes)
        return root / "measured" / str(self.checkpoint_run_id)

    def _run_record(self, folder: Path) -> RunRecord:
        """Return the callback that saves the recipes, the command line and the resolved values."""
        files = {
            f"recipe{'' if k == 0 else f'-{k + 1}'}.yaml": Path(path).read_text(encoding="utf-8")
            for k, path in enumerate(self.recipes)
        }
        files["command.txt"] = shlex.join(["yolo-lightning", *self.command_line]) + "\n"
        name = Path(self.recipes[-1]).stem if self.recipes else "run"
        return RunRecord(folder, files, self.resolved_config(), name)

    def resolved_config(self) -> dict[str, Any]:
        """Return all values with references resolved, a recipe that is valid in every folder."""
        parser = self._parser(self.config.subcommand)
        config: Namespace = self.requested_config.clone()
        config.pop("config", None)
        config.pop("resume", None)
        values = yaml.safe_load(parser.dump(config, skip_none=False, skip_validation=True))
        return absolute(values)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        options = {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}
        # `after_validate` prints the metrics
        return options if subcommand == "fit" else {**options, "verbose": False}

    def before_fit(self) -> None:
        """Let the start print where the run is, and what it trains."""
        trainer, folder = self.trainer, self.run_folder
        if trainer.is_global_zero and folder is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]

            def print_start(*_: Any) -> None:
                print(fit_summary.describe_start(self, folder), flush=True)

            # first, but after the data and the weights are read, which may fail
            trainer.callbacks.insert(0, LambdaCallback(on_fit_start=print_start))  # type: ignore[attr-defined]

    def before_validate(self) -> None:
        """Check the model against the checkpoint, before the data is read, and the options."""
        if isinstance(self.model, TrainingModule):
            self.model.on_load_checkpoint(self.checkpoint)
        config, saved = self.config[self.subcommand], self.checkpoint["hyper_parameters"]
        if line := describe_preparation(config, saved):
            rank_zero_only(print)(line)
        test = getattr(self.datamodule, "test", None)
        if self.subcommand == "test" and test is getattr(self.datamodule, "validation", ()):
            rank_zero_only(print)("data.test is not set: these are the validation images")
        apply_report_options(self)

    before_test = before_validate

    def after_validate(self) -> None:
        """Print the metrics, and those of each class, and write the report."""
        trainer = self.trainer
        if trainer.is_global_zero and hasattr(self.model, "table"):
            print(f"\n{metrics_table(trainer.callback_metrics)}\n\n{self.model.table()}")
            evaluation = model_evaluation(self.model)
            if evaluation is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                save_report(self, evaluation, self.recipes)
        for logger in run_loggers(trainer):
            logger.close()

    after_test = after_validate

    def after_fit(self) -> None:
        """Check that training reached max_steps or max_epochs, and print its results.

        Raises:
            RuntimeError: training ended early without a reason.
        """
        trainer = self.trainer
        end = final_step(trainer)
        finished = end is None or trainer.global_step >= end
        if not finished and not trainer.should_stop and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise RuntimeError(
                f"training ended at step {trainer.global_step} of {end} without a reason"
            )
        if trainer.fast_dev_run and self.run_folder is not None:  # type: ignore[attr-defined]
            runs.remove_if_empty(self.run_folder)
        elif trainer.is_global_zero and self.run_folder is not None:
            runs.mark_finished(self.run_folder, trainer.global_step)
            args = [*self.command_line, *allow_options()]
            print(f"\n{fit_summary.describe_end(self, self.run_folder, args)}", flush=True)


def _remove_default_output(trainer: pl.Trainer, named: list[pl.Callback]) -> bool:
    """Remove Lightning's progress bar and model summary, unless the recipe names them.

    Returns:
        Whether there was such a bar.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    kinds = (ProgressBar, ModelSummary)
    removed = [c for c in callbacks if isinstance(c, kinds) and c not in named]
    for callback in removed:
        callbacks.remove(callback)
    return any(isinstance(callback, ProgressBar) for callback in removed)


def _reason(error: BaseException) -> str:
    """Return the text of an error, or of its cause where it only says what the parser tried."""
    while str(error).startswith(("Does not validate", "Problem with")):
        cause = error.__cause__ or error.__context__
        if cause is None:
            break
        error = cause
    return " ".join(str(error).split())[:500]


def _find_pretrained(config: Namespace) -> None:
    """Replace a folder of runs in `model.pretrained` by the best checkpoint of its newest run."""
    model = (config.get("model") or {}).get("init_args") or {}
    path = model.get("pretrained")
    if isinstance(path, str):
        model["pretrained"] = runs.find_pretrained(path)


def _is_needed(record: logging.LogRecord) -> bool:
    """Return whether a message of Lightning says more than the recipe and our own output."""
    message = record.getMessage()
    return not any(text in message for text in _NEEDLESS)


def silence_libraries() -> None:
    """Hide warnings and tips of libraries that need no action."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="IProgress not found.*")  # notebooks show text then
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # steps are logged across epochs
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*skip_none parameter was deprecated.*")
    warnings.filterwarnings("ignore", message=".*instantiate_classes.* was deprecated.*")
    warnings.filterwarnings("ignore", message=".*compute.. method of metric .* was called before")
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need.*")
    # of a frozen backbone
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
    # checkpoints hold the averaged weights
    warnings.filterwarnings("ignore", message=".*using the WeightAveraging callback, but loading.*")
    warnings.filterwarnings("ignore", message=".*Total length of .* across ranks is zero.*")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # it is imported later
    for name in (
        "mlflow",
        "alembic",
        "alembic.runtime.migration",
        "mlflow.store.db.utils",
        "urllib3",
    ):
        logging.getLogger(name).setLevel(logging.ERROR if name == "urllib3" else logging.WARNING)
    for name in _LIGHTNING_LOGGERS:
        logging.getLogger(name).addFilter(_is_needed)


def _check_restart(trainer: pl.Trainer) -> None:
    """Raise `InputError` if Lightning would start a script of the user once for each device."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    is_started = environment is None or environment.creates_processes_externally
    if trainer.num_devices > 1 and not is_started and not is_command():
        raise InputError(
            f"trainer.devices is {trainer.num_devices}, for which Lightning would run all of this "
            "script once for each device; allowed in Python: 1; for more, start the recipe with "
            f"torchrun --nproc-per-node={trainer.num_devices} -m yolo_lightning fit RECIPE"
        )


def main(args: Sequence[str]) -> RecipeCLI:
    """Run `fit`, `validate` or `test`.

    Raises:
        InputError: bad input, or trainer options that exclude each other.
    """
    silence_libraries()
    try:
        return RecipeCLI(args)
    except MisconfigurationException as error:
        raise InputError(str(error)) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise InputError(
            f"a loader worker died ({str(error).splitlines()[0]}), usually because memory ran out: "
            "reduce data.num_workers, or provide more memory, including /dev/shm"
        ) from None
