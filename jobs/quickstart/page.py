"""report.html: one file that needs nothing else, light or dark as the reader's system is."""

from __future__ import annotations

import base64
import io
from html import escape

from calumma.jobs.quickstart import steps
from calumma.jobs.quickstart.questions import Answer
from calumma.jobs.quickstart.report import MEASURED, STAGES, TARGETS, Curve, Story, goal, shown
from calumma.platform.cluster.progress import format_duration

TEXT, IMAGE = "#3b82f6", "#f08c2e"  # readable on white and on black
INK = "#010203"  # stands for the page's own text colour in drawings
KINDS = {
    "recognition": "Picture to word",
    "generation": "Word to picture",
    "interleaved": "Words and pictures in turn",
}
STYLE = """
:root { color-scheme: light dark; --ground: #fbfbf9; --card: #ffffff; --ink: #1c2430; --faint: #667085;
  --line: #e3e5e8; --accent: #2f7d4f; --question: #e8f3ec; --bar: #8fc7a4; --miss: #b45309; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161b; --card: #1a2027; --ink: #e6e9ed; --faint: #98a2b3;
  --line: #2c343d; --accent: #6fc58f; --question: #1f3328; --bar: #3d7a55; --miss: #f0a04b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; margin: 0 0 .25rem; letter-spacing: -.02em; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .9rem; }
h3 { font-size: .95rem; margin: 0 0 .8rem; color: var(--faint); font-weight: 600; }
p.lead { color: var(--faint); margin: 0; max-width: 46rem; }
p.note { color: var(--miss); font-weight: 600; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.25rem; }
.columns { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17.5rem, 1fr)); }
.numbers { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); margin-top: 1.5rem; }
.numbers b { display: block; font-size: 2.1rem; line-height: 1.2; letter-spacing: -.02em; color: var(--accent); }
.numbers .miss b { color: var(--miss); }
.numbers span { color: var(--faint); font-size: .88rem; }
.turn { margin: 0 0 1.3rem; }
.turn:last-child { margin-bottom: 0; }
.question { background: var(--question); border-radius: 12px 12px 2px 12px; padding: .5rem .8rem; margin-left: 2rem; }
.answer { padding: .6rem .2rem 0; display: flex; flex-wrap: wrap; gap: .5rem; align-items: center;
  overflow-wrap: anywhere; }
.digit { width: 72px; height: 72px; image-rendering: pixelated; border-radius: 8px; display: block; }
.question .digit { margin-top: .4rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .42rem .6rem .42rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; font-size: .85rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { background: var(--bar); height: .7rem; border-radius: 3px; min-width: 2px; }
figure { margin: 0 0 1rem; } figcaption { color: var(--faint); font-size: .88rem; margin-bottom: .5rem; }
figure img, figure svg { max-width: 100%; height: auto; border-radius: 6px; }
pre { margin: .2rem 0 1rem; padding: .7rem .9rem; background: var(--question); border-radius: 8px; overflow-x: auto; }
code { font: .9rem/1.4 ui-monospace, monospace; }
"""


