"""What recipes, checkpoints and options may build, read and write.

`restrict_parser` is the rule for the parser: it imports `CLASSES` and the modules that the user
allows, and nothing else. `check_values` checks where the parsed values write and send to.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from yolo_lightning.errors import InputError, expand, nearest, short

ALLOW_MODULE, ALLOW_ENV = "--allow-module", "--allow-env"

CLASSES = {
    module: names.split()
    for module, names in {
        "yolo_lightning": "ClassifierModule CombinedDataModule DetectorModule",
        "yolo_lightning.callbacks": """BatchDigests CompileNetwork DataReport FiniteGuard
            LabelGrid LastCheckpoint MultiScale PredictionGrid Preemption ResultsTable Throughput
            TrainingProgress ValidationReport""",
        "yolo_lightning.datamodules": """BoxCSV COCOJson ClassificationAugmentation
            CombinedDataModule DetectionAugmentation ILSVRCDetection ImageFolder ImageNet LabelCSV
            ShapesDetection ShapesImageLabels VOCFolder YOLOText""",
        "yolo_lightning.losses": "LossSettings",
        "yolo_lightning.schedules": "PolynomialDecay Schedule StepDecay",
        "yolo_lightning.tracking": "RunLogger",
        "lightning.pytorch.accelerators": "CPUAccelerator CUDAAccelerator MPSAccelerator",
        "lightning.pytorch.callbacks": """DeviceStatsMonitor EMAWeightAveraging EarlyStopping
            GradientAccumulationScheduler LearningRateMonitor ModelCheckpoint ModelSummary
            RichModelSummary RichProgressBar StochasticWeightAveraging TQDMProgressBar Timer
            WeightAveraging""",
        "lightning.pytorch.callbacks.progress.rich_progress": "RichProgressBarTheme",
        "lightning.pytorch.loggers": "CSVLogger TensorBoardLogger",
        "lightning.pytorch.plugins": """DoublePrecision FSDPPrecision HalfPrecision MixedPrecision
            TorchSyncBatchNorm""",
        "lightning.pytorch.plugins.environments": """LightningEnvironment SLURMEnvironment
            TorchElasticEnvironment""",
        "lightning.pytorch.profilers": """AdvancedProfiler PassThroughProfiler PyTorchProfiler
            SimpleProfiler""",
        "lightning.pytorch.strategies": "DDPStrategy FSDPStrategy SingleDeviceStrategy",
    }.items()
}
"""Classes that a recipe may name. They run no program and send nothing, except RunLogger, whose
store `check_values` checks; those that write take folders, checked there too. Not among them:
RunRecord, which writes any text anywhere, and Lightning's loggers of other services."""
_CLASS_NAMES = [name for names in CLASSES.values() for name in names]

SLOTS = {
    "model", "model.backbone", "model.schedule", "model.loss",
    "data", "data.detection", "data.classification", "data.validation", "data.test",
    "data.detection_augmentation", "data.classification_augmentation",
    "trainer.accelerator", "trainer.callbacks", "trainer.logger", "trainer.plugins",
    "trainer.profiler", "trainer.strategy",
}  # fmt: skip
"""Keys, without init_args, whose values are classes; a test compares them with the annotations."""

# names in the recipes and docs of this project
_VARIABLES = re.compile(
    r"\w+_DATA|IMAGENET|IMAGENET22K|IMAGENET_DET|CLASSIFIER_224|CLASSIFIER_9K|DARKNET19_448"
    r"|EXTRACTION_224|EXTRACTION_224_PLAIN|EXTRACTION_448|TINY_DARKNET"
)
_STORE = "MLFLOW_TRACKING_URI"
# parameters of the trainer and of CLASSES that are, or become part of, a path that is written
_OUTPUT_KEYS = {
    "default_root_dir", "dirpath", "filename", "folder", "name", "save_dir", "sub_dir", "version",
}  # fmt: skip
URL = re.compile(r"://|^\w+::")

_KeyPath = tuple[str, ...]
_allowed: dict[str, tuple[str, ...]] = {"modules": (), "variables": ()}


def allow(modules: Iterable[str] = (), variables: Iterable[str] = ()) -> None:
    """Set the modules and environment variables that recipes may use in addition to the listed."""
    _allowed.update(modules=tuple(modules), variables=tuple(variables))


def has_modules() -> bool:
    """Return whether the user allows recipes to use other modules than the listed."""
    return bool(_allowed["modules"])


def allow_options() -> list[str]:
    """Return the options of a command line that allow what this one does."""
    options = {ALLOW_MODULE: _allowed["modules"], ALLOW_ENV: _allowed["variables"]}
    return [f"{option}={name}" for option, names in options.items() for name in names]


def may_read(variable: str) -> bool:
    """Return whether a recipe may read an environment variable."""
    return variable in _allowed["variables"] or bool(_VARIABLES.fullmatch(variable))


def variable_refusal(variable: str) -> str:
    """Return why a recipe may not read an environment variable, and how to allow it."""
    return (
        f"reads the environment variable {variable}; allowed: names that end in _DATA, those of "
        f"this project's recipes, and what {ALLOW_ENV} {variable} allows"
    )


