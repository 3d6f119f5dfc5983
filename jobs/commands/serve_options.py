"""What the options of `calumma serve start` and its file say, as settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from calumma.serve.settings import ServeSettings


def read_yaml(config: Path | None) -> dict[str, Any]:
    """The fields of a YAML file. Raises ValueError, OSError."""
    if config is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{config} must hold fields and their values, found {type(values).__name__}")
    return values


def additional_model(text: str, tracking_uri: str | None) -> dict[str, Any]:
    """A model given as NAME=MODEL. Raises ValueError."""
    name, equals, model = text.partition("=")
    if not (name and equals and model):
        raise ValueError(f"--also {text!r}: give NAME=MODEL, say --also small=s3://bucket/small")
    return {"name": name, "model": model, "tracking": {"uri": tracking_uri}}


def adapters_of(given: list[str]) -> dict[str, str]:
    """Adapters given as NAME=DIR, by name. Raises ValueError."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not (name and equals and place):
            raise ValueError(f"--adapter {text!r}: give NAME=DIR, say --adapter poet=out/tuned/adapter")
        if name in found:
            raise ValueError(f"--adapter {text!r}: the name {name} is given more than once")
        found[name] = place
    return found


def read_keys(values: dict[str, Any], file: Path | None, here: bool) -> None:
    """Add the API keys of a file and the environment; here: the server can read the file again whenever it changes.
    Raises ValueError, OSError."""
    from calumma.serve.http.access.api_keys import load_keys

    if here and (path := file or values.get("keys_file")):
        load_keys(Path(path))  # a server that nobody may use is none that anybody wants to start
        values["keys_file"], file = str(Path(path).absolute()), None
    values["keys"] = [*values.get("keys", []), *(one.model_dump() for one in load_keys(file))]


def replica_range(text: str) -> tuple[int, int]:
    """ "2" -> (2, 2), "1..3" -> (1, 3). Raises ValueError."""
    first, dots, last = text.partition("..")
    try:
        least, most = int(first), int(last if dots else first)
    except ValueError:
        raise ValueError(f"--replicas {text!r}: give a number, or a range like 1..3") from None
    if not 1 <= least <= most:
        raise ValueError(f"--replicas {text!r}: at least 1, and not more at the left than at the right")
    return least, most


def served_name(model: str) -> str:
    """The registered name of models:/NAME@ALIAS; otherwise `calumma`."""
    if not model.startswith("models:/"):
        return "calumma"
    return model.removeprefix("models:/").partition("@")[0].partition("/")[0] or "calumma"


def read_settings(values: dict[str, Any]) -> ServeSettings:
    from pydantic import ValidationError

    from calumma.serve.settings import ServeSettings

    try:
        return ServeSettings(**values)
    except ValidationError as error:
        raise ValueError("\n".join(map(_told, error.errors()))) from error


def _told(error: ErrorDetails) -> str:
    """What is wrong with a field, or with several together."""
    message = error["msg"].removeprefix("Value error, ")
    field = ".".join(map(str, error["loc"]))
    return f"{field}: {message} (given {error['input']!r})" if field else message
