"""Features as Parquet: one row per image, the same schema wherever regraft writes it.

=========  ==============================================================================
column     holds
=========  ==============================================================================
``paths``  the image, as it was named; string, never null
features   one column per array (``cls``, ``patches``, ...): a fixed-size list of float32 or
           float16 in row-major order, null where the image could not be read; the shape of
           one row is JSON in the column's metadata, ``shape``
``error``  why the image could not be read; null where it could
=========  ==============================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regraft.errors import InputError, how_to_install
from regraft.rows import Rows

PATHS, ERROR = "paths", "error"
_ROW_GROUP_BYTES = 1 << 25  # batches of small features are joined; thousands of groups read slowly


class ParquetFile:
    """A Parquet file that is being written. Row groups are flushed as they fill.

    Attributes:
        schema: pyarrow's schema.
    """

    def __init__(
        self,
        file: Path,
        dtype: str,
        shapes: Mapping[str, tuple[int, ...]],
        about: Mapping[str, str] | None = None,
    ) -> None:
        """Opens it.

        Args:
            file: the path to write at.
            dtype: of the features, float32 or float16.
            shapes: array name -> shape of one row.
            about: metadata of the file.
        """
        _, pq = require_pyarrow()
        self.schema = _schema(dtype, shapes, about)
        # Opened here rather than by pyarrow, so that a full disk is an OSError with its number.
        self._file = file.open("wb")
        # Neither compression nor dictionaries shrink floats; both cost time.
        self._writer: Any = pq.ParquetWriter(
            self._file, self.schema, compression="none", use_dictionary=False
        )
        self._waiting: list[Any] = []
        self._waiting_bytes = 0

    def append(self, rows: Rows, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Appends rows, their features cast to the file's dtype: name -> (G, ...)."""
        batch = _table(self.schema, rows, arrays)
        self._waiting.append(batch)
        self._waiting_bytes += batch.nbytes
        if self._waiting_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def finish(self) -> None:
        """Writes the last row group and the footer."""
        self._flush()
        self._writer.close()

    def close(self) -> None:
        """Closes what is open; also after a failure, and twice."""
        if self._writer.is_open:
            # Not finished: an error is on its way, and pyarrow, left open, would add its own when
            # it is collected.
            with suppress(Exception):
                self._writer.close()
            self._writer.is_open = False
        self._file.close()

    def _flush(self) -> None:
        pa, _ = require_pyarrow()
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
        self._waiting, self._waiting_bytes = [], 0


def require_pyarrow() -> tuple[Any, Any]:
    """The modules ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        InputError: they are not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(
            ".parquet needs pyarrow, which is not installed; write .npz, or "
            f"{how_to_install('regraft-runtime', 'parquet')}"
        ) from None
    return pa, pq


def _schema(
    dtype: str, shapes: Mapping[str, tuple[int, ...]], about: Mapping[str, str] | None
) -> Any:
    pa, _ = require_pyarrow()
    element = pa.from_numpy_dtype(np.dtype(dtype))
    fields = [pa.field(PATHS, pa.string(), nullable=False)]
    for name, shape in shapes.items():
        lists = pa.list_(element, int(np.prod(shape)))
        fields.append(pa.field(name, lists, metadata={"shape": json.dumps(list(shape))}))
    return pa.schema([*fields, pa.field(ERROR, pa.string())], metadata=dict(about or {}))


def _table(schema: Any, rows: Rows, arrays: Mapping[str, NDArray[Any]]) -> Any:
    pa, _ = require_pyarrow()
    columns = [pa.array([_utf8(path) for path in rows.paths], pa.string())]
    good = np.array([error is None for error in rows.errors])
    for field in schema:
        if field.name in (PATHS, ERROR):
            continue
        if not good.any():
            columns.append(pa.nulls(len(rows), field.type))
            continue
        # A copy where the batch is a view of larger arrays is already made by the cast.
        flat = pa.array(arrays[field.name].reshape(-1))
        lists = pa.FixedSizeListArray.from_arrays(flat, type=field.type)
        if not good.all():
            taken = pa.array(np.where(good, np.cumsum(good) - 1, 0), mask=~good)
            lists = lists.take(taken)
        columns.append(lists)
    errors = [None if error is None else _utf8(error) for error in rows.errors]
    return pa.table([*columns, pa.array(errors, pa.string())], schema=schema)


def _utf8(path: str) -> str:
    # File names are bytes to Linux; those that are no UTF-8 have no other way into Parquet.
    return path.encode("utf-8", "backslashreplace").decode()
