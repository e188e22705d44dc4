"""The part of a model that computes some of its tensors from others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import ValueInfoProto, helper

from regraft_export.onnx_file.view import reads


def subgraph(
    model: onnx.ModelProto, given: Mapping[str, tuple[int, int]], wanted: Sequence[str]
) -> onnx.ModelProto:
    """Cuts it out.

    Args:
        model: initializers may have no values; they keep their place in the file.
        given: tensors that are fed instead of computed: element type and rank, by name.
        wanted: tensors that become the outputs, in this order.

    Returns:
        The inputs are those of the model that are still needed, then those of ``given``.
    """
    body = model.graph
    maker = {name: node for node in body.node for name in node.output if name}
    needed: set[int] = set()
    names: set[str] = set()
    pending = list(wanted)
    while pending:
        name = pending.pop()
        if name in names:
            continue
        names.add(name)
        node = None if name in given else maker.get(name)
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            pending += reads(node)
    part = onnx.ModelProto()
    part.CopyFrom(model)
    part.ClearField("graph")
    part.ir_version = max(4, part.ir_version)  # from which on initializers need not be inputs
    part.graph.name = body.name
    part.graph.node.extend(node for node in body.node if id(node) in needed)
    part.graph.initializer.extend(t for t in body.initializer if t.name in names)
    part.graph.sparse_initializer.extend(
        t for t in body.sparse_initializer if t.values.name in names
    )
    constants = {t.name for t in body.initializer}
    ignored = constants | given.keys()
    part.graph.input.extend(i for i in body.input if i.name in names - ignored)
    for name, (kind, rank) in given.items():
        if name in names:
            part.graph.input.append(helper.make_tensor_value_info(name, kind, [None] * rank))
    # Without types: whoever runs it infers them.
    part.graph.output.extend(ValueInfoProto(name=name) for name in wanted)
    return part
