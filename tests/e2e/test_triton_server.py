"""The repository that `regraft triton` writes, in a real Triton server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support import bundles, environments, pictures, triton_server

from regraft import Extractor
from regraft.cli.main import main

pytestmark = pytest.mark.slow

CLIENT = """
import sys
import numpy as np
import tritonclient.http as http
from google.protobuf import text_format
from pathlib import Path
from tritonclient.grpc.model_config_pb2 import ModelConfig

url, repository, out, *files = sys.argv[1:]
for file in Path(repository).glob("*/config.pbtxt"):
    config = text_format.Parse(file.read_text(), ModelConfig())
    assert config.name == file.parent.name
    assert config.max_batch_size == 32
client = http.InferenceServerClient(url)
images = np.array([[Path(file).read_bytes()] for file in files], object)
image = http.InferInput("images", images.shape, "BYTES")
image.set_data_from_numpy(images)
answer = client.infer("vit_images", [image])
names = [output["name"] for output in client.get_model_metadata("vit_images")["outputs"]]
np.savez(out, **{name: answer.as_numpy(name) for name in names})
bad = http.InferInput("images", [1, 1], "BYTES")
bad.set_data_from_numpy(np.array([[b"no image"]], object))
try:
    client.infer("vit_images", [bad])
except http.InferenceServerException as error:
    print(error.status(), error.message())
"""


@pytest.fixture(scope="module")
def python() -> Path:
    return triton_server.environment()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.exported(tmp_path_factory)


@pytest.fixture(scope="module")
def repository(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return triton_server.write_repository(bundle, tmp_path_factory.mktemp("triton") / "repository")


@pytest.fixture(scope="module")
def server(
    python: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Its address, once it is ready."""
    with triton_server.running(python, repository, tmp_path_factory.mktemp("server")) as found:
        yield f"127.0.0.1:{found.http}"


def test_a_client_gets_the_extractors_numbers(
    server: str, python: Path, repository: Path, bundle: Path, tmp_path: Path
) -> None:
    files = sorted(pictures.write(tmp_path / "images", 5).iterdir())
    done = subprocess.run(
        [python, "-c", CLIENT, server, repository, tmp_path / "out.npz", *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("400 "), done.stdout
    assert "image 0, counted from 0: is not an image file that Pillow reads" in done.stdout
    with Extractor.open(bundle) as extractor, np.load(tmp_path / "out.npz") as got:
        right = extractor.extract(files)
        prefix = extractor.bundle.manifest.tokens.prefix
        assert set(got) == set(json.loads((bundle / "manifest.json").read_text())["outputs"])
    with np.load(tmp_path / "out.npz") as got:
        assert right.patches is not None
        flat = right.patches.reshape(5, -1, right.patches.shape[-1])
        np.testing.assert_allclose(got["last_hidden_state"][:, prefix:], flat, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(got["pooler_output"], right.pooled, rtol=1e-4, atol=1e-4)


PARSE = """
import json, sys
from google.protobuf import json_format, text_format
from pathlib import Path
from tritonclient.grpc.model_config_pb2 import ModelConfig

parsed = {}
for file in Path(sys.argv[1]).glob("*/config.pbtxt"):
    config = text_format.Parse(file.read_text(), ModelConfig())
    parsed[file.parent.name] = json_format.MessageToDict(config, preserving_proto_field_name=True)
print(json.dumps(parsed))
"""


@pytest.mark.parametrize("plan", [False, True])
def test_every_option_is_what_tritons_own_message_reads(
    bundle: Path, tmp_path: Path, plan: bool
) -> None:
    """With Triton's descriptor: unknown fields, wrong types and enumerations do not parse."""
    python = environments.environment("tritonclient", ["tritonclient[grpc]==2.73.0"])
    (tmp_path / "model.plan").write_bytes(b"machine code")
    words = ["triton", str(bundle), "--out", str(tmp_path / "out"), "--name", "vit"]
    words += ["--plan", str(tmp_path / "model.plan")] if plan else ["--device", "gpu"]
    words += ["--max-batch", "8", "--instances", "2", "--preprocess-instances", "3"]
    words += ["--max-queue", "9", "--timeout-ms", "50", "--delay-us", "100"]
    assert main(words) == 0
    done = subprocess.run(
        [python, "-c", PARSE, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    parsed = json.loads(done.stdout)
    vit, images = parsed["vit"], parsed["vit_images"]
    assert vit["backend"] == ("tensorrt" if plan else "onnxruntime")
    assert vit["instance_group"] == [{"count": 2, "kind": "KIND_GPU"}]
    assert parsed["vit_preprocess"]["instance_group"] == [{"count": 3, "kind": "KIND_CPU"}]
    for name in ("vit", "vit_preprocess"):
        assert parsed[name]["dynamic_batching"] == {
            "max_queue_delay_microseconds": "100",
            "default_queue_policy": {  # REJECT is the enumeration's zero, which JSON leaves out
                "default_timeout_microseconds": "50000",
                "allow_timeout_override": True,
                "max_queue_size": 9,
            },
        }
    assert [warmup["batch_size"] for warmup in vit["model_warmup"]] == [1, 8]
    assert [step["model_name"] for step in images["ensemble_scheduling"]["step"]] == [
        "vit_preprocess",
        "vit",
    ]
    assert {config["max_batch_size"] for config in parsed.values()} == {8}
