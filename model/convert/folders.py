"""What a Hugging Face folder is, before anything of it is read: the kinds that cannot be converted are named with what
to do about them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from calumma.model.convert import text
from calumma.model.convert.names import ConversionError
from calumma.model.weights import FILE, INDEX


def require_weights(source: Path) -> None:
    """Raises ConversionError where a folder holds no whole model in safetensors."""
    if not source.is_dir():
        raise ConversionError(f"there is no folder {source}; give a Hugging Face folder, or hf://org/name")
    names = {path.name for path in source.iterdir()}
    if names & {FILE, INDEX}:
        return
    if "adapter_config.json" in names:
        base = text.read_json(source / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        raise ConversionError(
            f"{source} holds an adapter (PEFT) and no model: convert {base}, which it belongs to, and give the adapter "
            "beside it, or merge it first (PEFT: model.merge_and_unload().save_pretrained(...))"
        )
    for suffixes, kind in (((".bin", ".pt", ".pth"), "PyTorch's own files"), ((".gguf",), "GGUF")):
        if found := sorted(name for name in names if name.endswith(suffixes) and name != "training_args.bin"):
            raise ConversionError(
                f"{source} holds its weights in {kind} ({found[0]}), which may hold code or quantized numbers; "
                "only safetensors are read: load it with transformers and save it again "
                "(model.save_pretrained(..., safe_serialization=True))"
            )


def require_head(source: Path, names: Collection[str]) -> None:
    """Raises ConversionError for the weights of a model without its head: transformers' `...Model` classes, which give
    states and no logits, save no lm_head, and leave the prefix `model.` away."""
    if "lm_head.weight" in names:
        return
    if any(name.startswith(("layers.", "embed_tokens.")) for name in names) or _without_more(names):
        raise ConversionError(
            f"{source} has no lm_head.weight: it is a base model without a head, or one whose head is its embedding, "
            "and was not saved. Save the model with its head (AutoModelForCausalLM or "
            "ChameleonForConditionalGeneration.from_pretrained(...).save_pretrained(...)); where the two are one, set "
            "tie_word_embeddings to true in its config.json"
        )


def _without_more(names: Collection[str]) -> bool:
    """Whether all that a model needs but its head is there."""
    return {"model.embed_tokens.weight", "model.norm.weight"} <= set(names)
