"""Every place of a Vision Transformer in one foreign file; refuses what is none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regraft.errors import ModelError
from regraft.tokens import TokenLayout
from regraft_export.foreign.entry import Entry, find_entry
from regraft_export.foreign.mlp import ATTENTION, Mlp
from regraft_export.foreign.reach import Reach
from regraft_export.foreign.shapes import Shapes
from regraft_export.foreign.stacks import Stack, choose, find_stacks
from regraft_export.foreign.trial import Image, walk
from regraft_export.graph.drop_neutral_mask import Dropped, drop_neutral_mask
from regraft_export.onnx_file.read import OnnxFile
from regraft_export.onnx_file.view import View, view

MIN_OPSET = 13
MARK = "regraft"  # key of the model's metadata in a patched file


@dataclass(frozen=True)
class Survey:
    """What was found in a file.

    Attributes:
        view: the graph, in topological order.
        stack: the blocks.
        image: the input of images.
        entry: where the tokens enter.
        shapes: dimensions of every tensor without registers.
        reach: of the graph.
        attentions: one Softmax or Attention node a block.
    """

    view: View
    stack: Stack
    image: Image
    entry: Entry
    shapes: Shapes
    reach: Reach
    attentions: tuple[gs.Node, ...]

    @property
    def file(self) -> OnnxFile:
        """The file."""
        return self.view.file

    @property
    def hidden(self) -> dict[int, int]:
        """Neurons by layer."""
        return {i: m.hidden for i, m in enumerate(self.stack.mlps)}

    @property
    def last(self) -> gs.Variable:
        """The last block's output."""
        return self.stack.mlps[-1].out

    @cached_property
    def inside(self) -> frozenset[int]:
        """The nodes behind the last block's output, by id."""
        return frozenset(id(n) for n in self.reach.nodes_of(self.reach.behind(self.last)))

    def inputs_of(self, value: gs.Tensor) -> set[str]:
        """Names of the graph's inputs that a tensor is computed from."""
        nodes = self.reach.nodes_of(self.reach.behind(value))
        read = {id(t) for node in nodes for t in node.inputs}
        return {t.name for t in self.view.graph.inputs if id(t) in read}

    def layout(self, registers: int, *, exact: bool) -> TokenLayout:
        """Token counts at the size the graph was walked.

        Args:
            registers: R.
            exact: whether it matters which tokens are patches.

        Raises:
            ModelError: it matters and the graph does not show it.
        """
        grid, prefix = self.entry.grid, self.entry.prefix
        if grid is None or prefix is None:
            if exact:
                raise ModelError(
                    f"{self.file.path}: the graph does not show which of its {self.entry.count} "
                    "tokens are patches, which cls = keep and patches = mean, only-outliers, keep "
                    "depend on; leave these options at their defaults"
                )
            grid, prefix = (1, self.entry.count), 0
        return TokenLayout(
            class_token=prefix > 0,
            prefix=prefix,
            grid=grid,
            width=self.stack.mlps[0].width,
            depth=self.stack.depth,
            heads=1,
            test_time_registers=registers,
        )

    def weights(self, layer: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """A down-projection (hidden, D) and its bias (D,) or None, read from the file."""
        m = self.stack.mlps[layer]
        values = m.weight.values.T if m.transposed else m.weight.values
        return np.asarray(values), None if m.bias is None else m.bias.values

    @property
    def precision(self) -> str:
        """fp32, fp16 or bf16: of the down-projections."""
        names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp32"}
        dtype = str(self.stack.mlps[0].weight.values.dtype)
        if dtype not in names:
            raise ModelError(f"{self.file.path}: its weights are {dtype}; expected floating point")
        return names[dtype]


def survey(
    file: OnnxFile, *, prefix: str | None = None, image_size: tuple[int, int] | None = None
) -> Survey:
    """Finds everything.

    Args:
        file: as read.
        prefix: which stack, where there are several.
        image_size: (H, W), where the file leaves it open and nothing in it says.

    Raises:
        ModelError: it is patched already, of an opset that is too old, or no Vision Transformer
            that can be followed; the message says why.
    """
    _refuse(file)
    seen = view(file)
    dropped = drop_neutral_mask(seen.graph)
    seen.graph.toposort()
    reach = Reach(seen.graph.nodes)
    stack = choose(seen, find_stacks(seen, reach), prefix)
    image, shapes = walk(seen, stack, reach, image_size)
    _refuse_wide_masks(file, dropped, shapes)
    entry = find_entry(stack, image, shapes, reach)
    attentions = _attentions(file, stack, entry, reach)
    return Survey(seen, stack, image, entry, shapes, reach, attentions)


def _refuse(file: OnnxFile) -> None:
    names = (n.name for n in file.skeleton.graph.node)
    marked = any(entry.key == MARK for entry in file.skeleton.metadata_props)
    if marked or any(name.startswith("regraft.append_register") for name in names):
        raise ModelError(f"{file.path}: is patched already; take the file it was made from")
    if file.opset < MIN_OPSET:
        raise ModelError(
            f"{file.path}: is of opset {file.opset}; expected {MIN_OPSET} or later: export it "
            "again, or convert it with onnx.version_converter"
        )


def _refuse_wide_masks(file: OnnxFile, dropped: Iterable[Dropped], shapes: Shapes) -> None:
    """A mask that masks nothing may still have made what it was put on larger."""
    for mask in dropped:
        if mask.kept is None:
            continue
        known = [shapes.of(t) for t in mask.inputs]
        wide = None
        if all(shape is not None for shape in known):
            wide = np.broadcast_shapes(*(shape or () for shape in known))
        if wide is None or wide != shapes.of(mask.kept):
            raise ModelError(
                f"{file.path}: node {mask.node.name!r} ({mask.node.op}) puts a mask that masks "
                f"nothing on {mask.kept.name!r} of shape {shapes.of(mask.kept)} and gives shape "
                f"{wide}; expected a mask no larger than what it is put on"
            )


def _attentions(file: OnnxFile, stack: Stack, entry: Entry, reach: Reach) -> tuple[gs.Node, ...]:
    """One a block: with more or fewer, blocks were missed and layers miscounted."""
    found = [n for n in reach.between(entry.tokens, stack.mlps[-1].out) if n.op in ATTENTION]
    if len(found) != stack.depth:
        raise ModelError(
            f"{file.path}: {len(found)} attentions ({_named(found)}) in a stack of {stack.depth} "
            "MLPs; expected one each (is a block written in another way, or fused?)"
        )
    return tuple(found)


def _named(nodes: Sequence[gs.Node]) -> str:
    return ", ".join(repr(n.name) for n in nodes[:3]) + (", ..." if len(nodes) > 3 else "")


__all__ = ["MARK", "MIN_OPSET", "Mlp", "Survey", "survey"]
