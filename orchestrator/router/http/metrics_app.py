"""The metrics port: ``/metrics`` of this router process, on a port of its own for Prometheus.

Owns nothing. On a port that several routers share, each scrape would reach another router, and every counter would seem to jump back.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from orchestrator.router.metrics import CONTENT_TYPE, Metrics


def build_scrape_app(metrics: Metrics) -> ASGIApp:
    async def scrape(http: Request) -> Response:
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def health(http: Request) -> Response:
        return PlainTextResponse("ok\n")

    return Starlette(routes=[Route("/metrics", scrape, methods=["GET"]), Route("/health", health, methods=["GET"])])
