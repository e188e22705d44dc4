"""Features of any number of images in one file: ``.npz`` or ``.parquet``, by suffix.

Rows are appended batch by batch, so memory does not grow with the number of images; the file
appears once it is whole. Both forms hold the arrays of :meth:`regraft.features.Features.arrays`
under those names, and ``paths``, which says which row is which image.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from regraft.errors import InputError, how_to_install
from regraft.features import Floats
from regraft.files import scratch_folder, whole_file

DType = Literal["float32", "float16"]
DTYPES: tuple[str, ...] = get_args(DType)
SUFFIXES = (".npz", ".parquet")
PATHS = "paths"
_ROW_GROUP_BYTES = 1 << 25  # batches of small features are joined; thousands of groups read slowly
_COPY_BYTES = 1 << 22  # of one read while temporary files become the npz


class FeatureWriter(ABC):
    """Appends batches of rows. Every batch has the same arrays with the same row shapes.

    Attributes:
        rows: how many were appended.
        shapes: array name -> shape of one row; empty before the first batch.
    """

    def __init__(self, dtype: DType) -> None:
        self._dtype = np.dtype(dtype)
        self.rows = 0
        self.shapes: dict[str, tuple[int, ...]] = {}

    def append(self, arrays: Mapping[str, Floats], paths: Sequence[str]) -> None:
        """Appends B rows.

        Args:
            arrays: name -> (B, ...), float32.
            paths: the image of each row, B of them.

        Raises:
            InputError: a value does not fit the file's dtype.
        """
        shapes = {name: array.shape[1:] for name, array in arrays.items()}
        if not self.rows:
            self.shapes = shapes
        if shapes != self.shapes or any(len(a) != len(paths) for a in arrays.values()):
            raise ValueError(f"a batch of other arrays: {shapes} after {self.shapes}")
        self._append({name: self._cast(name, a) for name, a in arrays.items()}, list(paths))
        self.rows += len(paths)

    @abstractmethod
    def _append(self, arrays: Mapping[str, NDArray[Any]], paths: list[str]) -> None:
        """Writes rows that are already cast."""

    @abstractmethod
    def finish(self) -> None:
        """Completes the file."""

    @abstractmethod
    def close(self) -> None:
        """Closes what is open; also after a failure, and twice."""

    def _cast(self, name: str, array: Floats) -> NDArray[Any]:
        limit = float(np.finfo(self._dtype).max)
        if self._dtype != np.float32 and (worst := float(np.abs(array).max(initial=0.0))) > limit:
            raise InputError(
                f"{name} holds {worst:.6g}, and {self._dtype} ends at {limit:.6g}; "
                "use --dtype float32"
            )
        return np.ascontiguousarray(array, self._dtype)


@contextmanager
def feature_file(
    path: str | Path, dtype: DType = "float32", force: bool = False
) -> Iterator[FeatureWriter]:
    """Yields a writer; the file appears at ``path`` when the block ends well.

    Args:
        path: ends in ``.npz`` or ``.parquet``.
        dtype: of the arrays in the file.
        force: whether an existing file may be replaced.

    Raises:
        InputError: another suffix, a missing package, a full disk, or nothing was appended.
        OutputExistsError: it exists, and not ``force``.
    """
    suffix = check_suffix(path)
    with whole_file(path, force) as hidden, scratch_folder(hidden) as scratch:
        writer: FeatureWriter
        if suffix == ".npz":
            writer = NpzWriter(hidden, scratch, dtype)
        else:
            writer = ParquetWriter(hidden, dtype)
        with closing(writer):
            yield writer
            if not writer.rows:
                raise InputError(f"{path}: there are no features to write; no image could be read")
            writer.finish()


def check_suffix(path: str | Path) -> str:
    """The suffix of a features file, in lower case.

    Raises:
        InputError: it is neither ``.npz`` nor ``.parquet``, or a package for it is missing.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: ends in {suffix!r}; expected {' or '.join(SUFFIXES)}")
    if suffix == ".parquet":
        _pyarrow()
    return suffix


