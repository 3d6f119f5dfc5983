"""A policy is named in the settings, and one that cannot be made is told before anything starts."""

from __future__ import annotations

import pytest

from calumma.serve.safety import load_policy
from calumma.serve.settings import Safety


@pytest.mark.parametrize(
    ("safety", "says"),
    [
        (Safety(policy="nowhere:policy"), "no package.module:callable"),
        (Safety(policy="calumma.serve.safety"), "no package.module:callable"),
        (Safety(policy="calumma.serve.safety:keywords", options={"wrods": []}), "do not fit"),
        (Safety(policy="calumma.serve.safety:keywords", options={"words": []}), "at least one word"),
        (Safety(policy="builtins:str"), "cannot be called"),
    ],
)
def test_a_policy_that_cannot_be_made_is_told(safety: Safety, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_policy(safety)
