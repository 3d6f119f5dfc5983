"""The study's server: uvicorn in this process, until it is told to end. What it has acknowledged is in the database."""

from __future__ import annotations

from calumma.platform.study.folder import Study
from calumma.platform.study.prompts import as_messages, as_parts
from calumma.platform.study.store.dialogues import Dialogues
from calumma.platform.study.store.tables import Database
from calumma.serve.http.access.connections import ConnectionLimits, limited
from calumma.serve.http.access.hosts import HostSettings
from calumma.serve.study import wire
from calumma.serve.study.app import Content, StudyPages
from calumma.serve.study.talks import Ask, Talks


def pages_of(study: Study, database: Database, hosts: HostSettings, ask: Ask | None = None) -> StudyPages:
    """ask: of red-team dialogues; without it the study's items are judged. Raises StudyError, DatabaseUnusable."""
    dialogues = Dialogues(database, study.specification.name, study.specification.names) if ask else None
    return StudyPages(
        specification=study.specification,
        ratings=study.ratings(database),
        content=_content(study),
        systems_shown=lambda item, seat: study.items[item].shown(seat),
        hosts=hosts,
        dialogues=dialogues,
        talks=Talks(dialogues, ask) if dialogues and ask else None,
    )


def _content(study: Study) -> Content:
    def content(item: str) -> tuple[list[wire.Turn], _AnswerOf]:
        prompt = study.prompts[study.items[item].prompt]
        turns = [wire.Turn(role=m["role"], parts=m["content"]) for m in as_messages(prompt.conversation)]
        return turns, _AnswerOf(study, prompt.id)

    return content


class _AnswerOf:
    """A system's answer to one prompt."""

    def __init__(self, study: Study, prompt: str) -> None:
        self._study, self._prompt = study, prompt

    def __call__(self, system: str) -> list[wire.Part]:
        return as_parts(self._study.answer(system, self._prompt).segments)


def run(pages: StudyPages, host: str, port: int, certificate: str | None = None, key: str | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C. Requests under way finish."""
    import uvicorn

    from calumma.serve.study.app import create_app

    uvicorn.run(
        create_app(pages), host=host, port=port, log_level="warning", http=limited(ConnectionLimits()),
        ssl_certfile=certificate, ssl_keyfile=key, timeout_graceful_shutdown=10, server_header=False,
    )  # fmt: skip
