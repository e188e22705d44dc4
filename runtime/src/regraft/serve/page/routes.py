"""The page and what its script asks for, as routes of the HTTP application."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from importlib import resources

from regraft.serve.compression import inflate
from regraft.serve.http_app import Application
from regraft.serve.http_body import unless_gone
from regraft.serve.http_exchange import Handler, Reply, Request
from regraft.serve.page import contents
from regraft.serve.page.viewer import Viewer, about
from regraft.serve.service import Service

_MODEL = r"/page/models/(?P<model>[^/]+)/versions/(?P<version>[^/]+)"


class Page:
    """Everything under ``/`` and ``/page/``.

    Args:
        service: whose models are shown; its limits on bodies hold for images of the page too.
        application: gets the routes.
    """

    def __init__(self, service: Service, application: Application) -> None:
        self._service = service
        self._viewer = Viewer(service.settings)
        self._html = _document(service.settings.key is not None)
        application.add(self._routes())

    async def close(self) -> None:
        """Frees the graphs, if any are open."""
        await self._viewer.close()

    def _routes(self) -> Iterator[tuple[str, str, Handler, bool]]:
        yield "/", "GET", self._show, True
        yield "/page/models", "GET", self._models, False
        yield _MODEL + "/maps", "POST", self._maps, False
        yield _MODEL + "/latency", "POST", self._latency, False

    async def _show(self, request: Request) -> Reply:
        return self._html

    async def _models(self, request: Request) -> Reply:
        repository = self._service.repository
        shown = [about(model) for name, model in repository.loaded() if name == model.name]
        limits = self._service.settings.limits
        return Reply.json({"models": shown, "max_body": limits.body})

    async def _maps(self, request: Request) -> Reply:
        async def work(file: bytes) -> Reply:
            model = self._service.repository.find(*request.model)
            return await self._viewer.look(
                model, file, lambda found: Reply.json(contents.maps(found))
            )

        return await self._on_image(request, work)

    async def _latency(self, request: Request) -> Reply:
        async def work(file: bytes) -> Reply:
            model = self._service.repository.find(*request.model)
            times, engine = await self._viewer.time(model, file)
            return Reply.json(contents.latency(times, engine))

        return await self._on_image(request, work)

    async def _on_image(self, request: Request, work: Callable[[bytes], Awaitable[Reply]]) -> Reply:
        model = self._service.repository.find(*request.model)
        request.call.model, request.call.version = model.name, model.version
        async with self._service.bodies.read(request.receive, request.headers) as body:
            request.received = len(body)
            request.call.images = 1
            encoding = request.headers.get("content-encoding", "")
            file = await asyncio.to_thread(
                inflate, body, encoding, self._service.settings.limits.body
            )
            return await unless_gone(asyncio.ensure_future(work(file)), request.receive)


def _document(asks_for_key: bool) -> Reply:
    """The page: one file, of which a strict policy lets nothing else be loaded or run."""
    style = _asset("regraft.report", "page.css") + _asset(__package__, "page.css")
    script = _asset(__package__, "page.js")
    html = _asset(__package__, "page.html")
    for mark, text in (("STYLE", style), ("SCRIPT", script), ("KEY", str(asks_for_key).lower())):
        html = html.replace(f"%{mark}%", text, 1)
    policy = (
        f"default-src 'none'; img-src data:; connect-src 'self'; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Reply(
        200,
        html.encode(),
        (
            ("content-type", "text/html; charset=utf-8"),
            ("content-security-policy", policy),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
            ("cache-control", "no-cache"),
        ),
    )


def _asset(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
