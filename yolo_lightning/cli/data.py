"""Build the datamodule of a recipe without a model or a trainer."""

from collections.abc import Sequence

from jsonargparse import Namespace

from yolo_lightning.cli.recipe import RecipeCLI, silence_libraries
from yolo_lightning.cli.recipe_errors import find_input_error
from yolo_lightning.datamodules import CombinedDataModule
from yolo_lightning.errors import InputError


class DataCLI(RecipeCLI):
    """Parse a recipe and options, and build the datamodule only; no folder is created.

    With a checkpoint, the recipe need not repeat what the checkpoint holds, as for `test`.
    """

    datamodule: CombinedDataModule

    def __init__(self, args: Sequence[str], checkpoint: str | None = None) -> None:
        silence_libraries()
        evaluated = [f"--ckpt_path={checkpoint}"] if checkpoint else []
        super().__init__(["test" if checkpoint else "fit", "--config", *args, *evaluated])
        self.recipe: Namespace = self.config[self.config.subcommand]

    def before_instantiate_classes(self) -> None:
        """Do nothing: there is no run folder."""

    def _set_seed(self) -> None:
        """Do not seed global generators: the datamodule has its own seed."""

    def instantiate_classes(self) -> None:
        """Build the datamodule."""
        command = self.config.subcommand
        config = self.config[command]
        try:
            objects = self._parser(command).instantiate_classes(Namespace(data=config.data))
        except Exception as error:
            raise find_input_error(error) or error from None
        if not isinstance(objects.data, CombinedDataModule):
            raise InputError(f"data is {config.data.class_path}; allowed: CombinedDataModule")
        self.datamodule = objects.data

    def _run_subcommand(self, subcommand: str) -> None:
        """Do not train."""


def recipe_data(args: Sequence[str], checkpoint: str | None = None) -> CombinedDataModule:
    """Return the datamodule of a recipe, not set up yet; see `DataCLI`."""
    return DataCLI(args, checkpoint).datamodule
