"""What the server does, whatever transport a request came by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from regraft import __version__
from regraft.serve.batcher import Answer
from regraft.serve.http_body import Bodies
from regraft.serve.messages import InferRequest, InferResponse
from regraft.serve.model import Model
from regraft.serve.refusals import Refusal, unavailable
from regraft.serve.repository import Repository
from regraft.serve.settings import Settings
from regraft.serve.statistics import CANCELED, Timing, prometheus

NAME = "regraft"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")
Encoded = TypeVar("Encoded")


@dataclass
class Call:
    """What is to be said of a request in the log; filled while it is answered."""

    model: str = ""
    version: str = ""
    id: str | None = None
    images: int = 0

    def to_json(self) -> dict[str, Any]:
        """What is known of it."""
        return {
            **({"model": self.model, "version": self.version} if self.model else {}),
            **({"images": self.images} if self.images else {}),
            **({"id": self.id} if self.id is not None else {}),
        }


class Service:
    """The operations of the protocol.

    Attributes:
        repository: the models.
        settings: limits and batching.
        bodies: the memory of requests that are being answered.
        draining: set once the server has been told to stop.
    """

    def __init__(self, repository: Repository, settings: Settings) -> None:
        self.repository = repository
        self.settings = settings
        self.bodies = Bodies(settings.limits)
        self.draining = False
        # Apart from the threads that decode, behind whose images small requests would wait.
        self._wire = ThreadPoolExecutor(2, thread_name_prefix="regraft-wire")

    @property
    def ready(self) -> bool:
        """Whether every model is loaded and the server is not about to stop."""
        return self.repository.ready and not self.draining

    def model_ready(self, name: str, version: str = "") -> None:
        """Returns if a model answers.

        Raises:
            Refusal: it is unknown, or not ready.
        """
        self.repository.find(name, version)
        if self.draining:
            raise unavailable(f"model '{name}' is not ready: the server is shutting down")

    def metadata(self) -> dict[str, Any]:
        """Name, version and extensions of the server."""
        return {"name": NAME, "version": __version__, "extensions": list(EXTENSIONS)}

    def model_metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """Inputs and outputs of a model."""
        model = self.repository.find(name, version)
        versions = [version] if version else self.repository.versions(name)
        return model.signatures[name].metadata(versions)

    def model_config(self, name: str, version: str = "") -> dict[str, Any]:
        """The configuration of a model, under Triton's names."""
        model = self.repository.find(name, version)
        delay = int(self.settings.batching.max_delay * 1e6)
        return model.signatures[name].config(model.about(), model.preferred_batch, delay)

    def model_statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Statistics of one name, or of all."""
        if name:
            self.repository.find(name, version)
            wanted = [version] if version else self.repository.versions(name)
            found = [(name, self.repository.find(name, v)) for v in wanted]
        else:
            found = list(self.repository.loaded())
        return {
            "model_stats": [
                model.statistics[public].to_json(public, model.version) for public, model in found
            ]
        }

    async def load(self, name: str, parameters: Any) -> None:
        """Opens a model anew from disk, if clients may have that done.

        Raises:
            Refusal: they may not, or it fails; what was loaded stays.
        """
        self._expect_model_control()
        await self.repository.load(name, parameters)

    async def unload(self, name: str) -> None:
        """Stops serving a model, if clients may have that done.

        Raises:
            Refusal: they may not, or there is no such model.
        """
        self._expect_model_control()
        await self.repository.unload(name)

    def metrics(self) -> str:
        """All statistics in Prometheus's text format."""
        rows = [
            (public, model.version, model.statistics[public], model.batcher.waiting(public))
            for public, model in self.repository.loaded()
        ]
        return "\n".join(prometheus(rows)) + "\n"

    async def infer(
        self,
        name: str,
        version: str,
        parse: Callable[[], InferRequest],
        encode: Callable[[InferRequest, InferResponse], Encoded],
        call: Call,
    ) -> Encoded:
        """Answers an inference request.

        Args:
            name: the model asked for.
            version: its version; empty for the highest.
            parse: makes the request from the transport's bytes; runs in a thread.
            encode: makes the transport's bytes from the answer; runs in a thread.
            call: gets what the log says.

        Raises:
            Refusal: the request is wrong, came too early or too late, or the engine failed.
        """
        begun = time.perf_counter_ns()
        model = self.repository.find(name, version)
        call.model, call.version = name, model.version
        with model.kept(), _failures_counted(model, name, begun):
            request = await self.in_thread(parse)
            call.id = request.id
            deadline = self._deadline(request)
            answer, checked_ns, images = await self._run(model, name, request, call, deadline)
            computed = time.perf_counter_ns()
            response = InferResponse(name, model.version, request.id, _as_asked(answer, request))
            encoded = await self.in_thread(lambda: encode(request, response))
        ended = time.perf_counter_ns()
        timing = Timing(
            total=ended - begun,
            queue=answer.queue_ns,
            compute_input=checked_ns - begun + answer.gather_ns,
            compute_infer=answer.infer_ns,
            compute_output=ended - computed,
        )
        model.statistics[name].answered(images, timing, answer.batch, answer.first)
        return encoded

    async def _run(
        self, model: Model, name: str, request: InferRequest, call: Call, deadline: float
    ) -> tuple[Answer, int, int]:
        """Checks, decodes, waits for the engine: the answer, when it was decoded, its images."""
        request.half  # noqa: B018 - refuses another type
        signature = model.signatures[name]
        outputs = signature.check_outputs(request)
        tensor = signature.check_input(request)
        images = call.images = tensor.shape[0]
        with model.admitted(images):
            try:
                async with asyncio.timeout_at(deadline):
                    pixels = await model.reader.read(tensor)
            except TimeoutError:
                raise unavailable("Request timeout expired") from None
            decoded = time.perf_counter_ns()
            answer = await model.batcher.submit(pixels, outputs, name, deadline)
        return answer, decoded, images

    def _expect_model_control(self) -> None:
        if not self.settings.model_control:
            raise unavailable(
                "explicit model load / unload is not allowed; start the server with --model-control"
            )

    def _deadline(self, request: InferRequest) -> float:
        longest = self.settings.batching.timeout
        own = request.timeout()
        now = asyncio.get_running_loop().time()
        return now + (longest if own is None else min(own, longest))

    async def in_thread(self, job: Callable[[], Encoded]) -> Encoded:
        """The result of a job that handles a request's bytes, in one of the threads for that."""
        return await asyncio.get_running_loop().run_in_executor(self._wire, job)


@contextmanager
def _failures_counted(model: Model, name: str, begun: int) -> Iterator[None]:
    statistics = model.statistics[name]
    try:
        yield
    except asyncio.CancelledError:
        statistics.failed(CANCELED, time.perf_counter_ns() - begun)
        raise
    except Refusal as refusal:
        statistics.failed(refusal.kind.reason, time.perf_counter_ns() - begun)
        raise
    except Exception:
        statistics.failed("BACKEND", time.perf_counter_ns() - begun)
        raise


def _as_asked(answer: Answer, request: InferRequest) -> dict[str, NDArray[np.floating[Any]]]:
    if not request.half:
        return dict(answer.outputs)
    with np.errstate(over="ignore"):  # beyond 65504 becomes Inf, as halves do
        return {name: array.astype(np.float16) for name, array in answer.outputs.items()}
