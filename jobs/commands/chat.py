"""`calumma chat`: talk with a served model in the terminal. Pictures in answers are saved, and shown as blocks."""

from __future__ import annotations

import base64
import io
import json
import mimetypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calumma.jobs.commands.terminal import TerminalText, terminal_text
from calumma.platform.cluster.capacity import ClusterError
from calumma.platform.cluster.head import Service

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from rich.console import Console
    from rich.text import Text

DEFAULT_URL = "http://127.0.0.1:8000"
MODALITIES = {"both": ["text", "image"], "text": ["text"], "image": ["image"]}
FORMATS = ("PNG", "JPEG", "WEBP")  # that pictures in answers may have
MOST_COLUMNS = 48  # columns of a picture; two pixels share a character, one above the other
HELP = "/image FILE adds a picture to your next message, /new begins a new conversation, /quit ends (as Ctrl-D does)"


class ChatError(RuntimeError):
    """No answer; the message says why, fit for a terminal. `code` is the server's, if it gave one."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(terminal_text(message))
        self.code = code


def chat(
    url: Annotated[str | None, typer.Option(help="The server. Default: the one `calumma serve start` started.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="Picture for the first message; repeats.")] = None,
    once: Annotated[str | None, typer.Option(help="Ask this, print the answer, end.")] = None,
    answer: Annotated[str, typer.Option(help=f"What answers may hold: {', '.join(MODALITIES)}.")] = "both",
    save: Annotated[Path, typer.Option(help="Folder for the pictures in answers.")] = Path("chat"),
    system: Annotated[str | None, typer.Option(help="Text that stands before the conversation.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="Of text; 0 is the likeliest.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes answers repeatable.")] = None,
    model: Annotated[str | None, typer.Option(help="Which of the server's models. Default: its first.")] = None,
    key: Annotated[str | None, typer.Option(envvar="CALUMMA_API_KEY", help="API key, where the server asks.")] = None,
) -> None:
    """Chat with a served model, in words and pictures."""
    from rich.console import Console

    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        if answer not in MODALITIES:
            raise ChatError(f"--answer {answer!r} is not one of {', '.join(MODALITIES)}")
        settings = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "model": model}
        where, certificate = (url, None) if url else _default_server()
        session = ChatSession(
            where.rstrip("/"),
            {"modalities": MODALITIES[answer]} | {key: value for key, value in settings.items() if value is not None},
            [{"role": "system", "content": system}] if system else [],
            key=key,
            certificate=certificate,
        )
        pictures = [picture_part(path) for path in image or []]
        if once is not None:
            print_answer(session.ask(once, pictures), console, save)
        else:
            _prompt_loop(session, pictures, console, errors, save)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (ChatError, ClusterError) as error:
        errors.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


@dataclass
class ChatSession:
    """Messages so far, and where they go. `options` are fields of the request. certificate: file of the server's own,
    where it is one of this machine."""

    url: str
    options: dict[str, Any] = field(default_factory=dict)
    head: list[dict[str, Any]] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    key: str | None = None
    certificate: str | None = None

    def ask(self, text: str, pictures: list[dict[str, Any]]) -> Iterator[str | bytes]:
        """Send a message; the answer's texts and PNG files as they come. Only a whole exchange is remembered.

        When the conversation has outgrown the model's context, its oldest exchanges are forgotten. Raises ChatError.
        """
        content = [*([{"type": "text", "text": text}] if text else []), *pictures]
        question = {"role": "user", "content": content}
        parts: list[dict[str, Any]] = []
        for kind, value in self._stream(question):
            if kind == "text":
                if not parts or parts[-1]["type"] != "text":
                    parts.append({"type": "text", "text": ""})
                parts[-1]["text"] += value
                yield value
            else:
                parts.append({"type": "image_url", "image_url": {"url": value}})
                yield _picture(value)
        self.messages += [question, {"role": "assistant", "content": parts or " "}]

    def _stream(self, question: dict[str, Any]) -> Iterator[tuple[str, str]]:
        while True:
            try:
                yield from self._request([*self.head, *self.messages, question])
                return
            except ChatError as error:
                if error.code != "context_length_exceeded" or not self.messages:
                    raise
                del self.messages[:2]

    def _request(self, messages: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        import requests

        from calumma.serve.http.access.tls import session_for

        session = session_for(self.certificate) if self.certificate else requests.Session()
        body = {"messages": messages, "stream": True, **self.options}
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        where = f"{self.url}/v1/chat/completions"
        try:
            with session.post(where, json=body, headers=headers, stream=True, timeout=(10, None)) as reply:
                if not reply.ok:
                    raise _error_of(reply)
                yield from _answer_parts(reply)
        except requests.exceptions.SSLError as error:
            raise ChatError(
                f"{self.url} has a certificate for another name, or that nobody known here has signed; "
                f"$REQUESTS_CA_BUNDLE may name a file with it ({error})"
            ) from error
        except requests.ConnectionError as error:
            raise ChatError(
                f"no server answers at {self.url}; start one with `calumma serve start MODEL`, or give its --url"
            ) from error
        except requests.RequestException as error:
            raise ChatError(f"{self.url}: {error}") from error


def _answer_parts(reply: Any) -> Iterator[tuple[str, str]]:
    """("text", …) and ("image", data URL) of a stream of server-sent events. Raises ChatError."""
    try:
        yield from _chunk_parts(reply)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ChatError(f"{reply.url} does not answer as calumma does ({type(error).__name__}: {error})") from error


def _chunk_parts(reply: Any) -> Iterator[tuple[str, str]]:
    finished = False
    for line in reply.iter_lines():
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        chunk = json.loads(line.removeprefix(b"data: "))
        if "error" in chunk:
            raise ChatError(chunk["error"]["message"], chunk["error"].get("code"))
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if delta.get("content"):
                yield "text", delta["content"]
            if delta.get("refusal"):
                raise ChatError(delta["refusal"], "content_filter")
            for image in delta.get("images") or []:
                yield "image", image["image_url"]["url"]
            finished = finished or choice["finish_reason"] is not None
    if not finished:
        raise ChatError("the connection ended before the answer did")


def _picture(url: str) -> bytes:
    """The file in a data URL. Raises ChatError when it is no picture."""
    from PIL import Image

    try:
        data = base64.b64decode(url.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            opened.load()
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ChatError(f"the answer has a picture that is none ({type(error).__name__})") from error
    return data


def _error_of(reply: Any) -> ChatError:
    try:
        error = reply.json()["error"]
        return ChatError(str(error["message"]), error.get("code"))
    except (ValueError, KeyError, TypeError):
        return ChatError(f"{reply.url} answered with status {reply.status_code}: {reply.text[:300]}")


def _default_server() -> tuple[str, str | None]:
    """Its URL and its certificate's file."""
    running = Service.read()
    return (running.url, running.certificate) if running else (DEFAULT_URL, None)


