"""The public benchmarks' own training files, as their publishers wrote them; importing this registers them."""

from calumma.platform.sources.formats.benchmarks import captions, mnist, squad, vqa  # noqa: F401