def is_listed(name: str) -> bool:
    """Return whether `CLASSES` has the name of a class; the parser compares the modules too."""
    package, _, class_name = name.rpartition(".")
    return package.split(".")[0] in ("yolo_lightning", "lightning") and class_name in _CLASS_NAMES


def may_build(name: str, modules: Sequence[str]) -> bool:
    """Return whether a recipe may name a class; modules are matched by whole dotted parts.

    The parser searches a name without a dot among imported classes.
    """
    is_allowed = any(name.startswith(f"{module}.") for module in modules)
    return "." not in name or is_listed(name) or is_allowed


def class_refusal(name: str) -> str:
    """Return why a recipe may not name a class, and how to allow it."""
    module, _, class_name = name.rpartition(".")
    hint = nearest(class_name, _CLASS_NAMES)
    return (
        f"names {short(name)}{'; ' + hint if hint else ''}; allowed: classes of yolo_lightning, "
        f"the usual ones of lightning.pytorch, and others with {ALLOW_MODULE} {module[:80]}"
    )


def restrict_parser() -> None:
    """Let the parser import `CLASSES` and allowed modules, and read allowed variables only.

    It checks both the name that it is given and the module that defines the object, so functions,
    methods and what a module imports from elsewhere are refused too.
    """
    import jsonargparse
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    allowed = set(_allowed["modules"])
    for module, names in CLASSES.items():
        for name in names:
            # the parser uses the shortest of these
            parts = getattr(import_module(module), name).__module__.split(".")
            allowed |= {".".join([*parts[:k], name]) for k in range(1, len(parts) + 1)}
            allowed.add(f"{module}.{name}")
    jsonargparse.set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*"],
        import_path_allowlist=sorted(allowed),
    )
    for name in ("coerce", "create", "decode", "deprecated", "select", "dict.keys", "dict.values"):
        OmegaConf.clear_resolver(f"oc.{name}")

    def read_variable(name: str, *default: str | None) -> str | None:
        if not may_read(name):
            raise InputError(variable_refusal(name))
        value: str | None = oc.env(name, *default)
        return value

    OmegaConf.register_resolver("oc.env", read_variable, replace=True)


@contextlib.contextmanager
def restoring_parser() -> Iterator[None]:
    """Undo `restrict_parser` afterwards: other code of this process may use the libraries too."""
    from jsonargparse import _common  # its public function only adds to what is denied
    from omegaconf import DictConfig

    settings, resolvers = dict(_common.parsing_settings), dict(DictConfig._resolvers)
    try:
        yield
    finally:
        _common.parsing_settings.update(settings)
        DictConfig._resolvers.clear()
        DictConfig._resolvers.update(resolvers)


def check_values(values: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check where parsed values write and send to; what the command line says is the user's.

    Args:
        values: of recipes, command line and checkpoint, with references resolved.
        options: of the command line alone.

    Raises:
        InputError: a NUL byte; or a URL, a store that is no SQLite file below the working folder,
            or an output path outside of it, which neither the command line nor the environment
            names.
    """
    given = [(path[-1], text) for path, text, _ in _texts(options)]
    named = {os.environ.get(name, "") for name in _allowed["variables"]} - {""}
    folders = {Path.cwd(), *map(_absolute, named)}
    folders |= {_absolute(text) for key, text in given if key in _OUTPUT_KEYS}
    trusted = {text for _, text in given} | named | {os.environ.get(_STORE, "")}

    def is_inside(path: str) -> bool:
        return any(_absolute(path).is_relative_to(folder) for folder in folders)

    for path, text, owner in _texts(values):
        key = next((part for part in reversed(path) if not part.isdigit()), "")
        if "\0" in text:
            raise InputError(f"{'.'.join(path)} is {short(text)}; allowed: text without NUL")
        if text in trusted:
            continue
        if key == "tracking_uri":
            file = re.fullmatch(r"sqlite:///([^?]+)", text)
            problem = "" if file and is_inside(file[1]) else "a store outside the working folder"
        elif URL.search(text):
            problem = "a URL"
        elif path == ("trainer", "model_registry"):
            problem = "a place to upload to"
        else:
            is_own = not owner or is_listed(owner)  # of others, the keys are unknown
            is_output = is_own and path[0] == "trainer" and key in _OUTPUT_KEYS
            problem = "an output outside the working folder"
            problem = problem if is_output and not is_inside(text) else ""
        if problem:
            where = ".".join(path)
            hint = f", or set {_STORE}" if key == "tracking_uri" else ""
            raise InputError(
                f"{where} is {short(text)}, {problem}; a recipe cannot name it: pass it on the "
                f"command line, --{where}=…{hint}"
            )


def _absolute(path: str) -> Path:
    return Path(os.path.normpath(Path.cwd() / expand(path)))


def _texts(value: Any, path: _KeyPath = (), owner: str = "") -> Iterator[tuple[_KeyPath, str, str]]:
    """Yield key path, text and class of the object that it belongs to, for each text in a value."""
    if isinstance(value, str | Path):
        yield path, str(value), owner
    elif isinstance(value, Mapping):
        owner = str(value.get("class_path", owner))
        for key, item in value.items():
            yield from _texts(item, (*path, *str(key).split(".")), owner)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _texts(item, (*path, str(number)), owner)
