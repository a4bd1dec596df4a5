"""Reads columns of JSONL and parquet files row by row."""

import difflib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_oprd.errors import UserError

_PARQUET_ROWS_AT_ONCE = 1024

logger = logging.getLogger(__name__)


def read_rows(
    file: Path,
    keys: Sequence[str],
    *,
    setting: str,
    key_settings: Sequence[str],
    not_read: Sequence[str] = (),
) -> Iterator[tuple[str, list[Any]]]:
    """Reads a file row by row; there is at least one row.

    Args:
        file: ``.jsonl`` (one object per line) or ``.parquet``.
        keys: Columns, or fields in a column, as in ``reward_model.ground_truth``.
        setting: The setting that names the file, for messages.
        key_settings: The setting that names each key, for messages.
        not_read: Columns that other tools would read; a warning says that they are ignored.

    Yields:
        The row, for messages, and the keys' values.

    Raises:
        UserError: The file is missing, unreadable or empty, or a row lacks a key.
    """
    readers = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    if file.suffix not in readers:
        raise UserError(f"{setting}: {file} is not a prompt file; give .jsonl or .parquet files")
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"{setting}: {file} {found}; give .jsonl or .parquet files")
    columns = [*(key.split(".")[0] for key in keys), *not_read]
    any_row = has_warned = False
    try:
        for where, row in readers[file.suffix](file, columns, setting):
            any_row = True
            ignored = [name for name in not_read if row.get(name) not in (None, [], "")]
            if ignored and not has_warned:
                has_warned = True
                logger.warning(
                    "%s has the columns %s, which are not read; rows are used as they are",
                    where,
                    ignored,
                )
            named = zip(keys, key_settings, strict=True)
            yield where, [_value(row, key, where, of_key) for key, of_key in named]
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{setting}: cannot read {file}: {text}") from error
    if not any_row:
        raise UserError(f"{setting}: {file} has no rows; give a file with at least one prompt")


def _jsonl_rows(
    file: Path, columns: Sequence[str], setting: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    # Some editors put a byte order mark at the start.
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            # Besides invalid JSON: Python limits the digits of numbers and the depth of lists.
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{setting}: {where} is not JSON that can be read ({error}); each line must "
                    "be one object"
                ) from error
            if not isinstance(row, dict):
                raise UserError(
                    f"{setting}: {where} is a JSON {type(row).__name__}; each line must be one "
                    f"object with the key {columns[0]!r}"
                )
            yield where, row


def _parquet_rows(
    file: Path, columns: Sequence[str], setting: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    with pq.ParquetFile(file) as table:
        names = table.schema_arrow.names
        there = sorted(set(columns) & set(names))
        if columns[0] not in names:
            yield str(file), dict.fromkeys(names)  # the caller finds what is missing
        number = 0
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS_AT_ONCE, columns=there):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row


def _value(row: dict[str, Any], key: str, where: str, setting: str) -> Any:
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            if not isinstance(value, dict):
                raise UserError(
                    f"{setting} is {key!r}, but {where} has {value!r} there, which has no fields; "
                    "give the key of a text"
                )
            nearest = difflib.get_close_matches(part, value, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise UserError(
                f"{setting} is {key!r}, but {where} has only {', '.join(map(repr, value))}{hint}"
            )
        value = value[part]
    return value
