"""From a PyTorch ViT to a traced ONNX graph whose places are named.

The dynamo exporter renames and folds at will, so the tensors the rewrites need leave the traced
model as outputs: token entry, every block's output, ``last_hidden_state``.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout

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
from regraft_export.graph.rotary_tables import RotaryTable
from regraft_export.vit.hooks import tables_replaced
from regraft_export.vit.observe import observe
from regraft_export.vit.rotary import neutral_rows, tables_of
from regraft_export.vit.structure import VisionTransformer, from_module

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22}  # a bf16 Conv exists from opset 22 on
_TOKENS, _ROTARY = "regraft.tokens", "regraft.rotary"


class _WithAnchors(nn.Module):
    """The model with its places as outputs; float32 in, the model's dtype out.

    Tables of rotary positions are inputs: the model's own would be folded into whatever the
    exporter makes of them, and could not be found again.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit
        self.module = vit.module

    def forward(self, pixel_values: Tensor, tables: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        entered: list[Tensor] = []
        with ExitStack() as hooks:
            handle = self.vit.entry.register_forward_pre_hook(
                lambda m, args, kwargs: entered.append(
                    args[0] if args else next(iter(kwargs.values()))
                ),
                with_kwargs=True,
            )
            hooks.callback(handle.remove)
            hooks.enter_context(tables_replaced(self.vit, tables))
            seen = observe(
                self.vit, pixel_values.to(self.vit.dtype), layers=range(self.vit.layout.depth)
            )
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
    tables = [] if vit.rotary is None else vit.rotary.tables()
    inputs = [INPUT, *(f"{_ROTARY}.{i}" for i in range(len(tables)))]
    proto = _export(_WithAnchors(vit).eval(), example, tables, inputs, names, opset)
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
        tables={
            name: RotaryTable(_numpy(table), _numpy(row))
            for name, table, row in zip(inputs[1:], tables, _neutral(vit), strict=True)
        },
    )


def _neutral(vit: VisionTransformer) -> list[Tensor]:
    """For each table the row that rotates nothing."""
    if vit.rotary is None:
        return []
    return [row for value in vit.rotary.distinct() for row in neutral_rows(tables_of(value))]


def _export(
    module: nn.Module,
    example: Tensor,
    tables: list[Tensor],
    inputs: list[str],
    names: list[str],
    opset: int,
) -> onnx.ModelProto:
    batch_grows = {0: torch.export.Dim("batch", min=1)}
    try:
        # The exporter prints its progress and warns of its own internals.
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example, tables) if tables else (example,),
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=names,
                dynamic_shapes=(batch_grows, [None] * len(tables)) if tables else (batch_grows,),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelError(f"PyTorch's ONNX exporter refuses this model: {_reason(error)}") from error
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


def _reason(error: BaseException) -> str:
    """The first line of the error behind all others: the exporter's own say which step failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
