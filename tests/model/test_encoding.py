"""Documents to tokens and back, images of every kind, and what is trained in a conversation."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from calumma.model import Document, Image, MixedModalModel, Text

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
picture = st.integers(0, 255).map(lambda shade: PILImage.new("RGB", (16, 16), (shade, 255 - shade, 128)))


@st.composite
def segments(draw: st.DrawFn, role: str | None) -> list[Text | Image]:
    """Segments in which no two texts follow each other: such would merge."""
    result: list[Text | Image] = []
    for _ in range(draw(st.integers(1, 4))):
        if (result and isinstance(result[-1], Text)) or draw(st.booleans()):
            result.append(Image(draw(picture), role=role))  # type: ignore[arg-type]
        else:
            result.append(Text(draw(words), role=role))  # type: ignore[arg-type]
    return result


@st.composite
def documents(draw: st.DrawFn) -> Document:
    if draw(st.booleans()):
        return Document(tuple(draw(segments(None))))
    turns = [draw(segments(role)) for _ in range(draw(st.integers(1, 2))) for role in ("user", "assistant")]
    return Document(tuple(s for turn in turns for s in turn))


def shape(document: Document) -> list[tuple[str | None, str | None]]:
    return [(s.text if isinstance(s, Text) else None, s.role) for s in document.segments]


@given(document=documents())
@settings(deadline=None, max_examples=40)
def test_a_document_survives_its_tokens(model: MixedModalModel, document: Document) -> None:
    ids = model.encode(document)
    decoded = model.decode(ids)
    assert shape(decoded) == shape(document)
    for before, after in zip(document.images, decoded.images, strict=True):
        codes = model.image_tokenizer.encode(pixels(before, model))
        expected = model.image_tokenizer.decode(codes)
        assert torch.allclose(pixels(after, model), expected.clamp(-1, 1), atol=1 / 127)


def pixels(image: Image, model: MixedModalModel) -> torch.Tensor:
    from calumma.model.images import preprocess

    return preprocess(image.open(), model.image_tokenizer.config.resolution)[None]


@given(document=documents())
@settings(deadline=None, max_examples=40)
def test_the_format(model: MixedModalModel, document: Document) -> None:
    vocabulary = model.vocabulary
    ids, trained = model.encoder.encode(document)
    assert len(ids) == len(trained)
    assert (ids[0], ids[-1]) == (vocabulary.bos, vocabulary.eos)
    assert model.encode(document, complete=False) == ids[:-1]
    starts = [i for i, token in enumerate(ids) if token == vocabulary.begin_image]
    assert len(starts) == len(document.images)
    for start in starts:
        span = ids[start + 1 : start + 1 + model.image_length]
        assert set(span) <= set(vocabulary.image_ids)
        assert ids[start + 1 + model.image_length] == vocabulary.end_image
    assert sum(token in set(vocabulary.image_ids) for token in ids) == len(starts) * model.image_length


def test_only_the_answer_is_trained(model: MixedModalModel) -> None:
    picture = PILImage.new("RGB", (16, 16))
    document = Document(
        (
            Text("Which digit is this?", "user"),
            Image(picture, role="user"),
            Text("seven", "assistant"),
            Text("And", "user"),
            Text("one", "assistant"),
        )
    )
    ids, trained = model.encoder.encode(document)
    tokenizer, end_turn = model.text_tokenizer, model.vocabulary.end_turn
    kept = [token for token, train in zip(ids, trained, strict=True) if train]
    assert kept == [*tokenizer.encode("seven"), end_turn, *tokenizer.encode("one"), end_turn]


def test_turns_that_are_not_trained_have_no_loss(model: MixedModalModel) -> None:
    document = Document(
        (
            Text("Which?", "user"),
            Text("wrong", "assistant", trained=False),
            Image(PILImage.new("RGB", (16, 16)), role="assistant", trained=False),
            Text("No.", "user"),
            Text("thought", "assistant", trained=False),
            Text("right", "assistant"),
        )
    )
    ids, trained = model.encoder.encode(document)
    kept = [token for token, train in zip(ids, trained, strict=True) if train]
    assert kept == [*model.text_tokenizer.encode("right"), model.vocabulary.end_turn]


def test_a_page_is_trained_whole(model: MixedModalModel) -> None:
    assert all(model.encoder.encode(Document((Text("a page"),))).trained)


def test_a_prompt_is_padded_and_an_answer_cropped(model: MixedModalModel) -> None:
    wide = PILImage.new("RGB", (64, 16), "black")
    as_prompt = model.encode(Document((Image(wide, role="user"),)), complete=False)
    as_answer = model.encode(Document((Image(wide, role="assistant"),)), complete=False)
    square = model.encode(Document((Image(PILImage.new("RGB", (16, 16), "black"), role="assistant"),)), complete=False)
    assert as_answer == square
    assert as_prompt != as_answer


def test_an_incomplete_image_is_dropped(model: MixedModalModel) -> None:
    v = model.vocabulary
    ids = [v.begin_image, *v.image_codes[:3], v.end_image, *model.text_tokenizer.encode("on")]
    assert model.decode(ids) == Document((Text("on"),))
