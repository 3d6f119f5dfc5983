"""What may be served, and how, is checked when the settings are made."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from calumma.serve.settings import APIKey, ServeSettings


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError, match="min_replicas 3 is more than max_replicas 2"):
        ServeSettings(model="m", min_replicas=3, max_replicas=2)
    with pytest.raises(ValidationError, match="which model"):
        ServeSettings(model=" ")
    assert ServeSettings(model="m", host="0.0.0.0", port=81, open=True).url == "http://127.0.0.1:81"
    assert ServeSettings(model="m", host="::1", port=81).url == "http://[::1]:81"


def test_adapters_beside_a_sharded_model_are_refused_with_what_to_do() -> None:
    with pytest.raises(
        ValidationError, match=r"give tensor_parallel 1, or merge the adapter .*`calumma export merged`"
    ):
        ServeSettings(model="m", adapters={"poet": "/adapters/poet"}, tensor_parallel=2)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "LocalHost"])
def test_this_machine_alone_needs_no_keys(host: str) -> None:
    assert not ServeSettings(model="m", host=host).keys_needed


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "gpu-1", "localhost.example.org"])
def test_others_reach_a_server_with_keys_or_one_that_is_said_to_be_open(host: str) -> None:
    with pytest.raises(ValueError, match=r"--keys FILE.*--open"):
        ServeSettings(model="m", host=host)
    assert ServeSettings(model="m", host=host, open=True).open
    assert ServeSettings(model="m", host=host, keys=(APIKey(name="a", sha256="0" * 64),)).keys_needed
    assert ServeSettings(model="m", host=host, keys_file="keys").keys_needed


@pytest.mark.parametrize(
    "wrong",
    [{"allowed_hosts": ["https://example.org"]}, {"allowed_hosts": ["a:80"]}, {"allowed_hosts": ["a.*"]}]
    + [{"allowed_origins": [name]} for name in ("example.org", "https://example.org/", "null", "https://*.org")],
)
def test_names_and_origins_are_written_as_browsers_send_them(wrong: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="should match pattern"):
        ServeSettings(model="m", **wrong)  # type: ignore[arg-type]
