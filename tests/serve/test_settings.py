"""What may be served, and how, is checked when the settings are made."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from calumma.serve.settings import ServeSettings


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError, match="min_replicas 3 is more than max_replicas 2"):
        ServeSettings(model="m", min_replicas=3, max_replicas=2)
    with pytest.raises(ValidationError, match="which model"):
        ServeSettings(model=" ")
    assert ServeSettings(model="m", host="0.0.0.0", port=81).url == "http://127.0.0.1:81"
    assert ServeSettings(model="m", host="::1", port=81).url == "http://[::1]:81"
