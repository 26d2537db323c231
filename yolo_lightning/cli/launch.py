"""The command line and the cluster, compared with the recipe before anything heavy is imported."""

import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_lightning.cli.recipe_check import OPTION, check_option, check_recipe, is_dotted
from yolo_lightning.errors import InputError

_ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*(\w+)\s*(?:,([^}]*))?\}")
# of Lightning's other environments, which are not compared
_LAUNCHERS = ("MASTER_ADDR", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def split_allowed(args: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return a command line without `--allow-module`, and the prefixes that it gave.

    Raises:
        InputError: no prefix, or one that is no dotted name.
    """
    rest, prefixes, words = [], [], iter(args)
    for word in words:
        name, given, value = word.partition("=")
        if name != OPTION:
            rest.append(word)
            continue
        prefix = value if given else next(words, "")
        if not is_dotted(prefix) or prefix.split(".")[0] == "jsonargparse":
            raise InputError(f"{OPTION} {prefix!r}; expected a module such as my_package.models")
        prefixes.append(prefix)
    return rest, tuple(prefixes)


def check_command_line(args: Sequence[str], allowed: Sequence[str] = ()) -> dict[str, Any]:
    """Check the recipes and the options of a command that takes a recipe.

    Args:
        args: after the command's name.
        allowed: prefixes of modules that a recipe may name beside the usual ones.

    Returns:
        Values by dotted key, `trainer.devices` for one; the command line's above the recipes'.

    Raises:
        InputError: see `check_recipe` and `check_option`.
    """
    values: dict[str, Any] = {}
    for recipe, or_dataset in _recipes_in(args).items():
        values |= _flat(check_recipe(recipe, allowed, or_dataset))
    for word, following in itertools.zip_longest(args, args[1:], fillvalue=""):
        if word.startswith("--"):
            key, given, value = word.removeprefix("--").partition("=")
            if not given:
                value = "" if following.startswith("--") else following
            values |= _flat({key: check_option(key, value, allowed)})
    return values


def _recipes_in(args: Sequence[str]) -> dict[str, bool]:
    """Return the files that an option names as recipes, and YAML that may be a dataset's."""
    found: dict[str, bool] = {}
    for word, following in itertools.zip_longest(args, args[1:], fillvalue=""):
        name, given, value = word.partition("=")
        if name in ("-c", "--recipe") or (len(name) > 2 and "--config".startswith(name)):
            found[value if given else following] = False
        elif word.startswith("-c"):
            found[word[2:]] = False
        elif word.endswith((".yaml", ".yml")) and Path(word).is_file():
            found.setdefault(word, True)
    return found


def recipes_named(args: Sequence[str]) -> list[str]:
    """Return the files that `--config`, in whatever form, names as recipes."""
    return [path for path, or_dataset in _recipes_in(args).items() if not or_dataset]


def _flat(held: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return values by dotted key; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in held.items():
        name = f"{above}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


@dataclass
class Launch:
    """What started this process, and how many like it.

    Args:
        by: SLURM or torchrun.
        nodes: of the job.
        tasks: processes on each node.
    """

    by: str
    nodes: int
    tasks: int


def launch_of(environment: Mapping[str, str]) -> Launch | None:
    """Return what started this process, looked for in Lightning's order; None for neither.

    Raises:
        InputError: SLURM counts tasks in a way that Lightning cannot use, or `srun` was left out.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        nodes = _number(environment, "GROUP_WORLD_SIZE") or 1
        return Launch("torchrun", nodes, _number(environment, "LOCAL_WORLD_SIZE") or 1)
    by_hand = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    total = _number(environment, "SLURM_NTASKS")
    if total is None or by_hand:
        return None
    nodes = _number(environment, "SLURM_NNODES") or _number(environment, "SLURM_JOB_NUM_NODES") or 1
    tasks = _number(environment, "SLURM_NTASKS_PER_NODE")
    if total > 1 and tasks is None:
        each = f"={total // nodes}" if total % nodes == 0 else ""
        raise InputError(
            f"the job has {total} tasks on {nodes} nodes, counted by --ntasks; ask SLURM for "
            f"--ntasks-per-node{each} instead"
        )
    tasks = tasks or 1
    if total != nodes * tasks:
        raise InputError(
            f"srun started {total} tasks, and the job has {nodes} nodes x {tasks} tasks: leave out "
            "srun's own -n"
        )
    # slurmd sets its node's name for batch scripts too; only srun counts steps
    if total > 1 and "SLURMD_NODENAME" in environment and "SLURM_STEP_ID" not in environment:
        raise InputError(
            f"the job has {nodes} nodes x {tasks} tasks, and this is one process outside of them: "
            "put srun before the command"
        )
    return Launch("SLURM", nodes, tasks)


def check_launch(
    values: Mapping[str, Any],
    environment: Mapping[str, str],
    gpu_count: Callable[[], int | None] | None = None,
) -> None:
    """Compare how processes were started with the devices and nodes of a recipe.

    Args:
        values: by dotted key, see `check_command_line`.
        environment: of the process.
        gpu_count: returns how many GPUs this process sees, None where that is not known.

    Raises:
        InputError: tasks, devices or nodes differ, with both numbers and what to change.
    """
    known = {
        name: resolved(values.get(f"trainer.{name}", usual), environment)
        for name, usual in (("num_nodes", 1), ("devices", "auto"), ("accelerator", "auto"))
    }
    nodes = known["num_nodes"] if isinstance(known["num_nodes"], int) else None
    devices = _count(known["devices"])
    if devices is None and (known["devices"], known["accelerator"]) == ("auto", "cpu"):
        devices = 1
    launch = launch_of(environment)
    if launch is not None:
        _compare(launch, nodes, devices, known)
    elif nodes is not None and nodes > 1 and not any(name in environment for name in _LAUNCHERS):
        raise InputError(
            f"the recipe says trainer.num_nodes {nodes}, and neither srun nor torchrun started "
            "this process: start one on every node, or pass --trainer.num_nodes 1"
        )
    seen = gpu_count() if gpu_count is not None and known["accelerator"] != "cpu" else None
    wants_gpus = known["accelerator"] in ("gpu", "cuda") or seen
    if seen is not None and wants_gpus and (devices or 1) > seen:
        hint = f"pass --trainer.devices {seen}" if seen else "pass --trainer.accelerator cpu"
        if launch is not None and launch.by == "SLURM" and seen:
            hint += f", or give every task all GPUs of its node, --gres=gpu:{devices}"
        raise InputError(
            f"the recipe says trainer.devices {known['devices']}, and this process sees "
            f"{seen} GPU{'' if seen == 1 else 's'}: {hint}"
        )


def _compare(
    launch: Launch, nodes: int | None, devices: int | None, known: Mapping[str, Any]
) -> None:
    """Refuse nodes or devices other than those that were started."""
    change = []
    if nodes is not None and nodes != launch.nodes:
        change.append(f"--trainer.num_nodes {launch.nodes}")
    if devices is not None and devices != launch.tasks:
        change.append(f"--trainer.devices {launch.tasks}")
    if change:
        plural = "" if launch.nodes == 1 else "s"
        raise InputError(
            f"the job has {launch.nodes} node{plural} x {launch.tasks} tasks (by {launch.by}), the "
            f"recipe says trainer.num_nodes {known['num_nodes']}, trainer.devices "
            f"{known['devices']}: pass {' '.join(change)}, or ask for another job"
        )


def visible_gpus(environment: Mapping[str, str]) -> int | None:
    """Return how many of NVIDIA's GPUs a process may see, without asking their driver.

    Args:
        environment: of the process.

    Returns:
        None where nothing tells. MIG's parts count as what the environment lists.
    """
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = [name.strip() for name in listed.split(",")]
        valid = itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), names)
        return len(list(valid))
    on_node = _number(environment, "SLURM_GPUS_ON_NODE")
    if on_node is not None:
        return on_node
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return None


def resolved(value: Any, environment: Mapping[str, str]) -> Any:
    """Return a value with what the environment gives for it; references stay texts."""
    found = _ENVIRONMENT.fullmatch(value.strip()) if isinstance(value, str) else None
    if found:
        value = environment.get(found[1], found[2] or "").strip()
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    return value


def _count(devices: Any) -> int | None:
    """Return how many devices a value names; None for all of them, or a reference."""
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and re.fullmatch(r"[\d\s,]+", devices):
        return len([part for part in devices.split(",") if part.strip()])
    if isinstance(devices, int) and not isinstance(devices, bool) and devices > 0:
        return devices
    return None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "").strip()
    return int(value) if value.isdigit() else None
