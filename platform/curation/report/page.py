"""The page of a curation: one file that needs nothing else, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from calumma.platform.curation.report.drawing import histogram
from calumma.platform.curation.report.findings import DROPPED, KEPT, SCRUBBED, Findings, Sample
from calumma.platform.curation.steps.chain import STEPS

TITLES = {
    "form": "Form",
    "licenses": "Licenses",
    "domains": "Domains",
    "images": "Images",
    "captions": "Captions",
    "texts": "Texts",
    "decontaminate": "Decontamination",
    "duplicates": "Duplicates",
    "scorers": "Scores",
}
MEASURES = {
    "characters": "Length of texts and captions, characters",
    "image side": "Shorter side of images, pixels",
    "image aspect": "Aspect of images, longer side by shorter",
}
BAD_SHOWN = 50
# Of the steps, in their order; readable on light and dark.
COLOURS = ("#b45309", "#a16207", "#4d7c0f", "#0f766e", "#0369a1", "#4f46e5", "#9333ea", "#be185d", "#dc2626")
STYLE = """
:root { color-scheme: light dark; --ground: #fbfbf9; --card: #ffffff; --ink: #1c2430; --faint: #667085;
  --line: #e3e5e8; --accent: #2f7d4f; --soft: #e8f3ec; --kept: #58a97b; --dropped: #d99a5b; --bad: #8b929c; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161b; --card: #1a2027; --ink: #e6e9ed; --faint: #98a2b3;
  --line: #2c343d; --accent: #6fc58f; --soft: #1f3328; --kept: #4b9469; --dropped: #b9773a; --bad: #6b7280; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; margin: 0 0 .25rem; letter-spacing: -.02em; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .9rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .7rem; }
h3 small, h2 small { color: var(--faint); font-weight: 400; }
p.lead { color: var(--faint); margin: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.15rem; }
.numbers { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); margin-top: 1.5rem; }
.numbers b { display: block; font-size: 1.9rem; line-height: 1.25; letter-spacing: -.02em; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.numbers span { color: var(--faint); font-size: .88rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .34rem .8rem .34rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; font-size: .85rem; }
tr.step td { font-weight: 600; } tr.reason td:first-child { padding-left: 1.1rem; color: var(--faint); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.none { color: var(--line); }
.flow { display: grid; grid-template-columns: max-content 1fr max-content; gap: .45rem 1rem; align-items: center; }
.bar { display: flex; height: 1.15rem; border-radius: 4px; overflow: hidden; background: var(--line); }
.bar i { display: block; min-width: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: .9rem; color: var(--faint);
  font-size: .85rem; }
.legend i { display: inline-block; width: .75rem; height: .75rem; border-radius: 3px; margin-right: .35rem; }
.drawings { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(21rem, 1fr)); }
figure { margin: 0; } figcaption { color: var(--faint); font-size: .88rem; margin-bottom: .4rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--faint); font: 10px system-ui, sans-serif; }
.samples { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); }
.sample { display: flex; flex-direction: column; gap: .45rem; overflow-wrap: anywhere; font-size: .86rem; }
.sample .pictures { display: flex; flex-wrap: wrap; gap: .35rem; }
.sample img { max-width: 100%; max-height: 144px; min-width: 56px; border-radius: 6px; background: var(--soft);
  object-fit: contain; }
.sample img.small { image-rendering: pixelated; min-height: 72px; }
.sample p { margin: 0; } .sample mark { background: var(--soft); color: var(--accent); font-weight: 600; }
.sample footer { margin-top: auto; color: var(--faint); font-size: .75rem; }
.sample .like { border-top: 1px dashed var(--line); padding-top: .45rem; color: var(--faint); }
.reason { color: var(--faint); font-weight: 600; font-size: .9rem; margin: 1.1rem 0 .5rem; }
details { margin-top: .8rem; } summary { cursor: pointer; color: var(--faint); }
li { overflow-wrap: anywhere; font-size: .86rem; }
"""


@dataclass(frozen=True)
class Part:
    """What is told about a source: its part of the manifest's report, and its findings."""

    name: str
    report: dict[str, Any]
    findings: Findings


