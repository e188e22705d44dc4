"""The server's page over HTTP: what it shows, what it refuses, and what it leaves alone."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support.server import Server, serving

from regraft.bundle import Bundle
from regraft.report.colours import VIRIDIS, table
from regraft.report.measure import Source, measure
from regraft.serve.page.contents import maps

KEY = "a-key"
SIZE = 32
LOOK, TIME = ("/page/models/{}/versions/1/" + what for what in ("maps", "latency"))


@pytest.fixture(scope="module")
def bare(write_probed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_probed(tmp_path_factory.mktemp("bare") / "bundle", baseline=False)


@pytest.fixture(scope="module")
def server(probed: Path, bare: Path) -> Iterator[Server]:
    options = ("--max-body", 1, "--max-pixels", 5000)
    with serving(f"small={probed}", f"bare={bare}", *options) as started:
        yield started


@pytest.fixture(scope="module")
def picture(pictures: Path) -> bytes:
    return sorted(pictures.iterdir())[0].read_bytes()


def look(server: Server, file: bytes, model: str = "small", path: str = LOOK) -> Any:
    reply = server.ask("POST", path.format(model), file)
    assert reply.status == 200, reply.body
    return reply.document


def test_the_page_lets_nothing_else_in(server: Server) -> None:
    reply = server.ask("GET", "/")
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(
        directive.split(" ", 1)
        for directive in reply.headers["content-security-policy"].split("; ")
    )
    text = reply.body.decode()
    for element in ("style", "script"):
        (content,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy.pop(f"{element}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert not re.search(
        r"""\son\w+=|\sstyle=|(src|href)="(?!data:)|https?://(?!www\.w3\.org)""", text
    )
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert server.ask("HEAD", "/").status == 200
    assert server.ask("POST", "/", b"").status == 405


def test_models_and_why_one_has_no_maps(server: Server) -> None:
    told = server.ask("GET", "/page/models").document
    assert told["max_body"] == 1 << 20
    small, bare = told["models"]
    assert small == {
        "name": "small",
        "version": "1",
        "source": "python:small.py:small",
        "variant": "token",
        "obstacle": "",
    }
    assert bare["name"] == "bare"
    assert "--no-baseline" in bare["obstacle"]


def test_maps_are_those_of_the_report(server: Server, probed: Path, picture: bytes) -> None:
    told = look(server, picture)
    found = measure(Bundle.open(probed), [Source(picture, "the image")])
    expected = maps(found)
    for part in ("headline", "figures", "outlines", "grid", "detection_layer", "charts"):
        assert told[part] == expected[part], part
    assert found.samples[0].effect.before.outliers > 0
    assert told["outlines"]["before"]
    assert len(told["layers"]) == 3
    at = found.patches
    for i, layer in enumerate(told["layers"]):
        shown = {when: layer["maps"][when]["norm"] for when in ("before", "after")}
        right = {"before": found.before.norms[0, i, at], "after": found.after.norms[0, i, at]}
        for when, norms in right.items():
            values = np.array(shown[when]["values"].split(), float)
            np.testing.assert_allclose(values, norms, rtol=1e-3)
        # One scale for both sides, from the least to the largest norm of the two.
        both = np.concatenate(list(right.values()))
        lo, hi = np.log(both.min()), np.log(both.max())
        for when, norms in right.items():
            levels = np.round((np.log(norms.astype(float)) - lo) / (hi - lo) * 255).astype(int)
            pixels = np.asarray(_image(shown[when]["image"]).convert("RGB")).reshape(-1, 3)
            np.testing.assert_array_equal(pixels, table(VIRIDIS)[levels])
    names = [layer["name"] for layer in told["layers"]]
    assert names[2] == "Layer 2, detection layer"
    assert [layer["touched"] for layer in told["layers"]] == [True, True, False]
    share = found.samples[0].effect.register_attention[2]
    assert float(told["layers"][2]["register"]["value"].rstrip("%")) == pytest.approx(
        100 * share, abs=0.06
    )


def test_the_latency_is_of_both_graphs(server: Server, picture: bytes) -> None:
    told = look(server, picture, path=TIME)
    assert set(told["seconds"]) == {"baseline", "patched"}
    assert all(0 < seconds < 5 for seconds in told["seconds"].values())
    assert told["runs"] >= 3
    assert "ort-cpu" in told["note"]
    assert f"median of {told['runs']:,} runs" in told["note"]


