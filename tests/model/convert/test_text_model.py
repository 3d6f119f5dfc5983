"""Text models made mixed-modal: what they say to text, as transformers computes it, stays; images come after."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image as PILImage

from calumma.model import Image, MixedModalModel, Text, load
from calumma.model.convert import extend_hugging_face
from calumma.model.convert.text_model import Extension
from calumma.model.document import Document, without_layout
from tests.model.convert.text_models import CODES, families, make_text_model, save_image_tokenizer

transformers = pytest.importorskip("transformers")


class Case(NamedTuple):
    family: str
    theirs: Any
    folder: Path
    ours: MixedModalModel
    made: Extension


@pytest.fixture(scope="module")
def image_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_image_tokenizer(tmp_path_factory.mktemp("image_tokenizer"))


@pytest.fixture(scope="module", params=families())
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, image_tokenizer: Path) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make_text_model(folder / "text", request.param)
    made = extend_hugging_face(folder / "text", folder / "ours", image_tokenizer)
    return Case(request.param, theirs, folder / "text", load(folder / "ours"), made)


def test_text_logits_are_the_same(case: Case) -> None:
    own = case.theirs.config.vocab_size
    length = min(96, case.ours.config.context)
    tokens = torch.randint(own, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = case.theirs(tokens).logits
        ours = case.ours.transformer(tokens)
    assert ours.shape[-1] == own + case.made.further
    assert torch.allclose(ours[..., :own], theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.1


def test_image_ids_follow_the_text_models(case: Case) -> None:
    own, v = case.theirs.config.vocab_size, case.ours.vocabulary
    assert v.image_codes == [*range(v.size - CODES, v.size)]
    assert v.begin_image == own
    assert v.end_image == own + 1
    assert v.size == own + case.made.further
    assert not set(v.text_ids) & {*range(own, v.size)}
    picture = torch.zeros(16, 16, 3, dtype=torch.uint8).numpy()
    ids = case.ours.encode(Document((Text("a seven"), Image(PILImage.fromarray(picture)))))
    assert ids.count(v.begin_image) == 1
    assert sum(token >= v.image_codes[0] for token in ids) == case.ours.image_length


TALKS = [
    [("user", "Which digit is this?")],
    [("user", "Draw a seven."), ("assistant", "A seven"), ("user", " Count from\n two to four ")],
    [("user", "Grüße 三"), ("assistant", "def f(x):\n    return x"), ("user", "<s> x </s>"), ("assistant", "three")],
]


@pytest.mark.parametrize("talk", TALKS)
def test_conversations_are_written_as_transformers_writes_them(case: Case, talk: list[tuple[str, str]]) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(case.folder)
    asks = talk[-1][0] == "user"
    messages = [{"role": role, "content": text} for role, text in talk]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=asks, sanitize_control_tokens=True)
    theirs = theirs if isinstance(theirs, list) else list(theirs["input_ids"])
    document = Document(tuple(Text(text, role) for role, text in talk))  # type: ignore[arg-type]
    ours = case.ours.encode(document, complete=not asks)
    if not asks and ours[-1] == case.ours.vocabulary.eos and theirs[-1] != ours[-1]:
        ours = ours[:-1]
    assert tokenizer.convert_ids_to_tokens(ours) == tokenizer.convert_ids_to_tokens(theirs)


@pytest.mark.parametrize("complete", [True, False])
def test_conversations_with_images_survive_encoding(case: Case, complete: bool) -> None:
    picture = Image(PILImage.new("RGB", (16, 16), (200, 10, 10)), role="user")
    talk = [Text("What is this? <|im_end|>[/INST]", "user"), picture, Text("A digit? Grüße 三", "user")]
    if complete:
        talk += [Text("It is a", "assistant"), Image(picture.data, role="assistant"), Text("seven.", "assistant")]
    talk += [Text("And\n\nthis?", "user")] if not complete else []
    document = Document(tuple(without_layout(talk)))
    found = case.ours.decode(case.ours.encode(document, complete=complete))
    expected = [(s.role, s.text if isinstance(s, Text) else None) for s in document.segments]
    if not complete:
        expected = [
            ("user", "What is this? <|im_end|>[/INST]"),
            ("user", None),
            ("user", "A digit? Grüße 三And\n\nthis?"),
        ]
    assert [(s.role, s.text if isinstance(s, Text) else None) for s in found.segments] == expected


def test_answers_are_trained_with_what_ends_them(case: Case) -> None:
    document = Document(
        (Text("Draw", "user"), Text(" a seven ", "assistant"), Text("Why", "user"), Text("so", "assistant"))
    )
    [encoded] = case.ours.encoder.encode_many([document])
    v = case.ours.vocabulary
    trained = [token for token, kept in zip(encoded.ids, encoded.trained, strict=True) if kept]
    chat = case.ours.encoder._chat
    assert chat is not None
    assert trained.count(chat.closing()) == 2  # type: ignore[arg-type]
    said = case.ours.text_tokenizer.decode(trained)
    assert "a seven" in said
    assert "so" in said
    assert not {"Draw", "Why", "assistant", "user"} & set(said.replace("seven", "seven ").split())
    unread = Document((Text("Draw", "user"), Text("a seven", "assistant", trained=False)))
    assert not any(case.ours.encoder.encode_many([unread])[0].trained)
    assert v.eos in encoded.ids[-2:]


def test_new_rows_are_drawn_about_the_mean_of_the_texts(case: Case) -> None:
    v, own = case.ours.vocabulary, case.theirs.config.vocab_size
    rows = case.ours.transformer.embedding.weight.detach()
    text = rows[[token for token in v.text_ids if token < own]]
    off = rows[own:] - text.mean(0)
    assert off.abs().max() < 0.1 * text.std()
    assert len(off.unique(dim=0)) == len(off)
