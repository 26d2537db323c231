"""`yolo_lightning.fit`: the commands `init` and `fit` as one function."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from yolo_lightning import signals
from yolo_lightning.cli import main, recipe_policy
from yolo_lightning.errors import InputError, read_text, write_atomically

if TYPE_CHECKING:
    from yolo_lightning.cli.recipe import RecipeCLI
    from yolo_lightning.inference.loading import Module

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see `main`; without effect if torch is loaded

_FROM_DICTIONARY = "# Written by yolo_lightning.fit from a dictionary; its next call replaces it.\n"


@dataclass(frozen=True)
class Run:
    """A training, as `fit` returns it.

    Attributes:
        folder: checkpoints, metrics, pictures and the recipe as it was trained.
        recipe: the file that was trained; `yolo-lightning test RECIPE` evaluates the run.
        metrics: of the best validation: `step`, `seconds` of training, losses and `val/…`; those of
            all validations are in ``results.csv``. Empty if nothing was validated.
    """

    folder: Path
    recipe: Path
    metrics: dict[str, float]

    @property
    def best(self) -> Path:
        """The best checkpoint, or the last one if nothing was validated.

        Raises:
            InputError: there is none.
        """
        from yolo_lightning.cli.runs import find_best_checkpoint

        return find_best_checkpoint(self.folder, "no run in")

    @cached_property
    def model(self) -> "Module":
        """The module of `best` on the CPU, loaded on first use."""
        from yolo_lightning.inference.loading import load

        return load(self.best)


def fit(
    recipe: str | Path | Mapping[str, Any] | None = None,
    *,
    detection: str | Path | None = None,
    classification: str | Path | None = None,
    max_minutes: float | None = None,
    output: str | Path | None = None,
    resume: Literal["auto"] | None = None,
    overrides: Mapping[str, Any] | None = None,
    **init_options: Any,
) -> Run:
    """Train a model, as the command `fit` does; from datasets, write the recipe as `init` does.

    A recipe that the same call wrote before is used as it is, so a training that is resumed has the
    same length. Ctrl-C stops after the step and saves it; pressed again, it stops at once.

    Args:
        recipe: a file, or its content as a dictionary, which is written to `output`.
        detection: instead of a recipe, the images with boxes: a folder or file in a known layout.
        classification: images with labels, such as a folder per class.
        max_minutes: of training on this machine; a few measured steps give the number of steps, at
            least 100, which the recipe keeps.
        output: of the recipe; default: the name of `detection`, or ``recipe.yaml``, in the working
            folder.
        resume: `auto` goes on from the last checkpoint of the recipe's newest run, if there is one.
        overrides: values of the recipe by dotted key, and the other options of the command:
            ``{"trainer.max_steps": 100, "allow-module": "my_package"}``.
        init_options: other options of `init`, such as ``image_size=224`` or ``validation="val/"``.

    Raises:
        InputError: bad input, with the message of the command line.
        KeyboardInterrupt: Ctrl-C.
        SystemExit: SIGTERM or SIGUSR1, with which a cluster stops a job; the step is saved.
    """
    if resume not in (None, "auto"):
        raise InputError(f"resume is {resume!r}; allowed: 'auto', None")
    if "minutes" in init_options:
        raise InputError("minutes: no such argument; here it is max_minutes")
    restore_handlers = signals.install_handlers(ends_process=False)
    try:
        if recipe is None:
            named = {"classification": classification, "minutes": max_minutes, "output": output}
            path = _write_recipe(detection, {**named, **init_options})
        else:
            datasets = {"detection": detection, "classification": classification}
            unused = {**datasets, "max_minutes": max_minutes, **init_options}
            path = _recipe_path(recipe, output, unused)
        options = {**({"resume": resume} if resume else {}), **(overrides or {})}
        words = [f"--{name}={_to_word(value)}" for name, value in options.items()]
        with recipe_policy.restoring_parser():
            cli = main.run(["fit", "--config", str(path), *words])
    except InputError as error:
        raise main.printable_error(error) from None
    except signals.Stop as stop:
        if stop.code != signals.exit_code(signals.INTERRUPT):
            raise
        saved = f" and saved to {stop.checkpoint}" if stop.checkpoint else ""
        message = f"stopped{saved}; to go on, call fit again with resume='auto'"
        raise KeyboardInterrupt(message) from None
    finally:
        restore_handlers()
    return Run(cli.run_folder, path, _best_metrics(cli))


def _write_recipe(detection: str | Path | None, options: Mapping[str, Any]) -> Path:
    """Write the recipe of datasets, unless the same options have written it before."""
    from yolo_lightning.cli.commands import init

    if detection is None:
        raise InputError("fit needs a recipe, or images with boxes: fit(detection='photos/')")
    words = [str(Path(detection))]
    for name, value in options.items():
        if value is not None and value is not False:
            option = f"--{name.replace('_', '-')}"
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            words.append(option if value is True else f"{option}={text}")
    path = Path(init.parse(words).output)
    if path.is_file() and f"# Written by: {init.command(words)}\n" in read_text(path):
        print(f"{path}: the recipe, written before with the same options")
    else:
        init.write_recipe(words)
        print(f"{path}: the recipe")
    return path


def _recipe_path(
    recipe: str | Path | Mapping[str, Any], output: str | Path | None, unused: Mapping[str, Any]
) -> Path:
    """Return the path of a recipe; write that of a dictionary."""
    is_file = not isinstance(recipe, Mapping)
    names = [name for name, value in {**unused, "output": is_file and output}.items() if value]
    if names:
        raise InputError(
            f"{', '.join(names)}: not with a recipe, which says all of it; change its values by "
            "overrides={'trainer.max_steps': 1000}"
        )
    if not isinstance(recipe, Mapping):
        return Path(recipe)
    import yaml

    path = Path(output or "recipe.yaml")
    if path.exists() and not read_text(path).startswith(_FROM_DICTIONARY):
        raise InputError(f"{path} exists already; use another output, or move the file")
    try:
        values = json.loads(json.dumps(recipe, default=os.fspath))  # paths and tuples to plain ones
    except (TypeError, ValueError) as error:
        raise InputError(f"recipe: {error}; allowed in a dictionary: plain values") from None
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_atomically(path, _FROM_DICTIONARY + text)
    return path


def _to_word(value: Any) -> str:
    """Return a value of a recipe as the command line takes it."""
    is_text = isinstance(value, str | os.PathLike)
    return os.fspath(value) if is_text else json.dumps(value, default=os.fspath)


def _best_metrics(cli: "RecipeCLI") -> dict[str, float]:
    """Return the row of the best validation, also of one before this training was resumed."""
    from yolo_lightning.callbacks.results_table import ResultsTable, best_row, read_rows

    path = ResultsTable.path(cli.trainer)
    _, row = best_row(read_rows(path) if path.is_file() else [], cli.trainer)
    return row or {}
