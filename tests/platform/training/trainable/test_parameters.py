"""Training a part of the weights: names by pattern, rows of images, low-rank adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from calumma.model.config import ModelConfig
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary
from calumma.platform.specification import SpecificationError
from calumma.platform.training.specification import PretrainSpecification
from calumma.platform.training.trainable import lora, parameters

SHAPE = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=64, context=32, vocabulary_size=50)
IMAGE_IDS = list(range(40, 48))
VOCABULARY = Vocabulary(
    size=50, pad=0, bos=1, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=IMAGE_IDS
)

BIASES = {"query_key_value_bias": True, "attention_output_bias": True, "feed_forward_bias": True}
# As text models have it that were extended.
TEXT = SHAPE.model_copy(update={"tied": True, "query_key_norm": "rms", **BIASES})
UNTIED = TEXT.model_copy(update={"tied": False})

Stage = Callable[..., PretrainSpecification]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"trainable": "blocks.9.*"}, r"trainable: 'blocks\.9\.\*' .* there are blocks\.\*\.attention\.key\.weight"),
        ({"trainable": ["image_head", "output.*"]}, "trains output.weight as a whole, of which `image_head` is a part"),
        ({"lora": {"targets": ["output"]}}, r"lora\.targets: 'output' .* there are blocks\.\*\.attention\.key"),
        ({"trainable": ["image_rows", "embedding.*"]}, "trains embedding.weight as a whole, of which `image_rows` is"),
        ({"trainable": ["image_rows", "image_head"]}, "`image_head` is a part of `image_rows`; choose one"),
        ({"lora": {}, "trainable": "blocks.0.*"}, "as a whole, for which lora.targets asks for an adapter"),
    ],
)
def test_names_that_fit_nothing_are_refused_with_those_there_are(
    stage: Stage, fields: dict[str, Any], said: str
) -> None:
    with torch.device("meta"):
        transformer = Transformer(SHAPE)
    with pytest.raises(SpecificationError, match=said):
        parameters.check_trainable(transformer, stage(**fields))


@pytest.mark.parametrize("fields", [{"lora": {}}, {"trainable": "image_head"}, {"lora": {}, "trainable": "image_head"}])
def test_what_is_added_changes_nothing_before_it_is_trained(stage: Stage, fields: dict[str, Any]) -> None:
    plain = Transformer(SHAPE).initialize(0)
    expected, tokens = plain.state_dict(), torch.arange(20)[None]
    logits = plain(tokens)
    spec = stage(**fields)
    prepared = parameters.set_trainable(plain, spec, VOCABULARY)
    assert torch.equal(prepared(tokens), logits)
    found = parameters.plain_weights(prepared.state_dict(), spec, VOCABULARY)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("shape", [TEXT, UNTIED])
def test_rows_of_images_and_adapters_beside_biases_are_trained_alone(stage: Stage, shape: ModelConfig) -> None:
    spec = stage(lora={"rank": 3}, trainable="image_rows")
    plain = Transformer(shape).initialize(0)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    before, tokens = {name: weight.clone() for name, weight in plain.state_dict().items()}, torch.arange(50)[None, 20:]
    expected = plain(tokens)
    model = parameters.set_trainable(plain, spec, VOCABULARY)
    assert torch.equal(model(tokens), expected)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
        "image_rows",
        "lora_down",
        "lora_up",
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    logits = model(tokens[:, :-1])
    assert isinstance(logits, torch.Tensor)
    torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]).backward()
    optimizer.step()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = parameters.plain_weights(weights, spec, VOCABULARY)
    assert found.keys() == before.keys()
    rows = torch.zeros(50, dtype=torch.bool)
    rows[[4, 5, *IMAGE_IDS]] = True
    for name in {"embedding.weight", "output.weight"} & found.keys():
        assert (found[name] != before[name]).any(1).tolist() == rows.tolist()
    merged = Transformer(shape)
    merged.load_state_dict(found)
    torch.testing.assert_close(merged(tokens), model(tokens), rtol=1e-4, atol=1e-4)


def test_an_output_that_is_the_embedding_has_no_head_of_its_own(stage: Stage) -> None:
    with pytest.raises(SpecificationError, match="`image_head` trains rows of the output projection alone"):
        parameters.check_trainable(Transformer(TEXT), stage(trainable="image_head"))


def test_merged_adapters_say_what_the_adapted_model_says(stage: Stage) -> None:
    spec = stage(lora={"rank": 3, "alpha": 7, "targets": ["*.query", "*.down"]}, trainable="image_head")
    adapted = parameters.set_trainable(Transformer(SHAPE).initialize(0), spec, VOCABULARY)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2 + 1
    assert all(parameters.is_added(name) for name in trained)
    for name, parameter in adapted.named_parameters():
        if name in trained:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    merged = Transformer(SHAPE)
    merged.load_state_dict(parameters.plain_weights(adapted.state_dict(), spec, VOCABULARY))
    tokens = torch.arange(30)[None]
    torch.testing.assert_close(merged(tokens), adapted(tokens), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(tokens), Transformer(SHAPE).initialize(0)(tokens), atol=0.1)


def test_adapters_are_scaled_by_alpha_over_their_rank(stage: Stage) -> None:
    """As in section 4.1 of the paper: W x + alpha / r * B A x, in the layer and in what it is merged into."""
    spec = stage(lora={"rank": 4, "alpha": 6, "targets": ["blocks.0.attention.query"]})
    adapted = parameters.set_trainable(Transformer(SHAPE).initialize(0), spec, VOCABULARY)
    layer: Any = adapted.get_submodule("blocks.0.attention.query")
    torch.nn.init.normal_(layer.lora_up, generator=torch.Generator().manual_seed(0))
    x, w, a, b = (t.detach().double() for t in (torch.randn(5, 32), layer.weight, layer.lora_down, layer.lora_up))
    expected = x @ w.T + 1.5 * (x @ a.T) @ b.T
    torch.testing.assert_close(layer(x.float()).double(), expected, rtol=1e-5, atol=1e-5)
    merged = parameters.plain_weights(adapted.state_dict(), spec, VOCABULARY)["blocks.0.attention.query.weight"]
    torch.testing.assert_close(x @ merged.double().T, expected, rtol=1e-5, atol=1e-5)


def test_adapters_are_a_function_of_the_seed_and_as_large_as_their_rank(stage: Stage) -> None:
    def adapters(seed: int) -> dict[str, torch.Tensor]:
        model = Transformer(SHAPE).initialize(0)
        lora.add_adapters(model, stage(lora={"rank": 5}).lora, seed)  # type: ignore[arg-type]
        return {name: p for name, p in model.named_parameters() if parameters.is_added(name)}

    one, same, other = adapters(1), adapters(1), adapters(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    down = "blocks.1.feed_forward.up.lora_down"
    assert not torch.equal(one[down], other[down])
    assert one[down].shape == (5, 32)
    assert len(one) == 2 * 2 * 7  # two matrices for each of seven layers of two blocks
