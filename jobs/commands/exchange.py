"""`calumma import hf|meta`, `calumma extend hf` and `calumma export hf`: models of other projects to model directories,
and back."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from calumma.model.convert.names import Progress

GIBIBYTE = 2**30

import_app = typer.Typer(
    help="Make a model directory from a model of another project.", no_args_is_help=True, pretty_exceptions_enable=False
)
export_app = typer.Typer(
    help="Make a model of another project from a model directory.", no_args_is_help=True, pretty_exceptions_enable=False
)
extend_app = typer.Typer(
    help="Make a mixed-modal model directory from a text model.", no_args_is_help=True, pretty_exceptions_enable=False
)
Destination = Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; it must not exist.")]
Shard = Annotated[float, typer.Option("--shard-gib", min=1e-6, help="Weights are split into files of about this size.")]


@export_app.callback()
def exports() -> None:
    """Make a model of another project from a model directory."""


@extend_app.callback()
def extends() -> None:
    """Make a mixed-modal model directory from a text model."""


class AddedNorm(StrEnum):
    LAYER = "layer"
    RMS = "rms"


@import_app.command("hf")
def import_hf(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face Chameleon folder, or hf://org/name.")],
    destination: Destination,
    vqgan: Annotated[
        Path | None,
        typer.Option(
            help="vqgan.ckpt of Meta's release, or its folder: brings the decoder, without which the model "
            "draws no images."
        ),
    ] = None,
    vqgan_config: Annotated[Path | None, typer.Option(help="Its vqgan.yaml; default: the one beside it.")] = None,
    shard: Shard = 4.0,
) -> None:
    """Import a Hugging Face folder: config.json, safetensors, tokenizer.json."""

    def convert(progress: Progress) -> None:
        from calumma.model.convert import import_hugging_face

        checkpoint = vqgan / "vqgan.ckpt" if vqgan is not None and vqgan.is_dir() else vqgan
        settings = None
        if checkpoint is not None:
            settings = read_yaml(vqgan_config or checkpoint.with_name("vqgan.yaml"))
        with local_model(source) as folder:
            draws = import_hugging_face(folder, destination, checkpoint, settings, int(shard * GIBIBYTE), progress)
        if not draws:
            typer.echo("the model reads images and draws none: no decoder was given (--vqgan)", err=True)

    run_conversion("import", destination, convert)


@import_app.command("meta")
def import_meta_release(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder of Meta's release: params.json, *.pth.")],
    destination: Destination,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder of text_tokenizer.json, vqgan.ckpt, vqgan.yaml; default: SRC, SRC/tokenizer, "
            "SRC/../../tokenizer."
        ),
    ] = None,
    shard: Shard = 4.0,
) -> None:
    """Import Meta's release, in however many shards it comes."""

    def convert(progress: Progress) -> None:
        from calumma.model.convert import import_meta
        from calumma.model.convert.meta import tokenizer_folder

        folder = tokenizer or tokenizer_folder(source)
        settings = read_yaml(folder / "vqgan.yaml")
        import_meta(source, destination, folder, settings, int(shard * GIBIBYTE), progress)

    run_conversion("import", destination, convert)


@export_app.command("hf")
def export_hf(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A model directory.")],
    destination: Destination,
    push: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Upload it to this repository of Hugging Face's hub, made if it is new."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see a repository that is new.")] = False,
    shard: Shard = 4.0,
) -> None:
    """Export for transformers' ChameleonForConditionalGeneration, with tokenizer and processor."""

    def convert(progress: Progress) -> None:
        from calumma.model.convert import export_hugging_face
        from calumma.platform.storage import hub

        if push is not None:
            hub.require_name(push)
        export_hugging_face(source, destination, int(shard * GIBIBYTE), progress)
        if push is not None:
            typer.echo(hub.upload_model(destination, push, private=not public))

    run_conversion("export", destination, convert)


@extend_app.command("hf")
def extend_hf(
    source: Annotated[
        str,
        typer.Argument(
            metavar="TEXT_MODEL", help="A Hugging Face folder, or hf://org/name, of a Llama, Mistral, Qwen 2, 2.5 or 3."
        ),
    ],
    image_tokenizer: Annotated[
        Path,
        typer.Option(metavar="DIR", help="What train_image_tokenizer made, or a model directory, whose own is taken."),
    ],
    out: Annotated[Path, typer.Option(metavar="DST", help="The folder to write; it must not exist.")],
    context: Annotated[int | None, typer.Option(min=2, help="A shorter context than the text model's.")] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="An output projection of its own, where the text model's is its embedding.")
    ] = False,
    query_key_norm: Annotated[
        AddedNorm | None,
        typer.Option(help="Add normalization of queries and keys: steadier training, but the text's logits change."),
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option(
            "--chat-template/--no-chat-template", help="Write conversations as the text model does, or as calumma does."
        ),
    ] = True,
    spread: Annotated[
        float, typer.Option(min=0, help="Covariance of the new rows, as a part of that of the text's rows.")
    ] = 1e-5,
    seed: Annotated[int, typer.Option(help="Of the new rows.")] = 0,
    shard: Shard = 4.0,
) -> None:
    """Make a mixed-modal model directory: the text model's weights, ids, tokenizer and chat template, and after its ids
    those of images. What it says to text stays as it was; it draws nothing sensible until it is trained
    (jobs/recipes/extend)."""

    def convert(progress: Progress) -> None:
        from calumma.model.convert import extend_hugging_face

        with local_model(source) as folder:
            made = extend_hugging_face(
                folder,
                out,
                image_tokenizer,
                context=context,
                untie=untie,
                query_key_norm=None if query_key_norm is None else query_key_norm.value,
                chat_template=chat_template,
                spread=spread,
                seed=seed,
                shard_bytes=int(shard * GIBIBYTE),
                progress=progress,
            )
        for line in made.told:
            typer.echo(line, err=True)
        typer.echo(f"{made.further} ids follow the text model's {made.config.vocabulary_size - made.further}", err=True)

    run_conversion("extend", out, convert)


@contextmanager
def local_model(source: str) -> Iterator[Path]:
    """A folder that is given, or the copy of a repository of Hugging Face's hub. Raises StorageError."""
    from calumma.platform.storage import hub

    yield hub.download_model(source) if source.startswith("hf://") else Path(source)


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises ConversionError when the file is missing or is no YAML mapping."""
    import yaml

    from calumma.model.convert import ConversionError

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds no settings")
    return value


def run_conversion(name: str, destination: Path, convert: Callable[[Progress], None]) -> None:
    """Run a conversion with its progress, and end the command with its exit code."""
    from calumma.jobs import entry
    from calumma.platform.cluster.progress import Display

    def body() -> None:
        from calumma.model.convert import ConversionError

        try:
            with Display() as display, display.step(name) as progress:
                convert(progress)
        except OSError as error:  # a full disk, a folder that may not be written to
            raise ConversionError(f"nothing was written to {destination}: {error}") from error
        typer.echo(str(destination))

    def print_error(text: str) -> None:
        typer.secho(text, err=True, fg=typer.colors.RED)

    if code := entry.exit_code_of(body, shlex.join(["calumma", *sys.argv[1:]]), print_error):
        raise typer.Exit(code)
