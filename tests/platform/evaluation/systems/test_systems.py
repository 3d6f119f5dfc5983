"""Systems: one model asked in this process and over HTTP says the same; what cannot be answered costs itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from PIL import Image as PILImage

from calumma.model import load
from calumma.model.document import Document, Image, Text
from calumma.platform.evaluation.systems import endpoint
from calumma.platform.evaluation.systems.endpoint import EndpointSystem
from calumma.platform.evaluation.systems.opening import open_system
from calumma.platform.evaluation.systems.prompts import Prompt, Sampling, System, SystemAway, UnusableSystem
from calumma.platform.evaluation.systems.specification import SystemSpecification
from calumma.platform.evaluation.systems.worker import cut_at_stops
from calumma.platform.specification import Resources, Tracking
from calumma.platform.tracking.server import TrackingError

IN_PROCESS = Resources(workers=0)
RED = PILImage.new("RGB", (8, 8), (200, 30, 30))
PAIRS = [
    ("Question: Which of these keeps bread", " from going dry?"),
    ("Question: Which of these keeps bread", " a closed box."),
    ("", "A red square"),
    ("What colour is", " yellow"),
]


@pytest.fixture(scope="module")
def local(model_directory: Path) -> Iterator[System]:
    with open_system(SystemSpecification.of(str(model_directory), dtype="float64"), IN_PROCESS, Tracking()) as system:
        yield system


@pytest.fixture(scope="module")
def remote(server_url: str) -> Iterator[System]:
    with open_system(SystemSpecification.of(server_url), IN_PROCESS, Tracking()) as system:
        yield system


def asked(*segments: Text | Image, **sampling: Any) -> Prompt:
    return Prompt(Document(segments), Sampling(max_tokens=8, **sampling))


PROMPTS = [
    asked(Text("What colour is the circle?", "user")),
    asked(Image(RED, role="user"), Text("What colour is the square?", "user")),
    asked(Text("Question: Which of these")),
    asked(Text("Draw a red square.", "user"), mode="image"),
    asked(Text("Draw and tell.", "user"), mode="interleaved", max_images=1, temperature=1.0),
]


def test_answers_in_this_process_and_over_http_have_what_was_asked_for(local: System, remote: System) -> None:
    for system in (local, remote):
        answers = system.answer(PROMPTS)
        assert [answer.error for answer in answers] == [None] * len(PROMPTS)
        assert [len(answer.document.images) for answer in answers[:4]] == [0, 0, 0, 1]
        assert answers[3].image_tokens >= 16
        assert all(answer.prompt_tokens > 0 and answer.seconds > 0 for answer in answers)
        assert all(segment.role == "assistant" for answer in answers[:2] for segment in answer.document.segments)
    assert [a.document.text for a in local.answer(PROMPTS[:3])] == [a.document.text for a in remote.answer(PROMPTS[:3])]


def test_scores_are_those_of_one_plain_pass(local: System, remote: System, model_directory: Path) -> None:
    model = load(model_directory, dtype=torch.float64)
    for (context, continuation), score, other in zip(PAIRS, local.score(PAIRS), remote.score(PAIRS), strict=True):
        before = model.text_tokenizer.encode(context) if context else []
        own = model.text_tokenizer.encode(context + continuation)[len(before) :]
        with torch.inference_mode():
            logprobs_TV = model.transformer(torch.tensor([[model.vocabulary.bos, *before, *own]])).log_softmax(-1)[0]
        logprobs_TV = logprobs_TV[len(before) : -1]
        expected = float(logprobs_TV.gather(1, torch.tensor(own)[:, None]).sum())
        assert score.value == pytest.approx(expected, abs=1e-5)
        assert other.value == pytest.approx(expected, abs=1e-3)  # the server's model is of float32
        assert (score.tokens, score.greedy) == (len(own), logprobs_TV.argmax(-1).tolist() == own)
        assert (other.tokens, other.greedy) == (score.tokens, score.greedy)


def test_a_text_longer_than_the_context_is_scored_whole(local: System, model_directory: Path) -> None:
    model = load(model_directory)
    text = "A red square lies on a blue ground. " * 150
    count = len(model.text_tokenizer.encode(text))
    assert count > model.config.context
    [score] = local.score_whole([text])
    assert score.tokens == count


def test_a_prompt_that_cannot_be_answered_costs_itself(local: System, remote: System) -> None:
    prompts = [PROMPTS[0], asked(Text("red " * 3000, "user")), asked(Image(b"no picture", role="user")), PROMPTS[0]]
    answers = local.answer(prompts)
    assert [answer.error is None for answer in answers] == [True, False, False, True]
    assert "context" in (answers[1].error or "")
    over_http = remote.answer(prompts[:2])
    assert [answer.error is None for answer in over_http] == [True, False]


def test_an_answer_ends_before_a_stop_text(local: System) -> None:
    [whole] = local.answer([asked(Text("Question: Which of these"))])
    stop = whole.document.text[2:4]
    [cut] = local.answer([asked(Text("Question: Which of these"), stop=(stop,))])
    assert cut.document.text == whole.document.text[: whole.document.text.index(stop)]
    document = Document((Text("one\n"), Image(RED), Text("two")))
    assert cut_at_stops(document, ["\n"]).segments == (Text("one"),)


def test_what_is_no_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="no model directory"):
        open_system(SystemSpecification.of(str(tmp_path)), IN_PROCESS, Tracking())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnusableSystem, match="not a whole model directory"):
        open_system(SystemSpecification.of(str(tmp_path)), IN_PROCESS, Tracking())


class Faulty(BaseHTTPRequestHandler):
    """Answers with what stands first in `script`: (status, body)."""

    script: list[tuple[int, str]] = []  # noqa: RUF012
    asked: list[dict[str, Any]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        status, body = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def faulty() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


CHAT = '{"choices": [{"message": {"content": "blue", "images": [{"type": "image_url", "image_url": "x"}]}}]}'


def test_an_endpoint_that_is_away_is_waited_for_and_told(faulty: str) -> None:
    told: list[str] = []
    Faulty.script = [(503, "starting"), (200, '{"data": [{"id": "other"}]}')]
    with EndpointSystem(SystemSpecification.of(faulty), told.append) as system:
        assert system.name == "other"
        assert len(told) == 1
        assert "503: starting" in told[0]
        Faulty.script = [
            (429, "slow down"),
            (200, CHAT.replace(', "images": [{"type": "image_url", "image_url": "x"}]', "")),
        ]
        [answer] = system.answer([PROMPTS[0]])
        assert answer.document.segments == (Text("blue", "assistant"),)
        Faulty.script = [(200, CHAT)]
        [answer] = system.answer([PROMPTS[0]])
        assert "no data URL" in (answer.error or "")
        Faulty.script = [(400, '{"error": {"message": "too long"}}')]
        [answer] = system.answer([PROMPTS[0]])
        assert answer.error == "400: too long"
        Faulty.script = [(401, '{"error": "who are you?"}')]
        with pytest.raises(UnusableSystem, match="who are you"):
            system.answer([PROMPTS[0]])


def test_patience_ends(faulty: str) -> None:
    Faulty.script = [(503, "")]
    with pytest.raises(SystemAway, match="the same command goes on"):
        EndpointSystem(SystemSpecification.of(faulty, patience=0))


SAID = '{"choices": [{"message": {"content": "blue"}}]}'
SCORED = (
    '{"choices": [{"logprobs": {"text_offset": [0, 2, 4], "token_logprobs": [null, -1.5, -9], "top_logprobs": '
    '[null, {"b": -1.5}, {"c": -1}]}}]}'
)


def test_a_prompt_that_breaks_the_server_costs_itself(faulty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 again and again, while others are answered, is no absence."""
    monkeypatch.setattr(endpoint, "BROKEN", 2)
    with EndpointSystem(SystemSpecification.of(faulty, served_model="one")) as system:
        Faulty.script = [(500, "boom"), (500, "boom"), (200, SAID)]
        [answer] = system.answer([PROMPTS[0]])
        assert answer.error == "500: boom (2 times)"


def test_optional_fields_that_a_server_refuses_are_left_out_and_told(faulty: str) -> None:
    told: list[str] = []
    with EndpointSystem(SystemSpecification.of(faulty, served_model="one", concurrency=1), told.append) as system:
        Faulty.script, Faulty.asked = [(422, '{"detail": "extra_forbidden: seed"}'), (200, SAID)], []
        assert [answer.error for answer in system.answer([PROMPTS[0], PROMPTS[1]])] == [None, None]
        assert "takes no seed" in told[0]
        assert "seed" not in Faulty.asked[-1]
        Faulty.script = [(400, "no modalities here")]
        [drawn] = system.answer([PROMPTS[3]])
        assert drawn.error == "400: no modalities here"


def test_a_path_to_tokens_of_another_meaning_is_passed_over(faulty: str) -> None:
    Faulty.script = [(200, '{"tokens": []}'), (200, SCORED)]
    with EndpointSystem(SystemSpecification.of(faulty, served_model="one", concurrency=1)) as system:
        [score] = system.score([("a ", "b")])
    assert (score.value, score.tokens, score.greedy) == (-1.5, 1, True)
