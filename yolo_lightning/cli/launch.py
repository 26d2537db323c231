"""Check command-line options and the cluster launch against the recipe, before heavy imports."""

import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from yolo_lightning.cli.recipe_check import check_recipe, read_value
from yolo_lightning.cli.recipe_policy import ALLOW_ENV, ALLOW_MODULE, may_read
from yolo_lightning.errors import InputError

_ENV_REFERENCE = re.compile(r"\$\{oc\.env:\s*(\w+)\s*(?:,([^}]*))?\}")
_MAX_DEVICES = 1024  # of a node
# variables of Lightning's other cluster environments, whose sizes are not checked
_OTHER_LAUNCHERS = ("MASTER_ADDR", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class Allowed(NamedTuple):
    """What the command line allows recipes to use."""

    modules: tuple[str, ...] = ()  # prefixes of class paths
    variables: tuple[str, ...] = ()  # of the environment


def split_allowed(args: Sequence[str]) -> tuple[list[str], Allowed]:
    """Return the command line without `--allow-module` and `--allow-env`, and what they allow.

    Raises:
        InputError: a value is missing or is not a name.
    """
    rest: list[str] = []
    names: dict[str, list[str]] = {ALLOW_MODULE: [], ALLOW_ENV: []}
    words = iter(args)
    for word in words:
        option, has_value, value = word.partition("=")
        if option not in names:
            rest.append(word)
            continue
        name = value if has_value else next(words, "")
        parts = name.split(".") if option == ALLOW_MODULE else [name]
        if not all(part.isidentifier() for part in parts) or parts[0] == "jsonargparse":
            example = "a module such as my_package.models"
            example = example if option == ALLOW_MODULE else "a variable such as SCRATCH"
            raise InputError(f"{option} {name!r}; expected {example}")
        names[option].append(name)
    return rest, Allowed(*map(tuple, names.values()))


def check_command_line(args: Sequence[str], modules: Sequence[str] = ()) -> dict[str, Any]:
    """Check the recipes of a command line without the command's name.

    Returns:
        Values by dotted key, such as `trainer.devices`; options override recipes.

    Raises:
        InputError: see `check_recipe`.
    """
    values: dict[str, Any] = {}
    for path, may_be_dataset in _recipe_files(args).items():
        values |= _flatten(check_recipe(path, modules, may_be_dataset))
    return values | option_values(args)


def option_values(args: Sequence[str]) -> dict[str, Any]:
    """Return the options of a command line by dotted key, their values read as YAML."""
    values: dict[str, Any] = {}
    for word, next_word in _with_next(args):
        if word.startswith("--"):
            key, has_value, value = word.removeprefix("--").partition("=")
            if not has_value:
                value = "" if next_word.startswith("--") else next_word
            values |= _flatten({key: read_value(value)})
    return values


def resume_command(args: Sequence[str], checkpoint: Path) -> str:
    """Return the command, quoted for the shell, that resumes a training from a checkpoint.

    `args` are those of the training.
    """
    rest, words = [], iter(args)
    for word in words:
        name, has_value, _ = word.partition("=")
        if name not in ("--resume", "--ckpt_path"):
            rest.append(word)
        elif not has_value:
            next(words, None)
    installed = shutil.which("yolo-lightning") is not None
    program = ["yolo-lightning"] if installed else [sys.executable, "-m", "yolo_lightning"]
    return shlex.join([*program, *rest, f"--ckpt_path={checkpoint}"])


def recipe_paths(args: Sequence[str]) -> list[str]:
    """Return the recipes passed with any spelling of `--config`."""
    return [path for path, may_be_dataset in _recipe_files(args).items() if not may_be_dataset]


def _recipe_files(args: Sequence[str]) -> dict[str, bool]:
    """Return YAML files on a command line; True for those that may be a dataset's."""
    files: dict[str, bool] = {}
    for word, next_word in _with_next(args):
        name, has_value, value = word.partition("=")
        if name in ("-c", "--recipe") or (len(name) > 2 and "--config".startswith(name)):
            files[value if has_value else next_word] = False
        elif word.startswith("-c"):
            files[word[2:]] = False
        elif word.endswith((".yaml", ".yml")) and Path(word).is_file():
            files.setdefault(word, True)
    return files


def _with_next(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    return itertools.zip_longest(args, args[1:], fillvalue="")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys; lists are not flattened."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


@dataclass
class Launch:
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
        nodes = _env_int(environment, "GROUP_WORLD_SIZE") or 1
        return Launch("torchrun", nodes, _env_int(environment, "LOCAL_WORLD_SIZE") or 1)
    is_interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    total = _env_int(environment, "SLURM_NTASKS")
    if total is None or is_interactive:
        return None
    nodes = (
        _env_int(environment, "SLURM_NNODES") or _env_int(environment, "SLURM_JOB_NUM_NODES") or 1
    )
    tasks = _env_int(environment, "SLURM_NTASKS_PER_NODE")
    if total > 1 and tasks is None:
        value = f"={total // nodes}" if total % nodes == 0 else ""
        raise InputError(
            f"the job has {total} tasks on {nodes} nodes, set by --ntasks; use SLURM's "
            f"--ntasks-per-node{value} instead"
        )
    tasks = tasks or 1
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
    gpu_count: Callable[[], int | None] | None = None,
) -> None:
    """Compare the launched processes with the devices and nodes of a recipe.

    `values` are from `check_command_line`; `gpu_count` returns the number of visible GPUs or None.

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
    if launch is not None:
        _check_job_size(launch, nodes, devices, options)
    elif (
        nodes is not None and nodes > 1 and not any(key in environment for key in _OTHER_LAUNCHERS)
    ):
        raise InputError(
            f"the recipe has trainer.num_nodes {nodes}, but this process was started by neither "
            "srun nor torchrun: start one on every node, or pass --trainer.num_nodes 1"
        )
    gpus = gpu_count() if gpu_count is not None and options["accelerator"] != "cpu" else None
    needs_gpus = options["accelerator"] in ("gpu", "cuda") or gpus
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
    on_node = _env_int(environment, "SLURM_GPUS_ON_NODE")
    if on_node is not None:
        return on_node
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
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    return value


def _device_count(devices: Any) -> int | None:
    """Return the number of devices; None for `auto`, -1 or a reference."""
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and re.fullmatch(r"[\d\s,]+", devices):
        return len([part for part in devices.split(",") if part.strip()])
    if isinstance(devices, int) and not isinstance(devices, bool) and devices > 0:
        return devices
    return None


def _env_int(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "").strip()
    return int(value) if value.isdigit() else None
