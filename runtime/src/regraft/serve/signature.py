"""What a model takes and gives, and the check of a request against it.

Every bundle is served under two names. NAME takes ``pixel_values``, preprocessed by the client,
as the graph does. NAME_images takes ``images``: encoded ones (BYTES [N, 1]), or raw ones of one
size (UINT8 [N, H, W, 3], RGB), which the server preprocesses as the bundle says. Two models with
one input each, because the protocol has no optional inputs, and because Triton has the same pair: a
model and an ensemble around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regraft.manifest import INPUT, Manifest
from regraft.serve import datatypes
from regraft.serve.checks import clip
from regraft.serve.datatypes import BYTES
from regraft.serve.messages import InferRequest, InputTensor
from regraft.serve.refusals import invalid

IMAGES = "images"
SUFFIX = "_images"
PLATFORM = "regraft"
_ANY = -1


@dataclass(frozen=True)
class Tensor:
    """A tensor of a signature; -1 is any size, and stands first for the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """As metadata say it."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True)
class Signature:
    """What one name takes and gives.

    Attributes:
        model: the name.
        inputs: the forms of its one input, of which metadata name the first.
        outputs: in the manifest's order.
        max_batch: images in one request at most.
    """

    model: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_batch: int

    @classmethod
    def tensors(cls, model: str, manifest: Manifest, max_batch: int) -> Signature:
        """Of the name that takes preprocessed pixels."""
        pixels = Tensor(INPUT, "FP32", (_ANY, 3, *manifest.image_size))
        return cls(model, (pixels,), _outputs(manifest), max_batch)

    @classmethod
    def images(cls, model: str, manifest: Manifest, max_batch: int) -> Signature:
        """Of the name that takes images."""
        encoded = Tensor(IMAGES, BYTES, (_ANY, 1))
        raw = Tensor(IMAGES, "UINT8", (_ANY, _ANY, _ANY, 3))
        return cls(model, (encoded, raw), _outputs(manifest), max_batch)

    def check_input(self, request: InferRequest) -> InputTensor:
        """The request's one input, after every check that needs no look at its numbers.

        Raises:
            Refusal: it is not what this model takes.
        """
        first = self.inputs[0]
        if request.raw is not None:
            return self._whole(request.raw)
        for given in request.inputs:
            if given.name != first.name:
                raise invalid(
                    f"unexpected inference input '{clip(given.name)}' for model '{self.model}'; "
                    f"it takes '{first.name}'"
                )
        if len(request.inputs) != 1:
            raise invalid(
                f"expected 1 inputs but got {len(request.inputs)} inputs for model '{self.model}'"
            )
        self._check_tensor(request.inputs[0])
        return request.inputs[0]

    def check_outputs(self, request: InferRequest) -> tuple[str, ...]:
        """The outputs to answer, all of them if none was named.

        Raises:
            Refusal: one does not exist, or is asked for twice.
        """
        known = [output.name for output in self.outputs]
        asked = [output.name for output in request.outputs]
        for name in asked:
            if name not in known:
                raise invalid(
                    f"unexpected inference output '{clip(name)}' for model '{self.model}'; it "
                    f"gives {', '.join(known)}"
                )
        if len(set(asked)) != len(asked):
            raise invalid(f"an output is asked for twice: {', '.join(asked)}")
        return tuple(asked or known)

    def metadata(self, versions: Sequence[str]) -> dict[str, Any]:
        """The model's metadata, as the protocol says."""
        return {
            "name": self.model,
            "versions": list(versions),
            "platform": PLATFORM,
            "inputs": [self.inputs[0].to_json()],
            "outputs": [output.to_json() for output in self.outputs],
        }

    def config(
        self, parameters: Mapping[str, str], preferred: int, delay_us: int
    ) -> dict[str, Any]:
        """The model's configuration under Triton's names.

        Args:
            parameters: what else to say, as strings.
            preferred: images in one run of several requests.
            delay_us: how long a request may be held back for others to join it.
        """
        return {
            "name": self.model,
            "platform": PLATFORM,
            "backend": PLATFORM,
            "max_batch_size": self.max_batch,
            "input": [_in_config(self.inputs[0])],
            "output": [_in_config(output) for output in self.outputs],
            "dynamic_batching": {
                "preferred_batch_size": [preferred],
                "max_queue_delay_microseconds": delay_us,
            },
            "parameters": {n: {"string_value": v} for n, v in parameters.items()},
        }

    def _whole(self, body: bytes) -> InputTensor:
        """The body of a request without a tensor around it: one image."""
        first = self.inputs[0]
        shape = (1, *first.shape[1:])
        if first.datatype == BYTES:
            return InputTensor(first.name, BYTES, shape, [body])
        array = datatypes.from_wire(first.name, first.datatype, shape, memoryview(body))
        return InputTensor(first.name, first.datatype, shape, array)

    def _check_tensor(self, given: InputTensor) -> None:
        fitting = [form for form in self.inputs if form.datatype == given.datatype]
        if not fitting:
            expected = " or ".join(form.datatype for form in self.inputs)
            raise invalid(
                f"inference input '{given.name}' data-type is '{given.datatype}', but model "
                f"'{self.model}' expects '{expected}'"
            )
        form, shape = fitting[0], given.shape
        fits = len(shape) == len(form.shape) and all(
            got >= 1 if want == _ANY else got == want
            for got, want in zip(shape, form.shape, strict=True)
        )
        if not fits:
            raise invalid(
                f"unexpected shape for input '{given.name}' for model '{self.model}'. Expected "
                f"{_brackets(form.shape)}, got {_brackets(shape)}; -1 is any size from 1"
            )
        if shape[0] > self.max_batch:
            raise invalid(
                f"inference request batch-size must be <= {self.max_batch} for '{self.model}', "
                f"got {shape[0]}"
            )


def _outputs(manifest: Manifest) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name, "FP32", tuple(size if isinstance(size, int) else _ANY for size in shape))
        for name, shape in manifest.outputs.items()
    )


def _in_config(tensor: Tensor) -> dict[str, Any]:
    kind = "TYPE_STRING" if tensor.datatype == BYTES else f"TYPE_{tensor.datatype}"
    return {"name": tensor.name, "data_type": kind, "dims": list(tensor.shape[1:])}


def _brackets(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"