def page(parts: Sequence[Part]) -> str:
    """The whole page."""
    sections = [
        _head(parts),
        _section("Where documents went", _flow(parts)),
        _section("By step and source", _steps(parts)),
        _section("Distributions", _drawings(parts)),
        _section("Replaced in texts", _marks(parts)),
        *(_source(part) for part in parts),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Curation</title>\n<style>{STYLE}</style>\n</head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}" if body else ""


def _total(parts: Iterable[Part], number: str) -> int:
    return sum(int(part.report.get(number, 0)) for part in parts)


def _head(parts: Sequence[Part]) -> str:
    read, kept = _total(parts, "read"), _total(parts, "kept")
    dropped = read - kept
    removed = sum(part.findings.images_removed for part in parts)
    numbers = [
        (f"{read:,}", "documents read"),
        (f"{kept:,}", f"kept, {_share(kept, read)}"),
        (f"{dropped:,}", f"dropped, {_share(dropped, read)}"),
        (f"{_total(parts, 'bad'):,}", "inputs unreadable"),
        (f"{_total(parts, 'images'):,}", "images kept" + (f", {removed:,} taken out of pages" if removed else "")),
        (f"{_total(parts, 'characters'):,}", "characters kept"),
    ]
    if copies := _total(parts, "copies"):
        numbers.append((f"{copies:,}", "copies added by score"))
    cards = "".join(f'<div class="card"><b>{value}</b><span>{escape(what)}</span></div>' for value, what in numbers)
    names = ", ".join(part.name for part in parts)
    plural = "source" if len(parts) == 1 else "sources"
    return (
        f'<h1>Curation</h1>\n<p class="lead">{len(parts)} {plural}: {escape(names)}.</p>\n'
        f'<div class="numbers">{cards}</div>'
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


# -- numbers -----------------------------------------------------------------------------------------------------------


def _flow(parts: Sequence[Part]) -> str:
    colours = dict(zip(TITLES, COLOURS, strict=True))
    used = [step for step in TITLES if any(part.findings.steps.get(step) for part in parts)]
    rows = []
    for part in parts:
        read, bad = part.report["read"], part.report["bad"]
        shares = [("kept", part.report["kept"], "var(--kept)")]
        shares += [(TITLES[s], sum(part.findings.steps.get(s, {}).values()), colours[s]) for s in used]
        shares.append(("unreadable", bad, "var(--bad)"))
        bars = "".join(
            f'<i style="width:{100 * count / (read + bad):.3f}%;background:{colour}" '
            f'title="{escape(what)}: {count:,}"></i>'
            for what, count, colour in shares
            if count
        )
        rows.append(
            f'<div>{escape(part.name)}</div><div class="bar">{bars}</div><div>{part.report["kept"]:,} of {read:,}</div>'
        )
    legend = [("kept", "var(--kept)"), *((f"dropped: {TITLES[step]}", colours[step]) for step in used)]
    legend.append(("unreadable", "var(--bad)"))
    keys = "".join(f'<span><i style="background:{colour}"></i>{escape(what)}</span>' for what, colour in legend)
    return f'<div class="card"><div class="flow">{"".join(rows)}</div><div class="legend">{keys}</div></div>'


def _steps(parts: Sequence[Part]) -> str:
    head = "".join(f'<th class="number">{escape(part.name)}</th>' for part in parts)
    rows = [_row("read", "step", [part.report["read"] for part in parts])]
    for step in STEPS:
        found = [part.findings.steps.get(step, {}) for part in parts]
        if not any(found):
            continue
        rows.append(_row(TITLES[step], "step", [sum(reasons.values()) for reasons in found]))
        names = {name: sum(reasons.get(name, 0) for reasons in found) for reasons in found for name in reasons}
        rows += [
            _row(name, "reason", [reasons.get(name, 0) for reasons in found])
            for name in sorted(names, key=lambda name: (-names[name], name))
        ]
    rows.append(_row("kept", "step", [part.report["kept"] for part in parts]))
    if any(part.report.get("copies") for part in parts):
        rows.append(_row("copies", "step", [part.report.get("copies", 0) for part in parts]))
    table = f'<table><tr><th></th>{head}<th class="number">all</th></tr>{"".join(rows)}</table>'
    return f'<div class="card wide">{table}{_seconds(parts)}</div>'


def _seconds(parts: Sequence[Part]) -> str:
    """What each step cost, the dearest first."""
    steps = {step for part in parts for step in part.findings.seconds}
    took = {step: sum(part.findings.seconds.get(step, 0.0) for part in parts) for step in steps}
    told = [f"{TITLES.get(s, s.capitalize())} {took[s]:,.1f} s" for s in sorted(steps, key=lambda s: (-took[s], s))]
    return f"<p>Time, of all processes together: {escape(', '.join(told))}.</p>" if told else ""


def _row(title: str, kind: str, counts: Sequence[int]) -> str:
    cells = "".join(
        f'<td class="number{"" if count else " none"}">{f"{count:,}" if count else "·"}</td>'
        for count in [*counts, sum(counts)]
    )
    return f'<tr class="{kind}"><td>{escape(title)}</td>{cells}</tr>'


def _drawings(parts: Sequence[Part]) -> str:
    together = Findings()
    for part in parts:
        together.add(part.findings.model_copy(update={"samples": {}}))
    body = _histograms(together) + _languages(together.languages)
    if not body:
        return ""
    legend = (
        '<div class="legend"><span><i style="background:var(--kept)"></i>kept</span>'
        '<span><i style="background:var(--dropped)"></i>dropped</span></div>'
    )
    by_source = "".join(
        f'<details><summary>{escape(part.name)}</summary><div class="drawings">{_histograms(part.findings)}'
        f"{_languages(part.findings.languages)}</div></details>"
        for part in parts
        if len(parts) > 1 and part.findings.measures
    )
    return f'<div class="drawings">{body}</div>{legend}{by_source}'


def _histograms(findings: Findings) -> str:
    known = [what for what in MEASURES if what in findings.measures]
    others = sorted(set(findings.measures) - set(known))
    return "".join(
        f'<figure class="card"><figcaption>{escape(MEASURES.get(what, what.capitalize()))}</figcaption>'
        f"{histogram(findings.measures[what].get(KEPT, {}), findings.measures[what].get(DROPPED, {}))}</figure>"
        for what in [*known, *others]
    )


def _languages(languages: Mapping[str, Mapping[str, int]]) -> str:
    kept, dropped = languages.get(KEPT, {}), languages.get(DROPPED, {})
    names = sorted(set(kept) | set(dropped), key=lambda name: (-kept.get(name, 0) - dropped.get(name, 0), name))[:12]
    if not names:
        return ""
    most = max(kept.get(name, 0) + dropped.get(name, 0) for name in names)
    rows = "".join(
        f'<div>{escape(name)}</div><div class="bar" style="background:none">'
        f'<i style="width:{100 * kept.get(name, 0) / most:.2f}%;background:var(--kept);min-width:0"></i>'
        f'<i style="width:{100 * dropped.get(name, 0) / most:.2f}%;background:var(--dropped);min-width:0"></i></div>'
        f"<div>{kept.get(name, 0) + dropped.get(name, 0):,}</div>"
        for name in names
    )
    return f'<figure class="card"><figcaption>Languages</figcaption><div class="flow">{rows}</div></figure>'


def _marks(parts: Sequence[Part]) -> str:
    counts: dict[str, list[int]] = {}
    for number, part in enumerate(parts):
        for mark, count in part.findings.marks.items():
            if count:
                counts.setdefault(mark, [0] * len(parts))[number] = count
    if not counts:
        return ""
    head = "".join(f'<th class="number">{escape(part.name)}</th>' for part in parts)
    rows = "".join(_row(mark, "step", found) for mark, found in sorted(counts.items(), key=lambda pair: -sum(pair[1])))
    shown = [sample for part in parts for sample in part.findings.samples.get(SCRUBBED, [])]
    table = f'<table><tr><th></th>{head}<th class="number">all</th></tr>{rows}</table>'
    return f'<div class="card wide">{table}</div>' + (f'<div style="height:.8rem"></div>{_samples(shown)}')


# -- samples -----------------------------------------------------------------------------------------------------------


def _source(part: Part) -> str:
    samples = part.findings.samples
    body = ""
    if samples.get(KEPT):
        body += f"<h3>Kept <small>{part.report['kept']:,} documents</small></h3>{_samples(samples[KEPT])}"
    dropped = ""
    for step in STEPS:
        for reason, count in sorted(part.findings.steps.get(step, {}).items(), key=lambda pair: (-pair[1], pair[0])):
            if shown := samples.get(f"{step}: {reason}"):
                title = f"{TITLES[step]}: {reason}"
                dropped += f'<div class="reason">{escape(title)} ({count:,})</div>{_samples(shown)}'
    if dropped:
        gone = part.report["read"] - part.report["kept"]
        body += f"<h3>Dropped <small>{gone:,} documents</small></h3>{dropped}"
    bad = part.report["bad_inputs"]
    if bad:
        lines = "".join(f"<li>{escape(one['name'])}: {escape(one['reason'])}</li>" for one in bad[:BAD_SHOWN])
        more = f"<li>and {part.report['bad'] - len(bad[:BAD_SHOWN]):,} more</li>" if len(bad) > BAD_SHOWN else ""
        count = part.report["bad"]
        body += f"<h3>Unreadable <small>{count:,} inputs</small></h3><ul class='card'>{lines}{more}</ul>"
    if not body:
        body = '<p class="lead">Nothing is known of what an earlier run kept and dropped here.</p>'
    return f"<h2>{escape(part.name)}</h2>\n{body}"


def _samples(samples: Sequence[Sample]) -> str:
    return f'<div class="samples">{"".join(_sample(sample) for sample in samples)}</div>'


def _sample(sample: Sample) -> str:
    like = ""
    if sample.other is not None:
        like = f'<div class="like">like {escape(_short(sample.other.name))}{_parts(sample.other)}</div>'
    elif sample.like is not None:
        like = '<div class="like">like an earlier document</div>'
    note = f"{escape(sample.note)} · " if sample.note else ""
    name = f'<footer title="{escape(sample.name)}">{note}{escape(_short(sample.name))}</footer>'
    return f'<div class="card sample">{_parts(sample)}{like}{name}</div>'


def _parts(sample: Sample) -> str:
    """In order; pictures that follow each other stand side by side."""
    body, pictures = "", ""
    for kind, value in sample.parts:
        if kind == "image":
            small = ' class="small"' if value.startswith("data:image/png") else ""
            pictures += f'<img alt=""{small} src="{escape(value)}">'
            continue
        if pictures:
            body, pictures = f'{body}<div class="pictures">{pictures}</div>', ""
        body += f"<p>{_marked(value)}</p>"
    return body + (f'<div class="pictures">{pictures}</div>' if pictures else "")


def _marked(text: str) -> str:
    """Marks stand out."""
    from calumma.platform.curation.steps.scrub import MARKS

    shown = escape(text)
    for mark in MARKS:
        shown = shown.replace(escape(mark), f"<mark>{escape(mark)}</mark>")
    return shown


def _short(name: str) -> str:
    """The end of a long name: the file and the place in it."""
    return name if len(name) <= 44 else f"…{name[-43:]}"
