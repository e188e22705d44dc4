"""How the page shares the server: bounded, apart from requests, and gone when nobody looks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regraft.serve.http_app import Application
from regraft.serve.page import viewer as viewers
from regraft.serve.page.routes import Page
from regraft.serve.page.viewer import Viewer
from regraft.serve.refusals import Kind, Refusal
from regraft.serve.repository import Repository
from regraft.serve.rest_response import to_json
from regraft.serve.service import Service
from regraft.serve.settings import Settings

SIZE = 32
LOOK = "/page/models/small/versions/1/maps"


class Rig:
    """The application, asked without a network."""

    def __init__(self, application: Application, repository: Repository) -> None:
        self.application = application
        self.repository = repository

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        sent: list[Any] = []
        waiting = iter([{"type": "http.request", "body": body, "more_body": False}])
        forever = asyncio.Event()

        async def receive() -> Any:
            for message in waiting:
                return message
            await forever.wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": []}
        await self.application(scope, receive, send)
        return sent[0]["status"], sent[1]["body"]


@asynccontextmanager
async def rig(*arguments: str) -> AsyncIterator[Rig]:
    settings = replace(Settings(), workers=1)
    with ThreadPoolExecutor(1) as pool:
        repository = Repository(arguments, settings, pool)
        await repository.load_all()
        application = Application(Service(repository, settings))
        page = Page(Service(repository, settings), application)
        try:
            yield Rig(application, repository)
        finally:
            await page.close()
            await repository.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


@pytest.fixture
def picture(pictures: Path) -> bytes:
    return sorted(pictures.iterdir())[0].read_bytes()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Looking at an image takes until this is set."""
    go = threading.Event()
    real = viewers.measure

    def slow(*words: Any, **named: Any) -> Any:
        assert go.wait(30)
        return real(*words, **named)

    monkeypatch.setattr(viewers, "measure", slow)
    return go


def test_requests_are_answered_while_images_are_looked_at_and_more_are_refused(
    probed: Path, picture: bytes, held: threading.Event
) -> None:
    async def test() -> None:
        async with rig(f"small={probed}") as server:
            looks = [asyncio.create_task(server.ask("POST", LOOK, picture)) for _ in range(4)]
            await asyncio.sleep(0.2)
            status, body = await server.ask("POST", LOOK, picture)
            assert status == 503
            assert b"4 images are being looked at, expected at most 4" in body
            pixels = np.zeros((1, 3, SIZE, SIZE), np.float32)
            document = {
                "name": "pixel_values",
                "shape": list(pixels.shape),
                "datatype": "FP32",
                "data": pixels.ravel().tolist(),
            }
            infer = to_json({"inputs": [document]})
            for _ in range(3):
                assert (await server.ask("POST", "/v2/models/small/infer", infer))[0] == 200
            assert not any(look.done() for look in looks)
            held.set()
            assert [(await look)[0] for look in looks] == [200] * 4
            assert (await server.ask("POST", LOOK, picture))[0] == 200

    run(test)


def test_who_left_is_not_waited_for(probed: Path, picture: bytes, held: threading.Event) -> None:
    async def test() -> None:
        async with rig(f"small={probed}") as server:
            looks = [asyncio.create_task(server.ask("POST", LOOK, picture)) for _ in range(4)]
            await asyncio.sleep(0.2)
            for look in looks[1:]:
                look.cancel()
            await asyncio.wait(looks[1:])
            another = asyncio.create_task(server.ask("POST", LOOK, picture))
            held.set()
            assert (await another)[0] == (await looks[0])[0] == 200

    run(test)


class Counted(viewers.Engines):
    """Engines that are counted."""

    alive = 0

    def __init__(self, *words: Any, **named: Any) -> None:
        super().__init__(*words, **named)
        Counted.alive += 1

    def close(self) -> None:
        super().close()
        Counted.alive -= 1


def test_graphs_are_of_one_model_at_a_time_and_closed_when_idle(
    probed: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viewers, "Engines", Counted)
    monkeypatch.setattr(viewers, "_IDLE", 0.3)
    Counted.alive = 0

    async def test() -> None:
        async with rig(f"small={probed}", f"other={probed}") as server:
            assert Counted.alive == 0
            for name in ("small", "other", "small"):
                path = LOOK.replace("small", name)
                assert (await server.ask("POST", path, picture))[0] == 200
                assert Counted.alive == 1
            while Counted.alive:
                await asyncio.sleep(0.05)
            assert (await server.ask("POST", LOOK, picture))[0] == 200
            assert Counted.alive == 1
        assert Counted.alive == 0

    run(test)


def test_an_unexpected_failure_says_nothing_of_the_inside(
    probed: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*words: Any, **named: Any) -> Any:
        raise RuntimeError("/secret/place")

    monkeypatch.setattr(viewers, "measure", broken)

    async def test() -> None:
        async with rig(f"small={probed}") as server:
            status, body = await server.ask("POST", LOOK, picture)
            assert status == 500
            assert b"secret" not in body

    run(test)


def test_the_image_is_refused_before_anything_is_opened(
    probed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viewers, "Engines", None)

    async def test() -> None:
        async with rig(f"small={probed}") as server:
            model = server.repository.find("small")
            viewer = Viewer(Settings())
            with pytest.raises(Refusal, match="not an image") as refused:
                await viewer.look(model, b"nothing", lambda found: found)
            assert refused.value.kind is Kind.INVALID
            await viewer.close()

    run(test)
