"""What the check found, and its gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regraft.errors import GateError
from regraft.parity import LIMITS, Comparison
from regraft.redirect import RedirectOptions


@dataclass(frozen=True)
class Checked:
    """What the check found.

    Attributes:
        images: how many.
        image_size: (H, W).
        batch: images in one run.
        precision: of the file.
        parity: one comparison for each graph and output.
        changes: {output: relative difference the patch makes on these images}.
        left_out: outputs that read more than the images, with what they read.
    """

    images: int
    image_size: tuple[int, int]
    batch: int
    precision: str
    parity: tuple[Comparison, ...]
    changes: dict[str, float]
    left_out: dict[str, list[str]]

    @property
    def failures(self) -> list[str]:
        """One line per missed limit, and one if the check could have told nothing."""
        lines = [line for comparison in self.parity for line in comparison.failures]
        if not self.parity or not self.images:
            lines.append("nothing was compared")
        elif max(self.changes.values()) <= LIMITS["fp32"].relative_error:
            lines.append(
                "on these images the patch changes nothing by more than "
                f"{max(self.changes.values()):.1e}, so the unpatched file would pass too; give "
                "images with outlier tokens"
            )
        return lines

    @property
    def passed(self) -> bool:
        """Whether something was compared and every limit holds."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "passed": self.passed,
            "images": self.images,
            "image_size": list(self.image_size),
            "batch": self.batch,
            "parity": [comparison.to_json() for comparison in self.parity],
            "changes": self.changes,
            "left_out": self.left_out,
            "failures": self.failures,
        }

    def gate(self, options: RedirectOptions) -> None:
        """Raises GateError, naming every missed limit, unless the check passed.

        Args:
            options: of the redirect; a scale that may be the reason is named.
        """
        if self.failures:
            narrow = {c.graph for c in self.parity if not c.finite} == {"patched"}
            raise GateError(
                f"the patched graph is not equal to the method: {'; '.join(self.failures)}"
                f"{options.scale_cure(self.precision) if narrow else ''}; nothing was written"
            )
