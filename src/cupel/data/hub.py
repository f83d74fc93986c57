"""Data sets of the Hugging Face hub, through the optional package `datasets`."""

from __future__ import annotations

from typing import Any

from cupel.data.parquet import from_table
from cupel.data.stored import Listing
from cupel.errors import DataError, MissingExtra

__all__ = ["hub_splits", "read_hub"]


def read_hub(name: str, split: str) -> Listing:
    """List the images of `hf:OWNER/NAME` or `hf:OWNER/NAME:CONFIGURATION`. No code of the repository is run.

    Raises:
        DataError: not there, no network, no such split, or no images.
        MissingExtra: `datasets` is not installed.
    """
    source, configuration = _parts(name)
    datasets = _package(name)
    try:
        made = datasets.load_dataset(source, configuration, split=split)
        for column, feature in made.features.items():
            if isinstance(feature, datasets.Image):
                made = made.cast_column(column, datasets.Image(decode=False))
        table = made.with_format("arrow")[:]
        # rows chosen or reordered lose the metadata, so the features are written down again
        table = table.replace_schema_metadata(made.features.arrow_schema.metadata)
    except Exception as error:  # the package raises what its many backends raise
        raise _unavailable(name, split, error) from error
    return from_table(table, name, name)


def hub_splits(name: str) -> tuple[str, ...]:
    """Names of the splits.

    Raises:
        DataError, MissingExtra: as `read_hub`.
    """
    source, configuration = _parts(name)
    datasets = _package(name)
    try:
        return tuple(map(str, datasets.get_dataset_split_names(source, configuration)))
    except Exception as error:  # as above
        raise _unavailable(name, "", error) from error


def _parts(name: str) -> tuple[str, str | None]:
    source, _, configuration = name.removeprefix("hf:").partition(":")
    if not source:
        raise DataError(name, "names no data set", "write hf:OWNER/NAME")
    return source, configuration or None


def _package(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(name, "datasets", "hub") from error
    return datasets


def _unavailable(name: str, split: str, error: Exception) -> DataError:
    reason = (str(error) or type(error).__name__).strip().splitlines()[0][:160]
    part = f"its split '{split}' " if split else ""
    return DataError(name, f"{part}cannot be had from the hub ({reason})", "check name, split and network")
