"""An output's text as it may be sent: stop strings are found however the text is cut, tokens go with their text."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.model import MixedModalModel
from calumma.serve.replica.text_stream import StopChecker, TextStream

letters = st.text("ab", max_size=12)
stops = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def reference(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first stop string that completes cuts, the longest of several."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


@given(text=letters, stops=stops, data=st.data())
def test_stop_strings_cut_the_same_however_the_text_comes(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    watch, shown = StopChecker(stops), ""
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        shown += watch.push(text[begin:end])
        assert reference(text, stops)[0].startswith(shown), "nothing is shown that is cut later"
    shown += watch.finish()
    assert (shown, watch.stopped) == reference(text, stops)


@given(before=letters, text=letters, stops=stops)
def test_stop_strings_that_complete_too_early_do_not_cut(before: str, text: str, stops: list[str]) -> None:
    watch = StopChecker(stops)
    shown = watch.push(before, stops=False) + watch.push(text) + watch.finish()
    ends = range(len(before) + 1, len(before + text) + 1)
    cuts = [min(end - len(s) for s in found) for end in ends if (found := _completed((before + text)[:end], stops))]
    assert shown == (before + text)[: max(cuts[0], len(shown)) if cuts else None]
    assert watch.stopped == bool(cuts)
    assert len(shown) >= min([len(before + text), *cuts[:1]])


def _completed(text: str, stops: list[str]) -> list[str]:
    return [stop for stop in stops if text.endswith(stop)]


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    watch = StopChecker(["\n\nUser:"])
    assert watch.push("two\n") == "two"
    assert watch.push("\nUse") == ""
    assert watch.push("d three") == "\n\nUsed three"


@given(text=st.text("aé€😀 b", max_size=10), stops=st.lists(st.text("aé b", min_size=1, max_size=2), max_size=2))
def test_every_shown_character_has_its_tokens(model: MixedModalModel, text: str, stops: list[str]) -> None:
    tokenizer = model.text_tokenizer
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer.stream_decoder(), stops, tokens=True)
    pieces = [stream.push(token, tokenizer.surface(token), -float(at)) for at, token in enumerate(ids)]
    found = [piece for piece in [*pieces, stream.finish()] if piece]
    shown = "".join(piece.text for piece in found)
    tokens = [token for piece in found for token in piece.tokens]
    assert shown == reference(text, stops)[0]
    assert [token.id for token in tokens] == ids[: len(tokens)], "in order, without a gap"
    assert [token.logprob for token in tokens] == [-float(at) for at in range(len(tokens))]
    assert b"".join(token.surface for token in tokens).decode(errors="ignore").startswith(shown)
    if not stops:
        assert len(tokens) == len(ids)
    for token in tokens:
        assert (
            shown[token.begin :].encode().startswith(token.surface[:1])
            or token.begin >= len(shown)
            or any(byte >= 0x80 for byte in token.surface)
        )


def test_positions_of_tokens_add_up(model: MixedModalModel) -> None:
    tokenizer = model.text_tokenizer
    ids = tokenizer.encode("Count from two")
    stream = TextStream(tokenizer.stream_decoder(), tokens=True)
    pieces = [stream.push(token, tokenizer.surface(token)) for token in ids]
    tokens = [token for piece in pieces if piece for token in piece.tokens]
    lengths = [len(tokenizer.surface(token)) for token in ids]
    assert [token.begin for token in tokens] == [0, *accumulate(lengths)][:-1]


def test_nothing_follows_a_stop(model: MixedModalModel) -> None:
    tokenizer = model.text_tokenizer
    stream = TextStream(tokenizer.stream_decoder(), ["two"])
    for token in tokenizer.encode("Count from two"):
        stream.push(token, b"")
    assert stream.stopped
    assert stream.push(tokenizer.encode("x")[0], b"x") is None
    assert stream.finish() is None


@pytest.mark.parametrize("stop", ["é", "\U0001f600"])
def test_a_stop_string_may_be_a_character_of_several_tokens(model: MixedModalModel, stop: str) -> None:
    tokenizer = model.text_tokenizer
    stream = TextStream(tokenizer.stream_decoder(), [stop])
    pieces = [stream.push(token, tokenizer.surface(token)) for token in tokenizer.encode(f"ab{stop}cd")]
    assert "".join(piece.text for piece in pieces if piece) == "ab"
    assert stream.stopped
