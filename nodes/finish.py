"""`Finish now`: the one web route, which takes the name of a running distillation and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from server import PromptServer

from ..core.errors import OneStepError

_RUNNING: dict[str, threading.Event] = {}


@contextmanager
def running(name: str) -> Iterator[threading.Event]:
    """Within, the run ``name`` can be asked to finish; the event is set when it is."""
    if name in _RUNNING:
        raise OneStepError(f"the run {name!r} is being trained already: wait for it, or give another name")
    _RUNNING[name] = threading.Event()
    try:
        yield _RUNNING[name]
    finally:
        del _RUNNING[name]


def ask(name: Any) -> bool:
    """Ask the run ``name`` to end after its current step; False where no such run is under way."""
    event = _RUNNING.get(name) if isinstance(name, str) else None
    if event is not None:
        event.set()
    return event is not None


async def finish_now(request: web.Request) -> web.Response:
    """POST /onestep/finish {"name": ...}: 200 where the run will end, 404 where there is none, 400 for all else."""
    try:
        told = await request.json()
        name = told["name"]
    except (ValueError, KeyError, TypeError):
        return web.json_response({"error": 'send {"name": NAME}'}, status=400)
    found = ask(name)
    return web.json_response({"finishing": found}, status=200 if found else 404)


def add_route() -> None:
    """Once, where a server is there: ComfyUI is also imported without one."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.post("/onestep/finish")(finish_now)


add_route()
