"""From a PyTorch ViT to a traced ONNX graph whose places are named.

The dynamo exporter renames and folds at will, so the tensors the rewrites need leave the traced
model as outputs: token entry, every block's output, ``last_hidden_state``.
"""

from __future__ import annotations

import copy
import io
import warnings
from contextlib import redirect_stdout

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regraft.errors import InputError, ModelError
from regraft.manifest import INPUT
from regraft_export.graph.anchors import Anchors
from regraft_export.graph.document import read, write
from regraft_export.graph.drop_neutral_mask import drop_neutral_mask
from regraft_export.graph.patch import LAST, POOLED, Traced
from regraft_export.vit.observe import observe
from regraft_export.vit.structure import VisionTransformer, from_module

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22}  # a bf16 Conv exists from opset 22 on
_TOKENS = "regraft.tokens"


class _WithAnchors(nn.Module):
    """The model with its places as outputs; float32 in, the model's dtype out."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        self.module = vit.module

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        entered: list[Tensor] = []
        handle = self.vit.entry.register_forward_pre_hook(
            lambda m, args, kwargs: entered.append(
                args[0] if args else next(iter(kwargs.values()))
            ),
            with_kwargs=True,
        )
        try:
            seen = observe(
                self.vit, pixel_values.to(self.vit.dtype), layers=range(self.vit.layout.depth)
            )
        finally:
            handle.remove()
        hidden = [seen.hidden[i] for i in range(self.vit.layout.depth)]
        pooled = [] if seen.pooled is None else [seen.pooled]
        return (seen.last_hidden_state, entered[0], *hidden, *pooled)


def trace(vit: VisionTransformer, image_size: tuple[int, int], precision: str = "fp32") -> Traced:
    """Exports a model, unpatched, at one image size and any batch size.

    Args:
        vit: the model, float32; not changed.
        image_size: (H, W).
        precision: fp32, fp16 or bf16, of weights and arithmetic.

    Raises:
        InputError: an unknown precision.
        ModelError: the exporter refuses the model, its reason is kept; or fixes the batch size.
    """
    if precision not in DTYPES:
        raise InputError(f"precision is {precision!r}; expected one of {', '.join(DTYPES)}")
    if precision != "fp32":
        vit = from_module(copy.deepcopy(vit.module).to(DTYPES[precision]), image_size)
    depth = vit.layout.depth
    with torch.no_grad():
        example = torch.zeros(2, 3, *image_size)
        pooled = observe(vit, example.to(vit.dtype)).pooled
    names = [LAST, _TOKENS, *(f"hidden.{i}" for i in range(depth))]
    names += [POOLED] if pooled is not None else []
    opset = OPSETS[precision]
    proto = _export(_WithAnchors(vit).eval(), example, names, opset)
    down = {i: _numpy(b.down.weight.detach().T) for i, b in enumerate(vit.blocks)}
    return Traced(
        proto=proto,
        anchors=Anchors(
            tokens=_source(proto, _TOKENS),
            hidden=tuple(_source(proto, f"hidden.{i}") for i in range(depth)),
            final=_source(proto, LAST),
        ),
        layout=vit.layout,
        pooled=None if pooled is None else tuple(pooled.shape[1:]),
        down=down,
        opset=opset,
    )


def _export(module: nn.Module, example: Tensor, names: list[str], opset: int) -> onnx.ModelProto:
    try:
        # The exporter prints its progress and warns of its own internals.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=names,
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"PyTorch's ONNX exporter refuses this model: {reason}") from error
    assert program is not None  # dynamo=True without a file name always returns a program
    batch = program.model_proto.graph.input[0].type.tensor_type.shape.dim[0]
    if batch.HasField("dim_value"):
        raise ModelError(
            f"PyTorch's ONNX exporter fixed the batch size at {batch.dim_value}: the model's "
            "forward makes a Python number of it (len(x), int(n), a loop over images); take "
            "x.shape[0] as it is"
        )
    graph = read(program.model_proto)
    drop_neutral_mask(graph)
    return write(graph, shapes_changed=False)


def _source(proto: onnx.ModelProto, output: str) -> str:
    """The tensor behind an output: one tensor that leaves twice gets an Identity."""
    producers = {name: node for node in proto.graph.node for name in node.output}
    name = output
    while name in producers and producers[name].op_type == "Identity":
        name = producers[name].input[0]
    return name


def _numpy(weight: Tensor) -> NDArray[np.generic]:
    if weight.dtype == torch.bfloat16:
        import ml_dtypes

        bits = weight.contiguous().view(torch.int16).cpu().numpy()
        return np.asarray(bits.view(ml_dtypes.bfloat16))
    return np.ascontiguousarray(weight.cpu().numpy())
