"""The buttons of a running node: three web routes, which take a run's name and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from server import PromptServer

from ..core.errors import OneStepError
from ..training.watch.progress import Request

WORDS = {"finish": Request.FINISH, "sample": Request.SAMPLE, "save": Request.SAVE}


class Asked:
    """What a run has been asked for since it last looked. Set by the server's thread, taken by the run's."""

    def __init__(self) -> None:
        self._words: set[str] = set()

    def add(self, word: str) -> None:
        self._words.add(word)

    def take(self) -> Request:
        """What was asked for; asked for once, except to finish."""
        found = Request.NONE
        for word in list(self._words):
            found |= WORDS[word]
            if word != "finish":
                self._words.discard(word)
        return found


_RUNNING: dict[str, Asked] = {}


@contextmanager
def running(name: str) -> Iterator[Asked]:
    """Within, the run ``name`` can be asked for something."""
    if name in _RUNNING:
        raise OneStepError(f"the run {name!r} is being trained already: wait for it, or give another name")
    _RUNNING[name] = Asked()
    try:
        yield _RUNNING[name]
    finally:
        del _RUNNING[name]


def ask(name: Any, word: str) -> bool:
    """Ask the run ``name`` after its current update; False where no such run is under way."""
    asked = _RUNNING.get(name) if isinstance(name, str) else None
    if asked is not None:
        asked.add(word)
    return asked is not None


def route(word: str) -> Any:
    """POST /onestep/WORD {"name": ...}: 200 where the run will do it, 404 where there is none, 400 for all else."""

    async def answer(request: web.Request) -> web.Response:
        try:
            name = (await request.json())["name"]
        except (ValueError, KeyError, TypeError):
            return web.json_response({"error": 'send {"name": NAME}'}, status=400)
        found = ask(name, word)
        return web.json_response({"asked": found}, status=200 if found else 404)

    return answer


def add_routes() -> None:
    """Once, where a server is there: ComfyUI is also imported without one."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    for word in WORDS:
        server.routes.post(f"/onestep/{word}")(route(word))


add_routes()
