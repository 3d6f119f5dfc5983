"""Documents in, documents out, with a tiny random model and a text tokenizer of single letters."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

from calumma.model import Document, Image, MixedModalModel, Text, answering, generate
from calumma.model.config import ImageTokenizerConfig, ModelConfig
from calumma.model.encoding import DocumentEncoder
from calumma.model.generation import Engine, PromptTooLong, SamplingParams
from calumma.model.tokenizers.image import ImageTokenizer
from calumma.model.tokenizers.text import TextTokenizer
from calumma.model.transformer import Output, Transformer
from calumma.model.vocabulary import Vocabulary

CONTEXT = 64
V = Vocabulary(
    size=42, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)


class Eager(Output):
    """Logits of a model that always wants to begin an image, and never to stop."""

    def forward(self, input: Tensor, measure: bool = False, columns: slice | None = None, **loss: Any) -> Tensor:
        logits = super().forward(input, **loss)
        logits[..., V.begin_image] += 100
        logits[..., [V.eos, V.end_turn]] -= 100
        return logits[..., columns or slice(None)]


class Letters:
    """A text tokenizer of one letter an id."""

    def encode(self, text: str) -> list[int]:
        return [V.text_ids[ord(letter) - ord("a")] for letter in text]

    def encode_many(self, texts: list[str]) -> list[NDArray[np.int32]]:
        return [np.array(self.encode(text), dtype=np.int32) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + V.text_ids.index(token)) for token in ids if token in V.text_ids)


@pytest.fixture
def model() -> MixedModalModel:
    shape = ImageTokenizerConfig(
        resolution=4, codebook_size=8, embedding=4, base_channels=32, multipliers=[1, 1], residual_blocks=1
    )
    config = ModelConfig(vocabulary_size=V.size, layers=1, width=16, heads=2, kv_heads=1, ffn_width=24, context=CONTEXT)
    transformer = Transformer(config)
    transformer.output = Eager(config)
    return MixedModalModel(
        transformer.initialize(0), DocumentEncoder(V, cast(TextTokenizer, Letters()), ImageTokenizer(shape))
    )


def test_generate_answers_documents_with_documents(model: MixedModalModel) -> None:
    picture = PILImage.new("RGB", (4, 4), "red")
    prompts = [
        Document((Text("abc", "user"), Image(picture, role="user"))),
        Document((Text("cab"),)),
        Document((Text("b", "user"),)),
    ]
    params = [
        SamplingParams(10, "interleaved", 1, seed=1),
        SamplingParams(5, "text", seed=2),
        SamplingParams(mode="image", seed=3),
    ]
    model.transformer.train()
    seen: list[tuple[float, float]] = []
    answers = generate(model, prompts, params, max_sequences=4, progress=lambda done, total: seen.append((done, total)))
    assert model.transformer.training
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert [type(segment) for segment in answers[0].segments] == [Image, Text]
    assert {segment.role for segment in answers[0].segments} == {"assistant"}
    assert len(answers[1].text) == 5
    assert answers[1].segments[0].role is None
    assert [type(segment) for segment in answers[2].segments] == [Image]
    assert answers[2].images[0].open().size == (4, 4)
    assert generate(model, [], SamplingParams()) == []


def test_generate_reserves_what_its_requests_need(model: MixedModalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no less: nobody gives room back, with three branches of an image each. One alone takes no sixteen contexts,
    and its answer is that beside others."""
    engines: list[Engine] = []

    def make(*args: Any, **options: Any) -> Engine:
        engines.append(Engine(*args, **options))
        return engines[-1]

    monkeypatch.setattr(answering, "Engine", make)
    picture = PILImage.new("RGB", (4, 4), "red")
    asked = [Document((Text("abc" * number, "user"), Image(picture, role="user"))) for number in range(1, 4)]
    params = [SamplingParams(mode="image", seed=number) for number in range(3)]
    answers = generate(model, asked, params)
    [alone] = generate(model, asked[:1], params[:1])
    assert alone.images[0].open().tobytes() == answers[0].images[0].open().tobytes()
    assert [engine.statistics.counters.preemptions for engine in engines] == [0, 0]
    assert [engine.max_sequences for engine in engines] == [3, 1]
    assert engines[1].statistics.blocks * engines[1].statistics.block_size <= 4 * CONTEXT


def test_generate_names_the_prompt_it_refuses(model: MixedModalModel) -> None:
    prompts = [Document((Text("a"),)), Document((Text("a" * CONTEXT),))]
    with pytest.raises(PromptTooLong, match="prompt 2 of 2: the prompt's 65 tokens"):
        generate(model, prompts, SamplingParams())
    with pytest.raises(ValueError, match="2 prompts have 1 sampling"):
        generate(model, prompts, [SamplingParams()])
