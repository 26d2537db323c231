"""Restoring the state of a training from a checkpoint that nobody may have checked."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from yolo_lightning.errors import InputError

_PATHS = ("kth_best_model_path", "last_model_path")
_ERRORS = (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError)


def check_removable_paths(callbacks: Mapping[str, Any]) -> None:
    """Check the files that `ModelCheckpoint` removes once there are better ones.

    Lightning would remove files and whole folders to which a checkpoint's paths lead by ``..``.

    Raises:
        InputError: one is not a checkpoint in the folder of the callback.
    """
    for state in callbacks.values():
        if not isinstance(state, Mapping) or "best_model_path" not in state:
            continue
        folder = Path(str(state.get("dirpath"))).resolve()
        paths = [*state.get("best_k_models", ()), *(state.get(name) for name in _PATHS)]
        for path in filter(None, paths):
            resolved = Path(str(path)).resolve()
            if "dirpath" not in state or folder not in resolved.parents or resolved.is_dir():
                raise InputError(
                    f"the checkpoint calls {str(path)[:300]!r} one of the best checkpoints; "
                    f"allowed: files in {folder}"
                )


def name_restore_errors(trainer: pl.Trainer) -> None:
    """Let errors of restoring the state of a training name the checkpoint, as `InputError`."""
    connector = trainer._checkpoint_connector
    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        setattr(connector, name, _named(getattr(connector, name), trainer))


def _named(restore: Callable[..., None], trainer: pl.Trainer) -> Callable[..., None]:
    def restore_or_fail(*args: Any, **options: Any) -> None:
        try:
            restore(*args, **options)
        except (InputError, torch.OutOfMemoryError):
            raise
        except _ERRORS as error:
            if not trainer.ckpt_path:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise InputError(
                f"{trainer.ckpt_path}: the state of its training cannot be restored ({reason}); "
                "to start from its weights, use model.pretrained"
            ) from None

    return restore_or_fail