def test_a_model_without_a_class_token(
    write_probed: Callable[..., Path], picture: bytes, tmp_path: Path
) -> None:
    with serving(f"small={write_probed(tmp_path / 'bundle', class_token=False)}") as server:
        told = look(server, picture)
        assert told["attention_of"] == "mean attention of the patches"
        assert (
            told["layers"][0]["register"]["name"] == "Mean attention of the patches on the register"
        )


def _png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("file", "status", "error"),
    [
        (b"", 400, "image: is empty (0 bytes); expected an encoded image"),
        (b"no image", 400, "image: is not an image file that Pillow reads"),
        (
            _png(100, 51),
            400,
            "image: refused, 100 x 51 pixels; expected at most 5000, which guards against "
            "decompression bombs",
        ),
        (b"x" * ((1 << 20) + 1), 413, "the body is larger than 1048576 bytes"),
    ],
)
@pytest.mark.parametrize("path", [LOOK, TIME])
def test_bad_images_get_one_line(
    server: Server, file: bytes, status: int, error: str, path: str
) -> None:
    reply = server.ask("POST", path.format("small"), file)
    assert reply.status == status
    assert reply.document["error"].startswith(error)
    assert "\n" not in reply.document["error"]


def test_a_damaged_image(server: Server, picture: bytes) -> None:
    reply = server.ask("POST", LOOK.format("small"), picture[: len(picture) // 2])
    assert reply.status == 400
    assert reply.document["error"].startswith("image: cannot be decoded (")


def test_what_there_is_not(server: Server, picture: bytes) -> None:
    reply = server.ask("POST", LOOK.format("bare"), picture)
    assert reply.status == 404
    assert "--no-baseline" in reply.document["error"]
    assert server.ask("POST", LOOK.format("other"), picture).status == 404
    assert server.ask("POST", "/page/models/small/versions/2/maps", picture).status == 404
    assert server.ask("GET", LOOK.format("small")).status == 405
    assert server.ask("GET", "/page").status == 404


def test_bf16_cannot_be_looked_at(
    write_probed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from regraft.serve.page.viewer import obstacle

    bundle = Bundle.open(write_probed(tmp_path / "bundle", precision="bf16"))
    model: Any = SimpleNamespace(bundle=bundle)
    assert "--precision fp32" in obstacle(model)


def test_without_a_ui_there_is_no_page(probed: Path, picture: bytes) -> None:
    with serving(f"small={probed}", "--no-ui") as server:
        for path in ("/", "/page/models"):
            assert server.ask("GET", path).status == 404
        assert server.ask("POST", LOOK.format("small"), picture).status == 404
        assert server.ask("GET", "/v2").status == 200


def test_the_key_guards_all_but_the_empty_page(
    probed: Path, picture: bytes, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text(KEY)
    with serving(f"small={probed}", "--key-file", tmp_path / "key") as server:
        page = server.ask("GET", "/")
        assert page.status == 200
        assert 'data-key="true"' in page.body.decode()
        assert b"small.py" not in page.body
        right = {"Authorization": f"Bearer {KEY}"}
        for method, path, body in (
            ("GET", "/page/models", None),
            ("POST", LOOK.format("small"), picture),
            ("POST", TIME.format("small"), picture),
        ):
            assert server.ask(method, path, body).status == 401
            assert server.ask(method, path, body, {"Authorization": "Bearer no"}).status == 401
            assert server.ask(method, path, body, right).status == 200


def test_a_replaced_bundle_is_not_shown_under_the_old_name(
    probed: Path, write_probed: Callable[..., Path], picture: bytes, tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(probed, folder)
    with serving(f"small={folder}", "--model-control") as server:
        shutil.rmtree(folder)
        write_probed(folder, threshold=5.0)
        reply = server.ask("POST", LOOK.format("small"), picture)
        assert reply.status == 503
        assert "replaced on disk" in reply.document["error"]
        assert server.ask("POST", "/v2/repository/models/small/load", {}).status == 200
        assert "norm above 5 " in look(server, picture)["figures"]["outliers"]["note"]


def _niced(server: Server) -> int:
    """Threads of the server that step back behind its others."""
    tasks = Path(f"/proc/{server.process.pid}/task").iterdir()
    nice = [int((task / "stat").read_text().rpartition(")")[2].split()[16]) for task in tasks]
    return sum(value > min(nice) for value in nice)


def test_nothing_is_opened_until_an_image_comes_and_it_then_steps_back(
    probed: Path, picture: bytes
) -> None:
    with serving(f"small={probed}", "--threads", 2) as server:
        for path in ("/", "/page/models"):
            assert server.ask("GET", path).status == 200
        assert _niced(server) == 0
        look(server, picture)
        assert _niced(server) >= 2  # its own thread, and those of the engines it opened


def _image(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
