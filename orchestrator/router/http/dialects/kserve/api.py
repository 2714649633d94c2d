"""The doors of Triton's clients: the KServe v2 protocol over HTTP, and Triton's ``generate`` and ``generate_stream``.

Owns these paths and how their answers are worded. A request becomes a completion (:mod:`orchestrator.router.http.dialects.kserve.tensors`)
and from there on takes the way of all: one validator, one dispatcher, one stream writer. No tensors but text and numbers, none of them
binary.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from orchestrator.auth.api_keys import Salting
from orchestrator.config.router_spec import HttpSpec, RouterSpec
from orchestrator.router.frontend import preprocess as preparing
from orchestrator.router.frontend import schema as bodies
from orchestrator.router.frontend.detokenizer import TextSink
from orchestrator.router.frontend.schema import CompletionBody
from orchestrator.router.frontend.text_models import TextModel, TextModels
from orchestrator.router.http import event_stream
from orchestrator.router.http.authentication import tenant_of
from orchestrator.router.http.dialects.kserve import tensors as kserve_tensors
from orchestrator.router.http.dialects.kserve.tensors import TensorRequest
from orchestrator.router.http.dialects.openai.wording import clamp, encode, event
from orchestrator.router.http.in_flight import HttpExchange
from orchestrator.router.http.middleware import affinity, read_body
from orchestrator.router.http.response import GenerateResponse, json_response
from orchestrator.router.interfaces import Dispatcher
from orchestrator.router.metrics import Metrics
from workers import __version__
from workers.protocol.errors import Cancelled, NotFound, Rejected, TriremeError, Unavailable, printable
from workers.protocol.messages import UNLIMITED, FinishReason, Logprobs, Usage

PREFIX = "/v2"
#: A served model has one version.
VERSION = "1"
_MODEL = "/v2/models/{name:path}"
#: How an answer is sent: one JSON body of tensors or of text, an event a piece, or one event.
Form = Literal["infer", "generate", "events", "event"]


def speaks(path: str) -> bool:
    """Whether a path is one of this protocol's, known or not."""
    return path == PREFIX or path.startswith(PREFIX + "/")


def error_body(error: TriremeError) -> dict[str, str]:
    """Triton's: the text alone."""
    return {"error": printable(str(error))}


