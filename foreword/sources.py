"""Where rows come from: JSONL, CSV and Parquet files, data sets, or any iterable; each raw row with its place."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import DataError

__all__ = ["raw_rows"]


def raw_rows(data: str | Path | Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Each raw row with where it stands; a `DataError` in place of a row that cannot be parsed."""
    if not isinstance(data, str | Path):
        yield from ((f"row {i}", row) for i, row in enumerate(data, 1))
        return
    path = Path(data)
    if not path.exists():
        if path.suffix or path.is_absolute():
            raise DataError(f"{path}: no such file. Expected a .jsonl, .csv or .parquet file, or a data set's name.")
        yield from _from_datasets(str(data))
    elif path.suffix in (".jsonl", ".ndjson"):
        yield from _from_jsonl(path)
    elif path.suffix == ".csv":
        yield from _from_csv(path)
    elif path.suffix == ".parquet":
        yield from _from_datasets("parquet", data_files=str(path))
    else:
        raise DataError(
            f"{path}: cannot tell the format of a {path.suffix or 'nameless'} file. Use .jsonl, .csv or .parquet."
        )


def _from_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            yield where, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield where, DataError(f"{where}: not UTF-8 (byte {error.start} of the line).")
        except json.JSONDecodeError as error:
            yield where, DataError(f"{where}: not JSON ({error.msg} at column {error.colno}).")


def _from_csv(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8. Save the file as UTF-8.") from None
    reader = csv.DictReader(text.splitlines(keepends=True))
    for raw in reader:
        fields = {k: v for k, v in raw.items() if k is not None and v is not None}
        yield f"{path}:{reader.line_num}", fields


def _from_datasets(name: str, **options: Any) -> Iterator[tuple[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, split = name.partition(":")
    try:
        loaded = datasets.load_dataset(name, split=split or "train", **options)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{options.get('data_files', name)}: cannot be loaded by the datasets library: {error}"
        ) from None
    where = options.get("data_files", name)
    yield from ((f"{where}, row {i}", raw) for i, raw in enumerate(loaded, 1))
