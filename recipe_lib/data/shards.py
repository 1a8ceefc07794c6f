"""Files of a store's shards: each is there whole or not at all, and a record beside them says what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from recipe_lib.data.recipe import DataError

ROW_GROUP = 128  # recipes whose text is read together when one is asked for


def nested(starts: list[int], values: pa.Array) -> pa.ListArray:
    """Lists of values by where each begins, and the end of the last."""
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)


def finished(path: Path, made_from: str, folder: Path) -> dict | None:
    """The record of a shard that is there and made from the same."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text("utf-8"))
    return record if record["made_from"] == made_from and all((folder / f).is_file() for f in record["files"]) else None


def remove(folder: Path, wanted: Callable[[int], bool]) -> None:
    """Delete the shards with the wanted numbers."""
    # Records first: they vouch for the other files.
    for path in sorted(folder.glob("*/*.*"), key=lambda path: path.parent.name != "shards"):
        if path.name[:5].isdigit() and wanted(int(path.name[:5])):
            path.unlink()


def digest(*parts: str) -> str:
    """SHA-256 of some texts in order."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def parquet(table: pa.Table) -> bytes:
    """A Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ROW_GROUP, compression="zstd")
    return sink.getvalue()


def save(path: Path, data: bytes) -> str:
    """Write a file whole or not at all; its SHA-256."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror}); what is finished is kept") from None
    return hashlib.sha256(data).hexdigest()