class KServeApi:
    """The routes below ``/v2``. Its methods are the endpoints."""

    def __init__(self, spec: RouterSpec, dispatcher: Dispatcher, texts: TextModels, metrics: Metrics, salting: Salting) -> None:
        self._dispatcher, self._texts, self._metrics, self._salting = dispatcher, texts, metrics, salting
        self._admission = spec.admission
        self._max_body = (spec.http or HttpSpec()).max_body_bytes

    def routes(self) -> list[Route]:
        """The longest first: a model's name may hold slashes."""
        found = [
            Route(PREFIX, self.server, methods=["GET"]),
            Route("/v2/health/live", self.live, methods=["GET"]),
            Route("/v2/health/ready", self.ready, methods=["GET"]),
        ]
        for model in (_MODEL + "/versions/{version}", _MODEL):
            found += [
                Route(model + "/infer", self.infer, methods=["POST"]),
                Route(model + "/generate", self.generate, methods=["POST"]),
                Route(model + "/generate_stream", self.generate_stream, methods=["POST"]),
                Route(model + "/ready", self.model_ready, methods=["GET"]),
                Route(model + "/config", self.config, methods=["GET"]),
                Route(model, self.metadata, methods=["GET"]),
            ]
        return found

    async def server(self, http: Request) -> Response:
        return json_response(
            http, {"name": "trireme", "version": __version__, "extensions": ["generate", "model_configuration", "parameters"]}
        )

    async def live(self, http: Request) -> Response:
        return json_response(http, {"live": True})

    async def ready(self, http: Request) -> Response:
        if not self._dispatcher.ready():
            raise Unavailable("not every model has a ready replica", retry_after=1.0)
        return json_response(http, {"ready": True})

    async def model_ready(self, http: Request) -> Response:
        status = self._dispatcher.model(self._resolve(http).name)
        if status is None or not status.ready:
            raise Unavailable("no replica of the model is ready", retry_after=1.0)
        return json_response(http, {"name": http.path_params["name"], "ready": True})

    async def metadata(self, http: Request) -> Response:
        self._resolve(http)
        inputs = [
            {"name": name, "datatype": one.shown_type(), "shape": [-1, -1 if one.many else 1]}
            for name, one in kserve_tensors.INPUTS.items()
        ]
        outputs = [{"name": name, "datatype": datatype, "shape": [-1, *dims]} for name, (datatype, dims) in kserve_tensors.OUTPUTS.items()]
        found = {"name": http.path_params["name"], "versions": [VERSION], "platform": "trireme", "inputs": inputs, "outputs": outputs}
        return json_response(http, found)

    async def config(self, http: Request) -> Response:
        self._resolve(http)
        inputs = [
            {"name": name, "data_type": _config_type(one.shown_type()), "dims": [-1 if one.many else 1], "optional": name != "text_input"}
            for name, one in kserve_tensors.INPUTS.items()
        ]
        outputs = [
            {"name": name, "data_type": _config_type(datatype), "dims": dims} for name, (datatype, dims) in kserve_tensors.OUTPUTS.items()
        ]
        return json_response(
            http,
            {
                "name": http.path_params["name"],
                "platform": "",
                "backend": "trireme",
                "version_policy": {"latest": {"num_versions": 1}},
                "max_batch_size": bodies.MAX_PROMPTS,
                "input": inputs,
                "output": outputs,
                "model_transaction_policy": {"decoupled": False},
            },
        )

    async def infer(self, http: Request) -> ASGIApp:
        asked = kserve_tensors.read_infer(*await self._read(http))
        if asked.stream:
            bodies.refuse("stream", "infer answers once; generate_stream streams")
        return await self._answer(http, asked, "infer")

    async def generate(self, http: Request) -> ASGIApp:
        asked = kserve_tensors.read_generate(*await self._read(http))
        if asked.stream:
            bodies.refuse("stream", "generate answers once; generate_stream streams")
        return await self._answer(http, asked, "generate")

    async def generate_stream(self, http: Request) -> ASGIApp:
        asked = kserve_tensors.read_generate(*await self._read(http))
        return await self._answer(http, asked, "event" if asked.stream is False else "events")

    async def _read(self, http: Request) -> tuple[dict[str, Any], str, Callable[[int], None]]:
        """(the body, the model's name, who counts unknown fields)."""
        _check_version(http)
        body = await read_body(http, self._max_body, any_type=True)
        if "inference-header-content-length" in http.headers:
            raise Rejected("binary tensors are not taken", "", "send their data as JSON (binary_data=False)")
        return await preparing.decode(body, self._texts), http.path_params["name"], self._metrics.ignored_fields

    async def _answer(self, http: Request, asked: TensorRequest, form: Form) -> GenerateResponse:
        try:
            request = bodies.check(asked.fields, CompletionBody)
            caller = preparing.CallerContext(
                client="http",
                request=f"infer-{uuid.uuid4().hex}",
                tenant=tenant_of(http),
                affinity=affinity(http),
                credit=event_stream.window(request) if form == "events" else UNLIMITED,
            )
            prepared = await preparing.prepare(
                request, caller, texts=self._texts, dispatcher=self._dispatcher, admission=self._admission, salting=self._salting
            )
        except Rejected as error:
            raise asked.respell(error) from None
        return GenerateResponse(HttpExchange(prepared), _Speech(asked, request, form), self._dispatcher, self._metrics)

    def _resolve(self, http: Request) -> TextModel:
        _check_version(http)
        return preparing.resolve(http.path_params["name"], self._texts, tenant_of(http))


class _KServeChoice:
    """One prompt's answer: what was not told yet, and the sum of its logprobs so far."""

    def __init__(self, echo: str) -> None:
        self._texts = [echo]
        self._logprobs: list[float] = []
        self.total = 0.0

    def add(self, text: str, logprobs: list[Logprobs] | None = None) -> None:
        self._texts.append(text)
        values = [clamp(entry.logprob) or 0.0 for entry in logprobs or ()]
        self._logprobs += values
        self.total += sum(values)

    def take(self) -> tuple[str, list[float]]:
        """(text, logprobs) since the last call."""
        taken = "".join(self._texts), self._logprobs
        self._texts, self._logprobs = [], []
        return taken


