"""`calumma export adapter|merged` and `calumma import adapter`: low-rank adapters to PEFT's names and back, and into
their model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from calumma.jobs.commands.exchange import GIBIBYTE, Destination, Shard, run_conversion

if TYPE_CHECKING:
    from calumma.model.convert.names import Progress

Adapter = Annotated[
    Path, typer.Argument(metavar="SRC", help="An adapter: a folder in PEFT's format, or the output of a fine-tuning.")
]
Base = Annotated[Path, typer.Option("--model", help="The model directory that the adapter belongs to.")]
Directory = Annotated[Path, typer.Argument(metavar="MODEL", help="The model directory that the adapter belongs to.")]


def export_adapter(source: Adapter, destination: Destination, model: Base) -> None:
    """Export an adapter for PEFT on transformers' ChameleonForConditionalGeneration."""
    _convert("export", source, destination, model, "theirs")


def import_adapter(source: Adapter, destination: Destination, model: Base) -> None:
    """Import an adapter that PEFT has trained on transformers' Chameleon; `serve start --adapter` takes it as it is,
    too."""
    _convert("import", source, destination, model, "ours")


def export_merged(model: Directory, source: Adapter, destination: Destination, shard: Shard = 4.0) -> None:
    """Write a model directory with an adapter merged into its weights."""

    def convert(progress: Progress) -> None:
        from calumma.model.adapters.merging import merge_directory

        merge_directory(model, source, destination, int(shard * GIBIBYTE), progress)

    run_conversion("merge", destination, convert)


def _convert(what: str, source: Path, destination: Path, model: Path, names: Literal["ours", "theirs"]) -> None:
    def convert(progress: Progress) -> None:
        from calumma.model.adapters.files import AdapterError, read_adapter, write_adapter
        from calumma.model.adapters.names import to_hugging_face
        from calumma.model.config import FILE, ModelConfig

        if not (model / FILE).is_file():
            raise AdapterError(f"--model {model} is no model directory: there is no {FILE} in it")
        config = ModelConfig.read(model)
        adapter = read_adapter(source, config)
        write_adapter(destination, to_hugging_face(adapter, config) if names == "theirs" else adapter, str(model))
        progress(1, 1, f"{len(adapter.layers)} layers")

    run_conversion(what, destination, convert)
