"""The three models of a repository as Triton's ``ModelConfig``, one function each.

=====================  ===================================================================
model                  takes and gives
=====================  ===================================================================
``NAME``               ``pixel_values``, FP32 (3, H, W) -> the bundle's outputs
``NAME_preprocess``    ``images``, BYTES (1), encoded images -> ``pixel_values``
``NAME_images``        ``images`` -> the bundle's outputs: an ensemble of the two
=====================  ===================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regraft.manifest import INPUT, Manifest
from regraft.triton.pbtxt import Message, Word

IMAGES = "images"
_FP32, _BYTES = Word("TYPE_FP32"), Word("TYPE_STRING")


@dataclass(frozen=True)
class Serving:
    """How Triton is to run the models.

    Attributes:
        name: of the model; the others are called after it.
        gpu: whether it runs on GPUs.
        tensorrt: whether it is a TensorRT plan; else ONNX Runtime executes the graph.
        max_batch: images in one run.
        instances: copies of the model, per GPU on GPUs.
        preprocess_instances: processes that decode images.
        max_queue: requests that wait at most; further ones are refused.
        timeout_ms: that a request waits at most; 0 for no limit.
        delay_us: that a request waits for others to share its batch.
    """

    name: str
    gpu: bool = False
    tensorrt: bool = False
    max_batch: int = 32
    instances: int = 1
    preprocess_instances: int = 2
    max_queue: int = 256
    timeout_ms: int = 0
    delay_us: int = 0

    @property
    def preprocess(self) -> str:
        """Name of the model that decodes."""
        return f"{self.name}_preprocess"

    @property
    def images(self) -> str:
        """Name of the ensemble."""
        return f"{self.name}_images"


def model(manifest: Manifest, serving: Serving) -> Message:
    """The network itself."""
    kind = "KIND_GPU" if serving.gpu else "KIND_CPU"
    return {
        "name": serving.name,
        "backend": "tensorrt" if serving.tensorrt else "onnxruntime",
        "max_batch_size": serving.max_batch,
        "input": [_pixels(manifest)],
        "output": _outputs(manifest),
        "instance_group": [{"kind": Word(kind), "count": serving.instances}],
        "dynamic_batching": _batching(serving),
        "model_warmup": [_warmup(manifest, size) for size in sorted({1, serving.max_batch})],
    }


def preprocess(manifest: Manifest, serving: Serving) -> Message:
    """Decoding and preprocessing, in Triton's Python backend."""
    return {
        "name": serving.preprocess,
        "backend": "python",
        "max_batch_size": serving.max_batch,
        "input": [_image()],
        "output": [_pixels(manifest)],
        "instance_group": [{"kind": Word("KIND_CPU"), "count": serving.preprocess_instances}],
        "dynamic_batching": _batching(serving),
    }


def ensemble(manifest: Manifest, serving: Serving) -> Message:
    """Both, one after the other, inside the server."""
    outputs = [{"key": name, "value": name} for name in manifest.outputs]
    steps: Sequence[Message] = [
        {
            "model_name": serving.preprocess,
            "model_version": -1,
            "input_map": [{"key": IMAGES, "value": IMAGES}],
            "output_map": [{"key": INPUT, "value": INPUT}],
        },
        {
            "model_name": serving.name,
            "model_version": -1,
            "input_map": [{"key": INPUT, "value": INPUT}],
            "output_map": outputs,
        },
    ]
    return {
        "name": serving.images,
        "platform": "ensemble",
        "max_batch_size": serving.max_batch,
        "input": [_image()],
        "output": _outputs(manifest),
        "ensemble_scheduling": {"step": steps},
    }


def _pixels(manifest: Manifest) -> Message:
    return {"name": INPUT, "data_type": _FP32, "dims": [3, *manifest.image_size]}


def _image() -> Message:
    return {"name": IMAGES, "data_type": _BYTES, "dims": [1]}


def _outputs(manifest: Manifest) -> Sequence[Message]:
    return [
        {"name": name, "data_type": _FP32, "dims": [int(size) for size in shape[1:]]}
        for name, shape in manifest.outputs.items()
    ]


def _batching(serving: Serving) -> Message:
    # Triton's own queue has no limit, and grows until memory ends.
    policy: Message = {
        "max_queue_size": serving.max_queue,
        "timeout_action": Word("REJECT"),
        "default_timeout_microseconds": serving.timeout_ms * 1000,
        "allow_timeout_override": True,
    }
    delay: Message = {"max_queue_delay_microseconds": serving.delay_us} if serving.delay_us else {}
    return {**delay, "default_queue_policy": policy}


def _warmup(manifest: Manifest, batch_size: int) -> Message:
    tensor: Message = {"data_type": _FP32, "dims": [3, *manifest.image_size], "zero_data": True}
    inputs: Sequence[Message] = [{"key": INPUT, "value": tensor}]
    return {"name": f"batch of {batch_size}", "batch_size": batch_size, "inputs": inputs}
