"""The study's page and what it asks: an application over a database of judgements, assembled.

A personal link carries its token behind the `#`, which browsers send to nobody; the page sends it as a bearer token
with each request. There are no cookies, so no page of another site can act for an annotator. Nothing that a request
says names a system, and nothing that is answered does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calumma.platform.study.judgement import InvalidJudgement
from calumma.platform.study.specification import StudySpecification
from calumma.platform.study.store.dialogues import Dialogue, Dialogues, OutOfTurn
from calumma.platform.study.store.ratings import NotYours, Person, Ratings
from calumma.platform.study.store.tables import DatabaseUnusable
from calumma.serve.http.access.hosts import HostCheck, HostSettings
from calumma.serve.http.access.middleware import error_response, too_large
from calumma.serve.http.error_handlers import add_error_handlers
from calumma.serve.http.wire.errors import APIError
from calumma.serve.study import wire
from calumma.serve.study.page import PAGE, PAGE_HEADERS
from calumma.serve.study.talks import Talks

LOG = logging.getLogger(__name__)
MOST_BYTES = 24 * 2**20  # of a request: eight photographs
Whom = Callable[..., Person]  # a dependency: whose request it is
Content = Callable[[str], tuple[list[wire.Turn], Callable[[str], list[wire.Part]]]]


@dataclass(frozen=True)
class StudyPages:
    """What the application serves. `content` gives an item's prompt and, by system, its answer; `talks`: red-team
    dialogues are held instead of items judged."""

    specification: StudySpecification
    ratings: Ratings
    content: Content
    systems_shown: Callable[[str, int], tuple[str, ...]]
    hosts: HostSettings = field(default_factory=HostSettings)
    dialogues: Dialogues | None = None
    talks: Talks | None = None

    @property
    def mode(self) -> str:
        return "red-team" if self.talks else self.specification.kind


def create_app(pages: StudyPages) -> FastAPI:
    app = FastAPI(title="calumma study", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, hosts=HostCheck(pages.hosts))
    _add_errors(app)

    def person(request: Request) -> Person:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        found = pages.ratings.person(token.strip()) if scheme.lower() == "bearer" and token.strip() else None
        if found is None:
            raise APIError(
                "this link is not one of this study's: it may be cut off, or have been replaced by a newer one. "
                "Ask whoever invited you.",
                status=401,
                code="unknown_link",
            )
        return found

    def annotator(who: Person = Depends(person)) -> Person:
        if who.role != "annotator":
            raise APIError("this link is the owner's, who watches and does not judge", status=403, code="owner")
        return who

    def owner(who: Person = Depends(person)) -> Person:
        if who.role != "owner":
            raise APIError("only the owner's link shows this", status=403, code="annotator")
        return who

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/api/welcome")
    def welcome(who: Person = Depends(person)) -> wire.Welcome:
        spec = pages.specification
        told = spec.red_team_told if pages.talks else spec.told
        return wire.Welcome(
            study=spec.name, mode=pages.mode, name=who.name, role=who.role, instructions=told, issues=spec.issues,
            harms=spec.harms,
        )  # fmt: skip

    @app.get("/api/progress")
    def progress(_: Person = Depends(owner)) -> JSONResponse:
        return JSONResponse(_progress(pages))

    if pages.talks and pages.dialogues:
        _add_talks(app, pages.dialogues, pages.talks, annotator, pages.specification.harms)
    else:
        _add_items(app, pages, annotator)
    return app


def _add_items(app: FastAPI, pages: StudyPages, annotator: Whom) -> None:
    @app.post("/api/next")
    def next_task(who: Person = Depends(annotator)) -> wire.Task:
        given = pages.ratings.next(who.name)
        rated, left = pages.ratings.left_for(who.name)
        if given is None:
            return wire.Task(item=None, rated=rated, left=left, waiting=left > 0)
        prompt, answer = pages.content(given.item)
        answers = tuple(answer(system) for system in pages.systems_shown(given.item, given.seat))
        return wire.Task(item=given.item, prompt=tuple(prompt), answers=answers, rated=rated, left=left)

    @app.post("/api/rate")
    def rate(said: wire.Rate, who: Person = Depends(annotator)) -> wire.Kept:
        spec = pages.specification
        said.judgement.require(spec.kind, spec.issues)
        return wire.Kept(new=pages.ratings.rate(who.name, said.item, said.judgement))


def _add_talks(app: FastAPI, dialogues: Dialogues, talks: Talks, annotator: Whom, harms: tuple[str, ...]) -> None:
    def shown(dialogue: Dialogue) -> wire.Talk:
        turns = [wire.Turn(role=said.role, parts=said.parts) for said in dialogue.turns]
        return wire.Talk(dialogue=dialogue.id, turns=turns, done=dialogues.counts().get(dialogue.annotator, (0, 0))[0])

    @app.post("/api/talk")
    def talk(who: Person = Depends(annotator)) -> wire.Talk:
        return shown(dialogues.current(who.name))

    @app.post("/api/say")
    def say(said: wire.Say, who: Person = Depends(annotator)) -> wire.Talk:
        parts = talks.parts(said.text, said.images)
        return shown(talks.answer(dialogues.say(who.name, said.dialogue, said.number, "user", parts)))

    @app.post("/api/answer")
    def answer(asked: wire.Answer, who: Person = Depends(annotator)) -> wire.Talk:
        return shown(talks.answer(dialogues.find(who.name, asked.dialogue)))

    @app.post("/api/end")
    def end(said: wire.End, who: Person = Depends(annotator)) -> wire.Kept:
        if said.harm is not None and said.harm not in harms:
            raise APIError(f"harm must be one of {', '.join(harms)}", param="harm")
        dialogues.label(who.name, said.dialogue, said.label, said.harm, said.note)
        return wire.Kept(new=True)


def _progress(pages: StudyPages) -> dict[str, Any]:
    if pages.dialogues is not None and pages.talks is not None:
        counts = pages.dialogues.counts()
        people = [one.name for one in pages.ratings.people() if one.role == "annotator"]
        work = [
            {"name": name, "rated": counts.get(name, (0, 0))[0], "holds": counts.get(name, (0, 0))[1] > 0}
            for name in sorted({*people, *counts})
        ]
        return {"mode": pages.mode, "rated": sum(done for done, _ in counts.values()), "work": work}
    seen = pages.ratings.progress()
    work = [
        {"name": one.name, "rated": one.rated, "holds": one.holds, "last": one.last, "seconds": one.seconds}
        for one in seen.work
    ]
    return {
        "mode": pages.mode, "items": seen.items, "seats": seen.seats, "rated": seen.rated, "complete": seen.complete,
        "held": seen.held, "work": work,
    }  # fmt: skip


def _add_errors(app: FastAPI) -> None:
    add_error_handlers(app, "the study's page is at /")

    def status_of(kind: type[Exception], status: int, code: str) -> None:
        async def handler(_: Request, error: Exception) -> JSONResponse:
            if status >= 500:
                LOG.error("%s", error)
            return error_response(APIError(str(error), status=status, code=code))

        app.add_exception_handler(kind, handler)

    status_of(InvalidJudgement, 400, "invalid_judgement")
    status_of(NotYours, 409, "not_yours")
    status_of(OutOfTurn, 409, "out_of_turn")
    status_of(DatabaseUnusable, 503, "unavailable")


class Gate:
    """The outermost layer: names of the server, and the size of bodies."""

    def __init__(self, app: ASGIApp, hosts: HostCheck) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MOST_BYTES:
                raise too_large(MOST_BYTES)  # which FastAPI lets out while it reads a body
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", [])
                if scope["path"].startswith("/api/"):
                    message["headers"] = [*message["headers"], (b"cache-control", b"no-store")]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            self._hosts.require(scope)
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if length.isdigit() and int(length) > MOST_BYTES:
                raise APIError(too_large(MOST_BYTES).detail, status=413)
            await self._app(scope, limited, sent)
        except APIError as error:
            await error_response(error)(scope, receive, sent)