def picture_part(path: Path) -> dict[str, Any]:
    """A file as a content part. Raises ChatError when it is no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        data = path.expanduser().read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            kind = Image.MIME.get(opened.format or "") or mimetypes.guess_type(path)[0] or "image/png"
    except UnidentifiedImageError:
        raise ChatError(f"{path} is not a picture") from None
    except OSError as error:
        raise ChatError(f"cannot read {path}: {error.strerror or error}") from error
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def print_answer(answer: Iterator[str | bytes], console: Console, folder: Path) -> None:
    """Print an answer as it comes; pictures are saved into `folder`, and drawn where there are colours. Of its text a
    terminal gets characters alone: what would steer it stays away."""
    from PIL import Image

    at_line_start, text = True, TerminalText()
    for piece in answer:
        if isinstance(piece, str):
            if shown := text.feed(piece):
                console.print(shown, end="", markup=False, soft_wrap=True)
                at_line_start = shown.endswith("\n")
            continue
        if not at_line_start:
            console.print()
        if console.color_system is not None:
            with Image.open(io.BytesIO(piece), formats=FORMATS) as opened:
                console.print(half_blocks(opened, min(MOST_COLUMNS, console.width)))
        console.print(f"[{_save_picture(piece, folder)}]", style="dim", markup=False, soft_wrap=True)
        at_line_start = True
    if not at_line_start:
        console.print()


def half_blocks(picture: PILImage, columns: int) -> Text:
    """A picture as rows of half blocks, at most `columns` wide: the upper pixel in the foreground colour."""
    import numpy as np
    from PIL import Image
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    width = min(columns, picture.width)
    height = max(2, round(picture.height * width / picture.width / 2) * 2)
    pixels_HWC = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BOX))
    text = Text(no_wrap=True)
    for y in range(0, height, 2):
        for x in range(width):
            upper, lower = (Color.from_rgb(*pixels_HWC[y + k, x]) for k in (0, 1))
            text.append("▀", Style(color=upper, bgcolor=lower))
        if y + 2 < height:
            text.append("\n")
    return text


def _save_picture(png: bytes, folder: Path) -> Path:
    """Write a picture under the next free number."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / f"{number:04d}.png"
        try:
            with path.open("xb") as file:
                file.write(png)
            return path
        except FileExistsError:
            number += 1


def _prompt_loop(
    session: ChatSession, pictures: list[dict[str, Any]], console: Console, errors: Console, folder: Path
) -> None:
    """The conversation at the prompt, until its end."""
    console.print(f"{session.url}: {HELP}", style="dim", markup=False)
    while True:
        try:
            line = console.input(f"{f'[{len(pictures)} picture(s)] ' if pictures else ''}> ", markup=False).strip()
        except EOFError:
            console.print()
            return
        try:
            if line == "/quit":
                return
            if line == "/new":
                session.messages.clear()
            elif line.startswith("/image "):
                pictures.append(picture_part(Path(line.removeprefix("/image ").strip())))
            elif line.startswith("/"):
                console.print(HELP, style="dim", markup=False)
            elif line or pictures:
                print_answer(session.ask(line, pictures), console, folder)
                pictures = []
        except ChatError as error:
            errors.print(str(error), style="red", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print("\nstopped", style="dim")
