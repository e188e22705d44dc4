"""The constants of the variant ``kv`` as numbers: one key and value per head for each attention."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regraft.constants import FILE
from regraft.errors import BundleError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class RegisterConstants:
    """What stands in for the test-time registers in attention.

    Attributes:
        keys: {block: (heads, R, head size)} float32, as the scores are computed from them: behind
            any norm or rotation, before the factor that scales the scores.
        values: {block: (heads, R, head size)} float32; the same blocks.
    """

    keys: Mapping[int, Floats]
    values: Mapping[int, Floats]

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that have constants, ascending."""
        return tuple(sorted(self.keys))

    def from_block(self, first: int) -> RegisterConstants:
        """Those of the blocks from ``first`` on."""
        layers = [i for i in self.layers if i >= first]
        return RegisterConstants(
            {i: self.keys[i] for i in layers}, {i: self.values[i] for i in layers}
        )

    def save(self, folder: Path) -> None:
        """Writes :data:`regraft.constants.FILE`; equal constants give equal bytes."""
        arrays = {f"key.{i}": self.keys[i] for i in self.layers}
        arrays |= {f"value.{i}": self.values[i] for i in self.layers}
        stream = io.BytesIO()
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # its stub takes any name for a flag
        (folder / FILE).write_bytes(stream.getvalue())

    @classmethod
    def load(cls, folder: Path) -> RegisterConstants:
        """Reads what :meth:`save` wrote.

        Raises:
            BundleError: it cannot be read.
        """
        keys: dict[int, Floats] = {}
        values: dict[int, Floats] = {}
        try:
            with np.load(folder / FILE, allow_pickle=False) as arrays:
                for name in arrays.files:
                    kind, _, layer = name.partition(".")
                    {"key": keys, "value": values}[kind][int(layer)] = arrays[name]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise BundleError(f"{folder / FILE}: cannot be read ({error}); export again") from None
        return cls(keys, values)
