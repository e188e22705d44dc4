"""Features of any number of images in one file: ``.npz`` or ``.parquet``, by suffix.

Rows are appended batch by batch, so memory does not grow with the number of images; the file
appears once it is whole. Both forms hold the arrays of :meth:`regraft.features.Features.arrays`
under those names, and ``paths``, which says which row is which image. An image that cannot be read
has a row in ``.parquet`` alone, with the reason in ``error``.
"""

from __future__ import annotations

import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from regraft.errors import InputError
from regraft.features import Floats
from regraft.files import scratch_folder, whole_file
from regraft.parquet_files import PATHS, ParquetFile, require_pyarrow
from regraft.rows import Rows
from regraft.wording import none_read

DType = Literal["float32", "float16"]
DTYPES: tuple[str, ...] = get_args(DType)
SUFFIXES = (".npz", ".parquet")
_COPY_BYTES = 1 << 22  # of one read while temporary files become the npz


class FeatureWriter(ABC):
    """Appends batches of rows. Every batch has the same arrays with the same row shapes.

    Attributes:
        rows: how many with features were appended.
        images: how many in all, with those that could not be read.
        shapes: array name -> shape of one row; empty before the first batch.
    """

    def __init__(self, dtype: DType) -> None:
        self._dtype = np.dtype(dtype)
        self.rows = self.images = 0
        self.shapes: dict[str, tuple[int, ...]] = {}

    def append(self, rows: Rows) -> None:
        """Appends rows.

        Raises:
            InputError: a value does not fit the file's dtype.
        """
        good = rows.errors.count(None)
        shapes = {name: array.shape[1:] for name, array in rows.arrays.items()}
        others = good and self.shapes and shapes != self.shapes
        if others or any(len(array) != good for array in rows.arrays.values()):
            raise ValueError(f"a batch of other arrays: {shapes} after {self.shapes}")
        arrays = {name: self._cast(name, array) for name, array in rows.arrays.items()}
        if good:
            self.shapes = shapes
        self._append(rows, arrays)
        self.rows += good
        self.images += len(rows)

    @abstractmethod
    def _append(self, rows: Rows, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes rows; the arrays are theirs, cast."""

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

    Whoever appends rows without features says why they have none: the error about a file without
    any refers to that.

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
                why = f"; {none_read(writer.images)}" if writer.images else ""
                raise InputError(f"{path}: there are no features to write{why}")
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
        require_pyarrow()
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

    def _append(self, rows: Rows, arrays: Mapping[str, NDArray[Any]]) -> None:
        for name, array in arrays.items():
            if name not in self._open:
                self._open[name] = (self._scratch / name).open("wb")
            self._open[name].write(array.data)
        self._paths += [
            path for path, error in zip(rows.paths, rows.errors, strict=True) if error is None
        ]

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
    """Writes ``.parquet``, as :mod:`regraft.parquet_files` says; images without features too."""

    def __init__(
        self,
        file: Path,
        dtype: DType,
        about: Mapping[str, str] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Starts a file.

        Args:
            file: where to write.
            dtype: of the features.
            about: metadata of the file.
            shapes: array name -> shape of one row; None takes them from the first batch.
        """
        super().__init__(dtype)
        self._path, self._about = file, about
        self._file: ParquetFile | None = None
        if shapes is not None:
            self.shapes = dict(shapes)
            self._file = ParquetFile(file, dtype, self.shapes, about)

    def _append(self, rows: Rows, arrays: Mapping[str, NDArray[Any]]) -> None:
        if self._file is None:
            self._file = ParquetFile(self._path, self._dtype.name, self.shapes, self._about)
        self._file.append(rows, arrays)

    def finish(self) -> None:
        """Writes the last row group and the footer."""
        if self._file is None:
            raise ValueError("nothing was appended, and the shapes are not known")
        self._file.finish()

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
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
