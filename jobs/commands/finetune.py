"""`calumma finetune MODEL DATA`: from a model and a file of examples to a registered model."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from calumma.jobs.tuning.steps import Outcome


BITS: dict[str | None, Literal[4, 8] | None] = {None: None, "4": 4, "8": 8}


def finetune(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model directory, the output of a stage, a Hugging Face Chameleon folder, or models:/NAME@ALIAS.",
        ),
    ],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Conversations, pairs of images and texts, or preferences: a file, a folder, s3://, hf://, …",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to work in: data, model, report, YAML of every job.")],
    lora: Annotated[
        int | None, typer.Option("--lora", min=1, metavar="RANK", help="Train low-rank adapters; default: all weights.")
    ] = None,
    dora: Annotated[bool, typer.Option("--dora", help="Adapters with a magnitude of their own (DoRA).")] = False,
    quantize: Annotated[
        Literal["4", "8"] | None,
        typer.Option(help="Bits of the frozen weights below --lora's adapters (QLoRA); default: as many as they have."),
    ] = None,
    preference: Annotated[
        Literal["dpo", "ipo", "orpo"] | None,
        typer.Option(help="How to learn from pairs of a chosen and a rejected answer; default: dpo."),
    ] = None,
    beta: Annotated[float, typer.Option(min=1e-6, help="How strongly a pair of answers pulls.")] = 0.1,
    image_weight: Annotated[
        float | None,
        typer.Option(min=0, help="Of an image code in an answer of a pair, beside 1 of a text token; default: 1, too."),
    ] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the examples.")] = 3.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, in place of --epochs.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Its peak; default: by the model's width.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples a step, about; default: 32, or fewer.")] = None,
    context: Annotated[
        int | None, typer.Option(min=16, help="Tokens of a row; default: as the examples need, the model's at most.")
    ] = None,
    packing: Annotated[
        Literal["apart", "together", "off"],
        typer.Option(
            help="Several examples in a row: apart, each as if alone; together, seeing those before; or off, one each."
        ),
    ] = "apart",
    held_out: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of the examples that measures instead of training.")
    ] = 0.05,
    max_bad_share: Annotated[
        float, typer.Option(min=0, max=1, help="Refuse data of which more than this is wrong.")
    ] = 0.01,
    format: Annotated[str | None, typer.Option(help="Read the data as this format; default: what it seems.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the reader, as NAME=VALUE (YAML); may be given again.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Held-out questions that are answered before and after.")] = 4,
    name: Annotated[str | None, typer.Option(help="Name in the model registry; default: that of --out.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option("--tracking-uri", help="MLflow tracking URI; default: as for jobs.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the examples and of new adapters.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Discard what was made in --out, and start over.")] = False,
) -> None:
    """Fine-tune a model: look at the data, tokenize it, train, register, and write a report with answers before and
    after. Called again, it goes on where it was interrupted."""
    from calumma.jobs import entry

    def body() -> None:
        from calumma.jobs.commands.data import reader_options
        from calumma.jobs.tuning import report
        from calumma.jobs.tuning.settings import Options
        from calumma.jobs.tuning.steps import finetune as run_steps
        from calumma.platform.cluster.progress import Display

        options = Options(
            model=model, data=data, out=out, lora=lora, dora=dora, quantize=BITS[quantize],
            preference=preference, beta=beta, image_weight=image_weight, epochs=epochs,
            steps=steps, learning_rate=learning_rate, batch=batch, context=context, packing=packing, held_out=held_out,
            max_bad_share=max_bad_share, samples=samples, name=name,
            tracking_uri=tracking_uri, seed=seed,
        )  # fmt: skip
        with Display() as display:
            outcome = run_steps(options, format, reader_options(option or []), display, force)
        place = report.write(outcome)
        for line in _told(outcome, place):
            typer.echo(line)

    code = entry.exit_code_of(body, shlex.join(["calumma", *sys.argv[1:]]), _print_error)
    if code:
        raise typer.Exit(code)


def _told(outcome: Outcome, place: str) -> list[str]:
    parts = outcome.parts
    lines = [
        f"{outcome.model}: {'already done, kept' if outcome.skipped else 'done'}",
        f"  examples   {parts.train:,} trained on, {parts.held_out:,} held out",
    ]
    lines += [f"  left out   {line}" for line in outcome.found.told()]
    if "loss" in outcome.before and "loss" in outcome.after:
        lines.append(f"  held out   loss {outcome.before['loss']:.4f} before, {outcome.after['loss']:.4f} after")
    if "preference/accuracy" in outcome.after:
        lines.append(f"  held out   {outcome.after['preference/accuracy']:.1%} of the pairs the right way round")
    return [*lines, f"  report     {place}", f"  serve it   {shlex.join(outcome.serve_command)}"]


def _print_error(text: str) -> None:
    typer.secho(text, err=True, fg=typer.colors.RED)