def page(story: Story) -> str:
    """The whole page."""
    parts = [
        _head(story),
        _section("Asked over HTTP", _conversations(story.answers)),
        _section("Learning curves", _curves(story)),
        _section("Pictures", _sheets(story.sheets)),
        _section("Results", _results(story)),
        _section("Time", _seconds(story.results["seconds"])),
        _section("Go on", _commands(story.commands)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>calumma quickstart</title>\n<style>{STYLE}</style>\n</head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}" if body else ""


def _head(story: Story) -> str:
    total = format_duration(sum(story.results["seconds"].values()))
    note = (
        '<p class="note">Made with --fast: a few steps of everything. It shows that the machinery works, the model has '
        "learned next to nothing.</p>"
        if story.fast
        else ""
    )
    return (
        "<h1>calumma quickstart</h1>\n"
        '<p class="lead">One Transformer over one vocabulary of text and image tokens, trained from raw documents on '
        f"this machine in {escape(total)}, then evaluated on scans it had never seen and served over HTTP.</p>\n{note}"
        f'<div class="numbers">{"".join(_number(name, story.results[name]) for name in TARGETS)}</div>'
    )


def _number(name: str, value: float) -> str:
    reached = value >= TARGETS[name]
    title = escape(f"{MEASURED[name]} (target {goal(name)})")
    return f'<div class="card{"" if reached else " miss"}"><b>{shown(name, value)}</b><span>{title}</span></div>'


def _conversations(answers: list[Answer]) -> str:
    cards = []
    for kind, title in KINDS.items():
        turns = "".join(_turn(answer) for answer in answers if answer.kind == kind)
        cards.append(f'<div class="card"><h3>{escape(title)}</h3>{turns}</div>')
    return f'<div class="columns">{"".join(cards)}</div>'


def _turn(answer: Answer) -> str:
    question = escape(answer.question)
    if answer.picture:
        question += _digit(answer.picture, f"a held-out scan of {answer.shows}")
    pieces = [
        _digit(part.value, "drawn by the model") if part.kind == "image" else f"<span>{escape(part.value)}</span>"
        for part in answer.parts
    ]
    said = "".join(pieces) or "<em>(no answer)</em>"
    return f'<div class="turn"><div class="question">{question}</div><div class="answer">{said}</div></div>'


def _digit(url: str, what: str) -> str:
    return f'<img class="digit" alt="{escape(what)}" title="{escape(what)}" src="{escape(url)}">'


def _curves(story: Story) -> str:
    figures = []
    losses = {step: story.curves.get(step, {}) for step in STAGES}
    if any("loss_text" in curves for curves in losses.values()):
        caption = "Training loss of the three stages, nats a token"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{_loss_drawing(losses)}</figure>")
    reconstruction = story.curves.get("train_image_tokenizer", {}).get("reconstruction")
    if reconstruction is not None:
        caption = "Image tokenizer: squared error of reconstructed training images"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{_one_drawing(reconstruction)}</figure>")
    return f'<div class="card">{"".join(figures)}</div>' if figures else ""


def _loss_drawing(losses: dict[str, dict[str, Curve]]) -> str:
    """Text and image loss over all stages, one after the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4))
    axes = figure.add_subplot()
    titles = {step.name: step.title for step in steps.STEPS}
    offset = 0
    for number, (step, curves) in enumerate(losses.items()):
        end = 0
        for metric, label, colour in (("loss_text", "text tokens", TEXT), ("loss_image", "image tokens", IMAGE)):
            if (curve := curves.get(metric)) is not None:
                x = [offset + s for s in curve.steps]
                axes.plot(x, curve.values, color=colour, linewidth=1.6, label=label if not number else None)
                end = max(end, *curve.steps)
        if offset:
            axes.axvline(offset, color=INK, linewidth=0.6, alpha=0.5)
        axes.text(offset + end / 2, 1.02, titles[step], ha="center", transform=axes.get_xaxis_transform(), color=INK)
        offset += end
    axes.set_xlabel("optimizer step", color=INK)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=INK)
    return _svg(figure)


def _one_drawing(curve: Curve) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.4))
    axes = figure.add_subplot()
    axes.plot(curve.steps, curve.values, color=IMAGE, linewidth=1.6)
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step", color=INK)
    return _svg(figure)


def _svg(figure: object) -> str:
    """A matplotlib figure as inline SVG in the page's own text colour."""
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(which="both", colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :].replace(INK, "currentColor")


def _sheets(sheets: dict[str, bytes]) -> str:
    figures = [
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'
        for title, png in sheets.items()
    ]
    return f'<div class="card">{"".join(figures)}</div>'


def _results(story: Story) -> str:
    rows = []
    for name, title in MEASURED.items():
        value = story.results[name]
        target = goal(name) if name in TARGETS else ""
        if name in TARGETS:
            target += ": reached" if value >= TARGETS[name] else ": missed"
        rows.append(f'<tr><td>{escape(title)}</td><td class="number">{shown(name, value)}</td><td>{target}</td></tr>')
    model = f"{escape(story.results['model_uri'])} in {escape(story.results['model_directory'])}"
    return (
        '<div class="card"><table><tr><th>What</th><th>Measured</th><th>Target</th></tr>'
        f"{''.join(rows)}</table><p>The model: <code>{model}</code></p></div>"
    )


def _seconds(seconds: dict[str, float]) -> str:
    longest = max([*seconds.values(), 1e-9])
    titles = {step.name: step.title for step in (*steps.STEPS, steps.CLUSTER)}
    rows = [
        f'<tr><td>{escape(titles[name])}</td><td class="number">{format_duration(value)}</td>'
        f'<td style="width:55%"><div class="bar" style="width:{100 * value / longest:.1f}%"></div></td></tr>'
        for name, value in seconds.items()
    ]
    return f'<div class="card"><table>{"".join(rows)}</table></div>'


def _commands(commands: list[tuple[str, str]]) -> str:
    return "".join(f"{escape(what)}:<pre><code>{escape(command)}</code></pre>" for what, command in commands)
