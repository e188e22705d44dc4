"""Sizes of a graph's inputs at which it is walked, where the file leaves them open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt

import onnx
import onnx_graphsurgeon as gs

from regraft.errors import ModelError
from regraft_export.foreign.constants import weight
from regraft_export.foreign.reach import Reach
from regraft_export.foreign.shapes import Conflict, Shape, Shapes, measure
from regraft_export.foreign.stacks import Stack
from regraft_export.graph.token_axis import TRIAL_BATCH
from regraft_export.onnx_file.view import View

_PRIMES = (7, 11, 13, 17, 19, 23, 29, 31)  # for other open dimensions: no two alike
_PREFIXES = (1, 0, 2, 5, 4, 3, 6, 8, 9, 17)


@dataclass(frozen=True)
class Image:
    """The input that holds the images.

    Attributes:
        name: of the graph's input.
        shape: as the file declares it: numbers, or None where it is open.
        size: (H, W) at which the graph was walked.
        larger: shapes of all inputs, the images a patch larger each way, that the graph takes too;
            None where height and width are fixed.
    """

    name: str
    shape: tuple[int | None, ...]
    size: tuple[int, int]
    larger: Mapping[str, Shape] | None

    @property
    def open_size(self) -> bool:
        """Whether height and width may be others."""
        return self.larger is not None

    @property
    def open_batch(self) -> bool:
        """Whether any batch size is taken."""
        return self.shape[0] is None

    @property
    def batch(self) -> int:
        """The batch size at which the graph was walked."""
        return self.shape[0] or TRIAL_BATCH


def walk(
    view: View, stack: Stack, reach: Reach, size: tuple[int, int] | None = None
) -> tuple[Image, Shapes]:
    """Walks the graph at sizes that fit.

    Args:
        view: the graph.
        stack: whose tokens are looked at.
        reach: of the graph.
        size: (H, W); None to take the file's, or the one that fits its position embedding.

    Raises:
        ModelError: the stack reads no images, or no size fits.
    """
    declared = {i.name: _declared(i) for i in view.file.skeleton.graph.input}
    names = [name for name in stack.inputs if len(declared[name]) == 4]
    convolutions = [n for n in reach.nodes_of(reach.behind(stack.start)) if n.op == "Conv"]
    if len(names) != 1 or not convolutions:
        raise ModelError(
            f"{view.file.path}: the stack of {stack} is no vision tower: it reads "
            f"{', '.join(stack.inputs) or 'nothing'}; expected one input of images (batch, 3, H, "
            "W) and a convolution that cuts them into patches"
        )
    name, conv = names[0], convolutions[0]
    fixed = declared[name][2:]
    if size is not None and any(
        n not in (None, given) for n, given in zip(fixed, size, strict=True)
    ):
        raise ModelError(
            f"{view.file.path}: is for images of {' x '.join(str(n or 'any') for n in fixed)}, not "
            f"{size[0]} x {size[1]}; leave --image-size out"
        )
    reason = "none was tried"
    for height, width in _sizes(declared[name], stack, conv, reach, size):
        inputs = _inputs(view, name, declared[name], (height, width), conv)
        try:
            shapes = measure(view, inputs)
        except Conflict as error:
            reason = str(error)
            continue
        if shapes.of(stack.start) is not None:
            opened = None in declared[name][2:]
            larger = _larger(view, inputs, name, conv) if opened else None
            return Image(name, declared[name], (height, width), larger), shapes
        reason = f"the shape of {stack.start.name!r} cannot be inferred"
    wanted = "s that fit its constants" if size is None else f" {size[0]} x {size[1]}"
    raise ModelError(
        f"{view.file.path}: the graph cannot be followed at image size{wanted} ({reason}); give "
        "the size it was exported for with --image-size"
    )


def _declared(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    return tuple(_number(d) for d in value.type.tensor_type.shape.dim)


def _number(dim: onnx.TensorShapeProto.Dimension) -> int | None:
    if dim.dim_value > 0:
        return int(dim.dim_value)
    # transformers' exporter names the sizes of the images it traced: "224".
    return int(dim.dim_param) if dim.dim_param.isdigit() else None


def _sizes(
    declared: tuple[int | None, ...],
    stack: Stack,
    conv: gs.Node,
    reach: Reach,
    size: tuple[int, int] | None,
) -> Iterator[tuple[int, int]]:
    height, width = declared[2:]
    if size is not None:
        yield size
        return
    if height is not None and width is not None:
        yield height, width
        return
    down, across = conv.attrs.get("strides", [1, 1])
    for rows, cols in _grids(stack, reach):
        yield height or rows * down, width or cols * across


def _grids(stack: Stack, reach: Reach) -> Iterator[tuple[int, int]]:
    """Grids that fit a position embedding: a constant of as many rows as tokens."""
    counts = []
    for node in reach.nodes_of(reach.behind(stack.start)):
        for value in node.inputs:
            constant = weight(value)
            shape = () if constant is None else constant.shape
            if len(shape) in (2, 3) and shape[-1] == stack.mlps[0].width and shape[-2] > 1:
                counts.append(shape[-2])
    for count in dict.fromkeys(counts):
        for prefix in _PREFIXES:
            side = isqrt(max(0, count - prefix))
            if side > 1 and side * side == count - prefix:
                yield side, side
    yield 16, 16  # no embedding says anything: positions are computed, any size will do


def _inputs(
    view: View, name: str, declared: tuple[int | None, ...], size: tuple[int, int], conv: gs.Node
) -> dict[str, Shape]:
    primes = iter(_PRIMES * 8)
    given: dict[str, int] = {}
    inputs: dict[str, Shape] = {}
    image = next(i for i in view.file.skeleton.graph.input if i.name == name)
    symbols = [d.dim_param for d in image.type.tensor_type.shape.dim]
    given.update({s: n for s, n in zip(symbols[:1], [TRIAL_BATCH], strict=True) if s})
    for value in view.graph.inputs:
        proto = next(i for i in view.file.skeleton.graph.input if i.name == value.name)
        if value.name == name:
            channels = weight(conv.inputs[1])
            count = 3 if channels is None else channels.shape[1] * int(conv.attrs.get("group", 1))
            inputs[name] = (declared[0] or TRIAL_BATCH, declared[1] or count, *size)
            continue
        dims = []
        for d in proto.type.tensor_type.shape.dim:
            if d.dim_value > 0:
                dims.append(d.dim_value)
            else:
                symbol = d.dim_param or f"{value.name}.{len(dims)}"
                dims.append(given.setdefault(symbol, given.get(symbol) or next(primes)))
        inputs[value.name] = tuple(dims)
    return inputs


def _larger(
    view: View, inputs: Mapping[str, Shape], name: str, conv: gs.Node
) -> Mapping[str, Shape] | None:
    """The inputs with images that are a patch larger each way, if the graph takes them."""
    down, across = conv.attrs.get("strides", [1, 1])
    batch, channels, height, width = inputs[name]
    larger = {**inputs, name: (batch, channels, height + down, width + 2 * across)}
    try:
        measure(view, larger)
    except Conflict:
        return None
    return larger
