"""The images of an export: which ones to verify on, which ones to calibrate on; their batches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import InputError
from regraft.image_files import evenly
from regraft.wording import none_read, some_unread

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CALIBRATION = 128  # images, if no other number is given


class ImageBatches:
    """Preprocessed batches of image files, anew at each iteration.

    Files that cannot be read are named once on stderr and left out.
    """

    def __init__(self, paths: list[Path], preprocessing: Any, batch_size: int) -> None:
        self.paths, self.preprocessing, self.batch_size = paths, preprocessing, batch_size
        self.named: set[str] = set()

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        from regraft.pipeline import Failure, batches

        def name(failure: Failure) -> None:
            if failure.path not in self.named:
                self.named.add(failure.path)
                print(f"regraft: {failure.message}", file=sys.stderr)

        seen = 0
        for batch in batches(self.paths, self.preprocessing, self.batch_size, on_error=name):
            seen += len(batch.pixels)
            yield batch.pixels
        if not seen:
            raise InputError(none_read(len(self.paths)))

    def check_all(self) -> None:
        """Reads every file once.

        Raises:
            InputError: some cannot be read.
        """
        for _ in self:
            pass
        if self.named:
            raise InputError(
                f"{some_unread(len(self.named), len(self.paths))}; "
                "nothing was written; without --strict they are left out"
            )


def shared_out(paths: list[Path], args: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """The images to verify on and, for the variant kv, others to calibrate on.

    Verifying takes at most half of them there, so that neither lacks images.

    Raises:
        InputError: a single image for the variant kv.
    """
    if args.variant == "token":
        return evenly(paths, args.max_images), []
    if len(paths) < 2:
        raise InputError(
            f"--variant kv: {len(paths)} image came; expected at least 2, some to average the "
            "register over and others to verify on, and better 100 or more"
        )
    verified = evenly(paths, min(args.max_images, len(paths) // 2))
    taken = set(verified)
    others = [path for path in paths if path not in taken]
    return verified, evenly(others, args.calibration_images or CALIBRATION)
