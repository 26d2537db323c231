"""Check command-line options and the cluster launch against the recipe, before heavy imports."""

import argparse
import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from yolo_lightning.cli.recipe_check import check_recipe, read_value
from yolo_lightning.cli.recipe_policy import ALLOW_ENV, ALLOW_MODULE, may_read
from yolo_lightning.errors import InputError

_ENV_REFERENCE = re.compile(r"\$\{oc\.env:\s*(\w+)\s*(?:,([^}]*))?\}")
_CONFIG = ("-c", "--config", "--recipe")
_AS_MODULE = (sys.executable, "-m", "yolo_lightning")
_MAX_DEVICES = 1024  # of a node
# variables of Lightning's other cluster environments, whose sizes are not checked
_OTHER_LAUNCHERS = ("MASTER_ADDR", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class _Parser(argparse.ArgumentParser):
    """A parser that raises `InputError` instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise the message."""
        raise InputError(message)


def _take(args: Sequence[str], *options: str) -> tuple[list[str], list[str]]:
    """Return the values of options, which may be given several times, and the other words."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(*options, dest="values", action="append", default=[])
    taken, rest = parser.parse_known_args(list(args))
    return taken.values, rest


def split_allowed(args: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Take `--allow-module` and `--allow-env` from a command line.

    Returns:
        The other words, allowed modules and allowed environment variables.

    Raises:
        InputError: a value is missing or is not a name.
    """
    modules, rest = _take(args, ALLOW_MODULE)
    variables, rest = _take(rest, ALLOW_ENV)
    for name in modules:
        parts = name.split(".")
        if not all(part.isidentifier() for part in parts) or parts[0] == "jsonargparse":
            example = "a module such as my_package.models"
            raise InputError(f"{ALLOW_MODULE} {name!r}; expected {example}")
    for name in variables:
        if not name.isidentifier():
            raise InputError(f"{ALLOW_ENV} {name!r}; expected a variable such as SCRATCH")
    return rest, modules, variables


def check_command_line(args: Sequence[str], modules: Sequence[str] = ()) -> dict[str, Any]:
    """Check the recipes of a command line without the command's name.

    Returns:
        Values by dotted key, such as `trainer.devices`; options override recipes.

    Raises:
        InputError: see `check_recipe`.
    """
    recipes, rest = _take(args, *_CONFIG)
    files = dict.fromkeys(recipes, False)
    for word in rest:
        if word.endswith((".yaml", ".yml")) and Path(word).is_file():
            files.setdefault(word, True)  # a recipe or a dataset
    values: dict[str, Any] = {}
    for path, may_be_dataset in files.items():
        values |= _flatten(check_recipe(path, modules, may_be_dataset))
    return values | option_values(rest)


def option_values(args: Sequence[str]) -> dict[str, Any]:
    """Return the options of a command line by dotted key, their values read as YAML."""
    values: dict[str, Any] = {}
    for word, next_word in itertools.zip_longest(args, args[1:], fillvalue=""):
        if word.startswith("--"):
            key, has_value, value = word.removeprefix("--").partition("=")
            if not has_value:
                value = "" if next_word.startswith("--") else next_word
            values |= _flatten({key: read_value(value)})
    return values


def with_checkpoint(args: Sequence[str], checkpoint: Path) -> str:
    """Return the command with these arguments, but another checkpoint, quoted for the shell."""
    _, rest = _take(args, "--resume", "--ckpt_path")
    return command([*rest, f"--ckpt_path={checkpoint}"])


def command(args: Sequence[str]) -> str:
    """Return a command of this program, quoted for the shell, as it can be started here."""
    name = "yolo-lightning"
    if shutil.which(name) is not None:
        return shlex.join([name, *args])
    is_script = Path(sys.argv[0]).name == name
    return shlex.join([*([sys.argv[0]] if is_script else _AS_MODULE), *args])


def is_command() -> bool:
    """Return whether this process is `yolo-lightning`, rather than a script that imports it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    is_module = spec is not None and spec.name == "yolo_lightning.__main__"
    return is_module or Path(sys.argv[0]).name == "yolo-lightning"


def recipe_paths(args: Sequence[str]) -> list[str]:
    """Return the recipes of a command line, each once."""
    return list(dict.fromkeys(_take(args, *_CONFIG)[0]))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys; lists are not flattened."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


class Launch(NamedTuple):
    """How the processes of a distributed training were started."""

    launcher: str  # SLURM or torchrun
    nodes: int
    tasks_per_node: int


def detect_launch(environment: Mapping[str, str]) -> Launch | None:
    """Detect the launcher of this process, in Lightning's order; None if there is none.

    Raises:
        InputError: the SLURM job sets --ntasks only, which Lightning cannot use, or `srun` is
            missing or got another number of tasks than the job.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        nodes = _env_int(environment, "GROUP_WORLD_SIZE", 1)
        return Launch("torchrun", nodes, _env_int(environment, "LOCAL_WORLD_SIZE", 1))
    total = _env_int(environment, "SLURM_NTASKS", 0)
    if total == 0 or environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    nodes = _env_int(environment, "SLURM_NNODES", _env_int(environment, "SLURM_JOB_NUM_NODES", 1))
    tasks = _env_int(environment, "SLURM_NTASKS_PER_NODE", 0 if total > 1 else 1)
    if tasks == 0:
        value = f"={total // nodes}" if total % nodes == 0 else ""
        raise InputError(
            f"the job has {total} tasks on {nodes} nodes, set by --ntasks; use SLURM's "
            f"--ntasks-per-node{value} instead"
        )
    if total != nodes * tasks:
        raise InputError(
            f"srun started {total} tasks, but the job has {nodes} nodes x {tasks} tasks: omit "
            "srun's own -n"
        )
    # slurmd sets SLURMD_NODENAME for batch scripts too; only srun sets SLURM_STEP_ID
    if total > 1 and "SLURMD_NODENAME" in environment and "SLURM_STEP_ID" not in environment:
        raise InputError(
            f"the job has {nodes} nodes x {tasks} tasks, but this process is not one of them: "
            "put srun before the command"
        )
    return Launch("SLURM", nodes, tasks)


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Return whether torchrun or srun started this process."""
    return "TORCHELASTIC_RUN_ID" in environment or "SLURM_PROCID" in environment


def check_launch(
    values: Mapping[str, Any],
    environment: Mapping[str, str],
    gpus: int | None = None,
) -> None:
    """Compare the launched processes with the devices and nodes of a recipe.

    `values` are from `check_command_line`; `gpus` is the number of visible GPUs, None if unknown.

    Raises:
        InputError: tasks, devices or nodes differ; names both numbers and the option to change.
    """
    options = {
        name: resolve_env(values.get(f"trainer.{name}", default), environment)
        for name, default in (("num_nodes", 1), ("devices", "auto"), ("accelerator", "auto"))
    }
    nodes = options["num_nodes"] if isinstance(options["num_nodes"], int) else None
    devices = _device_count(options["devices"])
    if devices is None and (options["devices"], options["accelerator"]) == ("auto", "cpu"):
        devices = 1
    if devices is not None and devices > _MAX_DEVICES:
        raise InputError(f"trainer.devices is {devices:,}; allowed: at most {_MAX_DEVICES:,}")
    launch = detect_launch(environment)
    is_other = any(name in environment for name in _OTHER_LAUNCHERS)
    if launch is not None:
        _check_job_size(launch, nodes, devices, options)
    elif nodes is not None and nodes > 1 and not is_other:
        raise InputError(
            f"the recipe has trainer.num_nodes {nodes}, but this process was started by neither "
            "srun nor torchrun: start one on every node, or pass --trainer.num_nodes 1"
        )
    accelerator = options["accelerator"]
    needs_gpus = accelerator in ("gpu", "cuda") or (gpus and accelerator != "cpu")
    if gpus is not None and needs_gpus and (devices or 1) > gpus:
        hint = f"pass --trainer.devices {gpus}" if gpus else "pass --trainer.accelerator cpu"
        if launch is not None and launch.launcher == "SLURM" and gpus:
            hint += f", or give every task all GPUs of its node, --gres=gpu:{devices}"
        raise InputError(
            f"the recipe has trainer.devices {options['devices']}, but this process sees "
            f"{gpus} GPU{'' if gpus == 1 else 's'}: {hint}"
        )


def _check_job_size(
    launch: Launch, nodes: int | None, devices: int | None, options: Mapping[str, Any]
) -> None:
    """Raise `InputError` if the recipe's nodes or devices differ from the launched ones."""
    changes = []
    if nodes is not None and nodes != launch.nodes:
        changes.append(f"--trainer.num_nodes {launch.nodes}")
    if devices is not None and devices != launch.tasks_per_node:
        changes.append(f"--trainer.devices {launch.tasks_per_node}")
    if changes:
        plural = "" if launch.nodes == 1 else "s"
        raise InputError(
            f"the job has {launch.nodes} node{plural} x {launch.tasks_per_node} tasks (started by "
            f"{launch.launcher}), but the recipe has trainer.num_nodes {options['num_nodes']}, "
            f"trainer.devices {options['devices']}: pass {' '.join(changes)}, or change the job"
        )


def visible_gpu_count(environment: Mapping[str, str]) -> int | None:
    """Count the visible NVIDIA GPUs or MIG instances without initializing CUDA; None if unknown."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = [name.strip() for name in listed.split(",")]
        valid = itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), names)
        return len(list(valid))
    if environment.get("SLURM_GPUS_ON_NODE", "").isdigit():
        return int(environment["SLURM_GPUS_ON_NODE"])
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return None


def resolve_env(value: Any, environment: Mapping[str, str]) -> Any:
    """Replace a value ``${oc.env:NAME,default}`` and convert digits to int; keep other values.

    The parser reports a variable that recipes may not read.
    """
    match = _ENV_REFERENCE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match and may_read(match[1]):
        value = environment.get(match[1], match[2] or "").strip()
    is_number = isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,18}\s*", value)
    return int(value) if is_number else value


def _device_count(devices: Any) -> int | None:
    """Return the number of devices; None for `auto`, -1 or a reference."""
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and re.fullmatch(r"[\d\s,]+", devices):
        return len([part for part in devices.split(",") if part.strip()])
    if isinstance(devices, int) and not isinstance(devices, bool) and devices > 0:
        return devices
    return None


def _env_int(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "").strip()
    return int(value) if value.isdigit() else default
