"""Text models made mixed-modal: what they say to text, as transformers computes it, stays; images come after."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from calumma.model import Image, MixedModalModel, Text, load
from calumma.model.convert import extend_hugging_face
from calumma.model.convert.text_model import Extension
from calumma.model.document import Document
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
    from PIL import Image as PILImage

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
