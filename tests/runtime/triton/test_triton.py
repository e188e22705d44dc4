"""`regraft triton`: the text format, the layout, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from regraft import Extractor
from regraft.triton.pbtxt import Word, text
from regraft.triton.preprocess_model import TritonPythonModel

Regraft = Callable[..., tuple[int, str, str]]
WORKSPACE = Path(__file__).parents[3]


def test_text_of_every_kind_of_value() -> None:
    message = {
        "name": 'a "b"\\\n',
        "kind": Word("KIND_CPU"),
        "count": -1,
        "ratio": 0.5,
        "on": True,
        "dims": [3, 4],
        "none": [],
        "inner": {"x": False},
        "many": [{"key": "é"}, {"key": "f"}],
    }
    assert text(message) == (
        'name: "a \\"b\\"\\\\\\n"\nkind: KIND_CPU\ncount: -1\nratio: 0.5\non: true\n'
        "dims: [3, 4]\ninner {\n  x: false\n}\n"
        'many {\n  key: "\\303\\251"\n}\nmany {\n  key: "f"\n}\n'
    )


@pytest.mark.parametrize("value", [None, object(), [{"x": 1}, 2]])
def test_other_values_are_a_bug(value: object) -> None:
    with pytest.raises(TypeError, match="field"):
        text({"field": value})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="field is nan; expected a finite number"):
        text({"field": float("nan")})


@pytest.fixture
def repository(regraft: Regraft, pristine_bundle: Path, tmp_path: Path) -> Path:
    out = tmp_path / "repository"
    code, said, err = regraft("triton", pristine_bundle, "--out", out, "--name", "vit", "--json")
    assert (code, err) == (0, "")
    files = json.loads(said)["files"]
    assert files == sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    return out


def test_layout(repository: Path, pristine_bundle: Path) -> None:
    assert sorted(str(p.relative_to(repository)) for p in repository.rglob("*") if p.is_file()) == [
        "regraft.json",
        "vit/1/model.onnx",
        "vit/1/weights.data",
        "vit/config.pbtxt",
        "vit_images/1/README",
        "vit_images/config.pbtxt",
        "vit_preprocess/1/model.py",
        "vit_preprocess/1/preprocessing.json",
        "vit_preprocess/config.pbtxt",
    ]
    for name in ("model.onnx", "weights.data"):
        copied = (repository / "vit" / "1" / name).read_bytes()
        assert copied == (pristine_bundle / name).read_bytes()


def test_the_model_says_shapes_queue_and_warm_up(repository: Path) -> None:
    config = (repository / "vit" / "config.pbtxt").read_text()
    for part in (
        'name: "vit"\nbackend: "onnxruntime"\nmax_batch_size: 32\n',
        'input {\n  name: "pixel_values"\n  data_type: TYPE_FP32\n  dims: [3, 16, 16]\n}\n',
        'output {\n  name: "last_hidden_state"\n  data_type: TYPE_FP32\n  dims: [17, 8]\n}\n',
        "instance_group {\n  kind: KIND_CPU\n  count: 1\n}\n",
        "  default_queue_policy {\n    max_queue_size: 256\n    timeout_action: REJECT\n",
        'model_warmup {\n  name: "batch of 32"\n  batch_size: 32\n',
    ):
        assert part in config
    ensemble = (repository / "vit_images" / "config.pbtxt").read_text()
    assert 'input {\n  name: "images"\n  data_type: TYPE_STRING\n  dims: [1]\n}\n' in ensemble
    assert ensemble.index('model_name: "vit_preprocess"') < ensemble.index('model_name: "vit"\n')


def test_a_plan_and_options(regraft: Regraft, pristine_bundle: Path, tmp_path: Path) -> None:
    (plan := tmp_path / "engine.plan").write_bytes(b"machine code")
    words = ["triton", pristine_bundle, "--out", tmp_path / "r", "--name", "vit", "--plan", plan]
    options = ["--max-batch", 8, "--instances", 2, "--timeout-ms", 50, "--delay-us", 100]
    assert regraft(*words, *options)[0] == 0
    assert (tmp_path / "r/vit/1/model.plan").read_bytes() == b"machine code"
    assert not (tmp_path / "r/vit/1/model.onnx").exists()
    config = (tmp_path / "r/vit/config.pbtxt").read_text()
    for part in (
        'backend: "tensorrt"\nmax_batch_size: 8\n',
        "kind: KIND_GPU\n  count: 2\n",
        "default_timeout_microseconds: 50000\n",
        "max_queue_delay_microseconds: 100\n",
    ):
        assert part in config


def test_bad_words_are_one_line(
    regraft: Regraft, pristine_bundle: Path, repository: Path, tmp_path: Path
) -> None:
    new = ["triton", pristine_bundle, "--out", tmp_path / "new"]
    for expected, words, message in [
        (2, [*new, "--name", "a/b"], "--name is 'a/b'; expected letters, digits"),
        (1, [*new, "--plan", "nowhere"], "nowhere: no such file; expected a TensorRT plan"),
        (2, [*new, "--plan", "x", "--device", "cpu"], "--plan needs a GPU, and --device is cpu"),
        (1, ["triton", pristine_bundle, "--out", repository], "exists already; give --force"),
        (1, ["triton", tmp_path, "--out", tmp_path / "new"], "is not a bundle"),
    ]:
        code, said, err = regraft(*words)
        assert (code, said, err.count("\n")) == (expected, "", 1)
        assert message in err
    assert not (tmp_path / "new").exists()
    assert regraft("triton", pristine_bundle, "--out", repository, "--force")[0] == 0


class Backend:
    """What Triton gives a Python model, in short."""

    InferenceResponse = staticmethod(lambda tensors=(), error=None: (list(tensors), error))
    Tensor = staticmethod(lambda name, array: (name, array))

    class TritonError(Exception):
        INVALID_ARG = 3

        def __init__(self, message: str, code: int) -> None:
            super().__init__(message)
            self.code = code

    @staticmethod
    def get_input_tensor_by_name(request: dict[str, np.ndarray], name: str) -> SimpleNamespace:
        return SimpleNamespace(as_numpy=lambda: request[name])


def test_the_preprocessing_is_the_extractors(
    repository: Path,
    pristine_bundle: Path,
    photos: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton_python_backend_utils", Backend)
    model = TritonPythonModel()
    model.initialize({"model_repository": str(repository / "vit_preprocess"), "model_version": "1"})
    images = np.array([[photo.read_bytes()] for photo in photos], object)
    bad = np.array([[photos[0].read_bytes()], [b"no image"]], object)
    good, (none, error) = model.execute([{"images": images}, {"images": bad}])
    ((name, pixels),), nothing = good
    assert (name, nothing, none) == ("pixel_values", None, [])
    assert error.code == 3
    assert str(error) == "image 1, counted from 0: is not an image file that Pillow reads"
    with Extractor.open(pristine_bundle) as extractor:
        np.testing.assert_allclose(
            extractor.run(pixels).patches, extractor.extract(photos).patches, rtol=1e-5, atol=1e-6
        )


def test_the_kserve_example_is_yaml_for_triton() -> None:
    content = yaml.safe_load((WORKSPACE / "runtime/kserve/inferenceservice.yaml").read_text())
    assert content["apiVersion"] == "serving.kserve.io/v1beta1"
    assert content["kind"] == "InferenceService"
    assert set(content["spec"]["predictor"]) == {"minReplicas", "model"}
    model = content["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "triton"}
    assert model["protocolVersion"] == "v2"
    assert model["storageUri"].startswith("s3://")
    # Fields of KServe's ModelSpec; without an image it would take the runtime's, of 2023.
    assert set(model) == {"modelFormat", "protocolVersion", "storageUri", "image", "resources"}
