"""Datamodules of recipes, built without training."""

from collections.abc import Sequence

from jsonargparse import Namespace

from yolo_lightning.cli.recipe import RecipeCLI, quiet
from yolo_lightning.cli.recipe_errors import input_error_behind
from yolo_lightning.datamodules import CombinedDataModule
from yolo_lightning.errors import InputError


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
            raise input_error_behind(error) or error from None
        if not isinstance(built.data, CombinedDataModule):
            raise InputError(f"data is {config.data.class_path}; needed: CombinedDataModule")
        self.datamodule = built.data

    def _run_subcommand(self, subcommand: str) -> None:
        """Train nothing."""


def recipe_data(args: Sequence[str]) -> CombinedDataModule:
    """Return the datamodule of a recipe, not set up yet; see `DataCLI`."""
    return DataCLI(args).datamodule