class _Sink:
    """Fills the row of one ask. ``tell`` hears of everything new: (output tokens so far, whether this was the end)."""

    def __init__(self, exchange: HttpExchange, index: int, row: _KServeChoice, tell: Callable[[int, bool], None]) -> None:
        self._exchange, self._index, self._row, self._tell = exchange, index, row, tell

    def on_text(self, choice: int, first: int, tokens: list[int], text: str, logprobs: list[Logprobs] | None) -> None:
        self._row.add(text, logprobs)
        self._tell(first + len(tokens), False)

    def on_prompt(self, choice: int, logprobs: list[Logprobs]) -> None: ...

    def on_end(self, choice: int, reason: FinishReason, usage: Usage, stopped_by: str | int | None, tail: str) -> None:
        if reason == "cancelled":
            self.on_failed(choice, Cancelled("the request was cancelled"))
            return
        self._row.add(tail)
        self._tell(usage.output_tokens, True)
        self._exchange.ended(self._index, usage)

    def on_failed(self, choice: int, error: TriremeError) -> None:
        self._exchange.fail(error)


class _Speech:
    """These doors' :class:`~orchestrator.router.http.response.Dialect`."""

    def __init__(self, asked: TensorRequest, request: CompletionBody, form: Form) -> None:
        self.streamed = form in ("events", "event")
        self._asked, self._request, self._form = asked, request, form
        self._head = {"model_name": request.model, "model_version": VERSION, **({"id": asked.id} if asked.id else {})}

    def events(self, exchange: HttpExchange, abort: Callable[[], None]) -> tuple[event_stream.EventStream, list[TextSink]]:
        stream = event_stream.EventStream(exchange, self, window=event_stream.window(self._request), abort=abort)
        row = self._rows()[0]
        begun = False

        def tell(count: int, ended: bool) -> None:
            nonlocal begun
            if self._form == "events":
                stream.received(0, count)
            elif not ended:
                return
            text, logprobs = row.take()
            if text or logprobs or (ended and not begun):
                begun = True
                stream.push(event(self._generated(text, logprobs, row.total)))

        return stream, [_Sink(exchange, 0, row, tell)]

    def whole(self, exchange: HttpExchange) -> tuple[list[TextSink], Callable[[], bytes]]:
        rows = self._rows()

        def body() -> bytes:
            if self._form == "infer":
                return encode(self._inferred(rows))
            return encode(self._generated(*rows[0].take(), rows[0].total))

        return [_Sink(exchange, index, row, _nothing) for index, row in enumerate(rows)], body

    def last(self, usage: dict[str, Any]) -> bytes:
        """A stream that is whole just ends."""
        return b""

    def broken(self, error: TriremeError) -> bytes:
        return event(error_body(error))

    def _rows(self) -> list[_KServeChoice]:
        return [_KServeChoice(prompt if self._asked.echo and isinstance(prompt, str) else "") for prompt in self._request.prompts()]

    def _generated(self, text: str, logprobs: list[float], total: float) -> dict[str, Any]:
        """The object of ``generate``, and of each event of a stream."""
        values: dict[str, Any] = {"text_output": text, "cum_log_probs": total, "output_log_probs": logprobs}
        return self._head | {name: values[name] for name in self._asked.outputs}

    def _inferred(self, rows: list[_KServeChoice]) -> dict[str, Any]:
        taken = [row.take() for row in rows]
        longest = max(len(logprobs) for _, logprobs in taken)
        # Rows of a tensor have one length: zeros stand for what a shorter one lacks, as in TensorRT-LLM's answers.
        padded = [value for _, logprobs in taken for value in (*logprobs, *[0.0] * (longest - len(logprobs)))]
        values: dict[str, tuple[list[int], list[Any]]] = {
            "text_output": ([len(rows), 1], [text for text, _ in taken]),
            "cum_log_probs": ([len(rows), 1], [row.total for row in rows]),
            "output_log_probs": ([len(rows), 1, longest], padded),
        }
        outputs = [
            {"name": name, "datatype": kserve_tensors.OUTPUTS[name][0], "shape": values[name][0], "data": values[name][1]}
            for name in self._asked.outputs
        ]
        return self._head | {"outputs": outputs}


def _nothing(count: int, ended: bool) -> None:
    """Nobody waits for parts of an answer that is sent whole."""


def _check_version(http: Request) -> None:
    version = http.path_params.get("version", VERSION)
    if version != VERSION:
        raise NotFound(f"the model has no version {ascii(version[:16])[1:-1]}, only {VERSION}")


def _config_type(datatype: str) -> str:
    """A datatype in the words of a model's configuration."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
