"""The gRPC side on the oldest versions that its extra allows, and between them and today's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support import bundles, environments
from tests.support.grpc_client import Client, pixels_request
from tests.support.server import serving

from regraft import Extractor

pytestmark = pytest.mark.slow
VERSIONS = [("5.29.0", "1.60.0"), ("6.33.6", "1.78.0")]


@pytest.mark.parametrize(("protobuf", "grpcio"), VERSIONS)
def test_serves(protobuf: str, grpcio: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    requirements = [
        *environments.RUNTIME,
        *(f"protobuf=={protobuf}", f"grpcio=={grpcio}", "uvicorn==0.54.0"),
    ]
    python = environments.environment(f"protobuf-{protobuf}", requirements)
    bundle: Path = bundles.exported(tmp_path_factory)
    pixels = np.random.default_rng(0).normal(size=(2, 3, *bundles.SIZE)).astype(np.float32)
    with Extractor.open(bundle) as extractor:
        expected = extractor.extract(pixels)
    words = (f"vit={bundle}", "--grpc-port", 0, "--drain-delay", 0)
    with (
        serving(*words, python=python, env=environments.variables()) as server,
        Client(server.grpc_port) as client,
    ):
        found = client.infer(pixels_request("vit", pixels))
        assert client.refused(pixels_request("none", pixels))[0] == "NOT_FOUND"
        assert client.refused(b"\xff")[0] == "INVALID_ARGUMENT"
        assert client.ask("ModelConfig", name="vit").config.max_batch_size == 32
        assert client.ask("ModelStatistics").model_stats[0].inference_count == 2
        assert server.stop() == 0
        assert not server.lines
    np.testing.assert_allclose(found["pooler_output"], expected.pooled, rtol=1e-4, atol=1e-5)