class NpzWriter(FeatureWriter):
    """Writes ``.npz``: rows go to one scratch file per array, which become the archive at the end.

    The archive is not compressed (features hardly shrink) and ``numpy.load`` reads it without
    pickle. The same features give the same bytes.
    """

    def __init__(self, file: Path, scratch: Path, dtype: DType) -> None:
        super().__init__(dtype)
        self._file, self._scratch = file, scratch
        self._paths: list[str] = []
        self._open: dict[str, BinaryIO] = {}

    def _append(self, arrays: Mapping[str, NDArray[Any]], paths: list[str]) -> None:
        for name, array in arrays.items():
            if name not in self._open:
                self._open[name] = (self._scratch / name).open("wb")
            self._open[name].write(array.data)
        self._paths += paths

    def finish(self) -> None:
        """Copies the scratch files into one archive, each removed once copied."""
        self.close()
        with zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, shape in self.shapes.items():
                with (
                    (self._scratch / name).open("rb") as source,
                    _member(archive, name, self._dtype, (self.rows, *shape)) as target,
                ):
                    shutil.copyfileobj(source, target, _COPY_BYTES)
                (self._scratch / name).unlink()
            paths = np.array(self._paths)
            with _member(archive, PATHS, paths.dtype, paths.shape) as target:
                target.write(paths.tobytes())

    def close(self) -> None:
        """Closes the scratch files."""
        for file in self._open.values():
            file.close()


class ParquetWriter(FeatureWriter):
    """Writes ``.parquet``: one row per image, each array a fixed-size list in row-major order.

    The shape of one row is JSON in the metadata of its column, ``shape``.
    """

    def __init__(self, file: Path, dtype: DType) -> None:
        super().__init__(dtype)
        # Opened here rather than by pyarrow, so that a full disk is an OSError with its number.
        self._file = file.open("wb")
        self._writer: Any = None
        self._waiting: list[Any] = []
        self._waiting_bytes = 0

    def _append(self, arrays: Mapping[str, NDArray[Any]], paths: list[str]) -> None:
        pa, pq = _pyarrow()
        columns = {PATHS: pa.array([_utf8(path) for path in paths], pa.string())}
        fields = [pa.field(PATHS, pa.string(), nullable=False)]
        for name, array in arrays.items():
            # A copy where the batch is a view of larger arrays is already made by the cast.
            lists = pa.FixedSizeListArray.from_arrays(array.reshape(-1), array[0].size)
            shape = json.dumps(list(array.shape[1:]))
            fields.append(pa.field(name, lists.type, nullable=False, metadata={"shape": shape}))
            columns[name] = lists
        batch = pa.table(list(columns.values()), schema=pa.schema(fields))
        if self._writer is None:
            # Neither compression nor dictionaries shrink floats; both cost time.
            self._writer = pq.ParquetWriter(
                self._file, batch.schema, compression="none", use_dictionary=False
            )
        self._waiting.append(batch)
        self._waiting_bytes += batch.nbytes
        if self._waiting_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        pa, _ = _pyarrow()
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
        self._waiting, self._waiting_bytes = [], 0

    def finish(self) -> None:
        """Writes the last row group and the footer."""
        self._flush()
        self._writer.close()

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None and self._writer.is_open:
            # Not finished: an error is on its way, and pyarrow, left open, would add its own when
            # it is collected.
            with suppress(Exception):
                self._writer.close()
            self._writer.is_open = False
        self._file.close()


@contextmanager
def _member(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> Iterator[Any]:
    """Opens ``name.npy`` in an archive, its header written, its data to follow."""
    # A ZipInfo made by hand bears no date.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as target:
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(target, header)
        yield target


def _utf8(path: str) -> str:
    # File names are bytes to Linux; those that are no UTF-8 have no other way into Parquet.
    return path.encode("utf-8", "backslashreplace").decode()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(
            ".parquet needs pyarrow, which is not installed; write .npz, or "
            f"{how_to_install('regraft-runtime', 'parquet')}"
        ) from None
    return pa, pq
