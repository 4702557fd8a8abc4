"""Opens splits of TFDS datasets for random access, without TensorFlow."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from realm_retro.errors import UserError


def open_split(
    name: str, split: str, *, data_dir: str, setting: str, dir_setting: str
) -> Any:
    """The records of a split, a sequence of dicts; prepares a dataset that is not yet.

    Args:
      name: of the dataset, with its config: ``trivia_qa/unfiltered.nocontext``.
      split: or a slice of it, ``train[:100]``.
      data_dir: where datasets are; TFDS's own default if empty.
      setting: what the user wrote the name into, for errors.
      dir_setting: likewise for `data_dir`.

    Raises:
      UserError: the dataset cannot be had, or has no such split.
    """
    what = f"{setting}: the TFDS dataset {name!r}"
    try:
        builder: Any = tfds.builder(name, data_dir=data_dir or None, try_gcs=False)
    except (ValueError, tfds.core.DatasetNotFoundError) as error:
        raise UserError(f"{what} is not known ({_first_line(error)})") from None
    if not builder.is_prepared():
        try:
            builder.download_and_prepare(file_format="array_record")
        except Exception as error:  # whatever its own download code may raise
            raise UserError(
                f"{what} could not be prepared ({_first_line(error)}); prepare it"
                f" elsewhere with file_format='array_record' and set {dir_setting}"
            ) from error
    try:
        return builder.as_data_source(split)
    except NotImplementedError:
        raise UserError(
            f"{what} in {builder.data_dir} is not in array_record; prepare it with"
            f" file_format='array_record' in another folder and set {dir_setting}"
        ) from None
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{what} has no split {split!r} ({_first_line(error)}); it has:"
            f" {', '.join(builder.info.splits)}"
        ) from None


def plain(value: Any) -> Any:
    """A record's value with text as str, and arrays and sequences as lists.

    Raises:
      UnicodeDecodeError: text is not UTF-8.
    """
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
