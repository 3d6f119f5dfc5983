"""Pages: Markdown and HTML as interleaved documents, with what is content and without what is not."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.model.document import Document, Image, Text
from calumma.platform import storage
from calumma.platform.sources.files import BadInput, Reference
from calumma.platform.sources.formats.pages.html import DEEPEST_NESTING, read_html
from calumma.platform.sources.formats.pages.reader import _from_markdown
from calumma.platform.sources.reading import list_source, read_file, read_source
from calumma.platform.sources.specification import Source

PNG = b"\x89PNG\r\n\x1a\n and so on"


def text_of(html: str) -> str:
    """The page as text, each image as (target|caption)."""
    said = (
        part.text if isinstance(part, Text) else f"({part.target}|{part.caption})"
        for part in read_html(html).segments
        if isinstance(part, Text | Reference)
    )
    return "\n".join(said)


def read(path: Path, content: str | bytes, **more: Any) -> Document | BadInput:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    (item,) = read_file("pages", "source", str(path), **more)
    return item


# -- what a page says

MARKDOWN = """\
# A *chameleon*

Some **bold** text with `code  here` and a [link](https://x.test).
The same line.

- one
- two
  1. first
  2. second

7. seven
8. eight

> a quote
>
> - in it

| name | value |
|------|------:|
| a    | `1`   |
| b    |       |

```python
def f(x):
\treturn x  < 1
```
"""

WRITTEN = """\
# A chameleon

Some bold text with `code here` and a link. The same line.

- one
- two
  1. first
  2. second

7. seven
8. eight

> a quote
>
> - in it

| name | value |
| --- | --- |
| a | `1` |
| b | |

```python
def f(x):
\treturn x  < 1
```"""


def test_markdown_comes_out_as_plain_markdown() -> None:
    assert text_of(_from_markdown(MARKDOWN)) == WRITTEN


def test_what_is_written_reads_the_same_again() -> None:
    assert text_of(_from_markdown(WRITTEN)) == WRITTEN


def test_html_is_written_in_reading_order_and_images_cut_the_text() -> None:
    html = """
      <h1>Head<a class="headerlink" href="#h">¶</a></h1>
      <p>One <b>bo</b>ld,<br>two   words <img src="a.png" alt=" A
        picture "> after.</p>
      <figure><img data-src="b.png" src="data:image/gif;base64,R0lG"><figcaption>Figure 1</figcaption></figure>
      <dl><dt>term<dd>meaning</dl><ol start=3><li><p>three</p><p>more</p><li>four</ol>
      <div>a</div><div>b</div><!-- no --><pre class="highlight-source-c"><code>int a;
  &lt;b&gt;;
</code></pre>"""
    assert text_of(html) == (
        "# Head\n\nOne bold,\ntwo words\n(a.png|A picture)\nafter.\n(b.png|None)\nFigure 1\n\nterm\nmeaning\n\n"
        "3. three\n\n   more\n\n4. four\n\na\nb\n\n```c\nint a;\n  <b>;\n```"
    )


def test_a_code_block_with_backticks_is_fenced_by_more_of_them() -> None:
    assert text_of("<pre>a ``` b</pre>") == "````\na ``` b\n````"


def test_tables_in_tables_and_images_in_cells_stay_on_their_rows() -> None:
    inner = "<table><tr><td>x<td>y</table>"
    html = f"<table><tr><th>a<th>b<tr><td><p>1</p><p>2</p>{inner}<td><img src=i.png alt=I></table><p>end"
    assert text_of(html) == "| a | b |\n| --- | --- |\n| 1 2 | x | y | |\n(i.png|I)\n|\n\nend"


@pytest.mark.parametrize(
    "html",
    [
        "<script>NO</script>",
        "<style>NO</style>",
        "<noscript>NO</noscript>",
        "<template><p>NO</p></template>",
        "<nav><ul><li>NO</ul></nav>",
        "<div role=navigation>NO</div>",
        "<footer>NO</footer>",
        "<aside>NO</aside>",
        "<header><a>NO</a></header>",
        "<div hidden>NO<nav>NO</nav></div>",
        "<p style='color: red; display:none'>NO</p>",
        "<button>NO</button>",
        "<svg><text>NO</text></svg>",
        "<iframe>NO</iframe>",
        "<!-- NO -->",
        "<img src=count.gif width=1 height=1 alt=NO>",
        "<img alt=NO>",
    ],
)
def test_what_is_no_content_is_left_out(html: str) -> None:
    assert text_of(f"<title>NO</title><p>before</p>{html}<p>after</p>") == "before\n\nafter"


def test_a_page_may_say_where_its_content_is() -> None:
    article = "<article><header><h1>Head</h1></header><p>words</p><aside>a note</aside></article>"
    assert text_of(f"<div>menu</div><main><nav>NO</nav>{article}</main><div>NO</div>") == "# Head\n\nwords\n\na note"
    assert text_of(f"<div>NO</div>{article}<div>NO</div>") == "# Head\n\nwords\n\na note"
    assert text_of("<div>a</div><article>one</article><article>two</article>") == "a\n\none\n\ntwo"
    assert text_of("<form><p>in a form</p></form>") == "in a form"


PIECES = (
    "word <ul> </ul> <li> <ol> </ol> <table> <tr> <td> <th> </td> </table> <pre> </pre> <h2> </h2> <blockquote> "
    "</blockquote> <p> <div> </div> <b> </b> <code> </code> <br> <dl> <dd> <section> </section>"
)


@given(st.lists(st.sampled_from([*PIECES.split(), "word", "word"]), max_size=40))
def test_no_order_of_elements_loses_a_word(pieces: list[str]) -> None:
    assert text_of(" ".join(pieces)).count("word") == pieces.count("word")


@given(st.lists(st.sampled_from([*PIECES.split(), "<img src=a.png>"]), max_size=40))
def test_no_order_of_elements_loses_an_image(pieces: list[str]) -> None:
    images = [part for part in read_html(" ".join(pieces)).segments if isinstance(part, Reference)]
    assert len(images) == pieces.count("<img src=a.png>")


def test_elements_nested_without_end_are_bad_and_quickly_told(tmp_path: Path) -> None:
    assert text_of("<div>" * (DEEPEST_NESTING - 1) + "deep") == "deep"
    item = read(tmp_path / "a.html", "<div>" * 2_000_000)
    assert isinstance(item, BadInput)
    assert item.reason == "more than 1,000 elements in each other"
    assert text_of("<p>a<br><li>b" * (2 * DEEPEST_NESTING)).count("a") == 2 * DEEPEST_NESTING


# -- files


def test_a_page_is_a_document_with_the_images_beside_it(tmp_path: Path) -> None:
    for name in ("images/one image.png", "guide/two.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    front = "---\ntitle: T\nlicense: CC-BY-4.0\nurl: https://x.test/guide\ndate: 2024-01-01\n---\n"
    page = (
        f"{front}# Guide\n\n![up](../images/one%20image.png)\nwords\n"
        '<img src="two.png?v=3#x" alt="beside">\n\n![root](</images/one image.png>)\n'
    )
    (tmp_path / "guide" / "page.md").write_text(page)
    source = Source(name="docs", format="pages", location=str(tmp_path))
    files, others = list_source(source.format, source.location)
    assert list(files) == [f"{tmp_path}/guide/page.md"]
    assert list(others) == [f"{tmp_path}/guide/two.png", f"{tmp_path}/images/one image.png"]
    assert list(read_source(source, f"{tmp_path}/guide/page.md")) == [
        Document(
            (
                Text("# Guide"),
                Image(b"images/one image.png", "up"),
                Text("words"),
                Image(b"guide/two.png", "beside"),
                Image(b"images/one image.png", "root"),
            ),
            source="docs",
            license="CC-BY-4.0",
            url="https://x.test/guide",
        )
    ]
    # Read by itself, it may refer to nothing outside of its own folder.
    alone = read(tmp_path / "guide" / "page.md", page)
    assert isinstance(alone, BadInput)
    assert "leads out" in alone.reason


def test_a_site_may_be_in_s3_and_its_images_elsewhere(s3: str) -> None:
    storage.write_bytes(f"{s3}/site/a/page.html", b"<p>one<img src='../img/1.png' alt='A'><p>two")
    storage.write_bytes(f"{s3}/site/img/1.png", PNG)
    storage.write_bytes(f"{s3}/other/x.html", b"<img src='img/1.png'>")
    source = Source(name="site", format="pages", location=f"{s3}/site")
    segments = (Text("one"), Image(PNG, "A"), Text("two"))
    assert list(read_source(source, f"{s3}/site/a/page.html")) == [Document(segments, source="site")]
    elsewhere = Source(name="site", format="pages", location="other", images="site")
    assert list(read_source(elsewhere, f"{s3}/other/x.html", lambda place: f"{s3}/{place}")) == [
        Document((Image(PNG),), source="site")
    ]


@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("https://x.test/badge.svg", "is remote; download first"),
        ("//x.test/a.png", "is remote"),
        ("../../etc/passwd", "leads out"),
        ("missing.png", "there is no image 'missing.png'"),
        ("#here", "no file name"),
        ("http://[", "is remote"),
    ],
)
def test_an_image_that_cannot_be_had_makes_the_page_bad_or_is_left_out(tmp_path: Path, link: str, said: str) -> None:
    (tmp_path / "1.png").write_bytes(PNG)
    page = f"<p>one<img src='{link}'>two<img src='1.png'>"
    item = read(tmp_path / "a.html", page)
    assert isinstance(item, BadInput)
    assert said in item.reason
    item = read(tmp_path / "a.html", page, options={"other_images": "leave_out"})
    assert item == Document((Text("one"), Text("two"), Image(PNG)), source="source")


def test_license_and_address_are_told_by_the_page(tmp_path: Path) -> None:
    page = "<link rel=canonical href='https://x.test/p'><link rel=license href='https://cc.test/by'><p>x"
    assert read(tmp_path / "a.html", page) == Document(
        (Text("x"),), source="source", license="https://cc.test/by", url="https://x.test/p"
    )


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("<p>grün".encode(), "grün"),
        ("<p>grün".encode("utf-8-sig"), "grün"),
        ("<p>grün".encode("utf-16"), "grün"),
        ("<meta charset='iso-8859-1'><p>grün".encode("latin-1"), "grün"),
        ('<meta http-equiv=x content="text/html; charset=windows-1252"><p>“grün”'.encode("cp1252"), "“grün”"),
        ("<p>grün".encode("latin-1"), None),
        (b"<meta charset=klingon><p>a", "a"),
        ("<meta charset=iso-8859-1><p>“grün” €".encode("cp1252"), "“grün” €"),  # as whoever wrote it meant it
        (b"<meta charset=latin1><p>a\x81b", "a\x81b"),
        ("<meta charset=us-ascii><p>grün".encode("cp1252"), "grün"),
        ("<meta charset=gb2312><p>朱镕基".encode("gbk"), "朱镕基"),  # the second is not in GB 2312
        ("<meta charset=gbk><p>𠀀".encode("gb18030"), "𠀀"),
        ("<meta charset=shift_jis><p>①髙".encode("cp932"), "①髙"),
        ("<meta charset=euc-kr><p>똠".encode("cp949"), "똠"),
        ("<meta charset=big5><p>嘅".encode("big5hkscs"), "嘅"),
        ("<meta charset=koi8-r><p>мир".encode("koi8-r"), "мир"),
        ("<meta charset=windows-1251><p>мир".encode("cp1251"), "мир"),
        ("<meta charset=utf-16><p>grün".encode(), "grün"),  # what can be read so far is not UTF-16
        ("<meta charset=iso-8859-1><p>grün".encode("utf-8-sig"), "grün"),  # the mark is right
        ("<!-- <meta charset=koi8-r> --><p>grün".encode(), "grün"),
        ('<?xml version="1.0" encoding="iso-8859-1"?><p>grün'.encode("latin-1"), "grün"),
        ("<meta charset=utf-8><p>grün".encode("latin-1"), None),
        (b"<meta charset=iso-2022-kr><p>a", None),
        (gzip.compress(b"<p>packed", mtime=0), "packed"),
        (gzip.compress(b"<p>packed", mtime=0)[:-9], None),
    ],
)
def test_the_encoding_is_what_the_page_declares(tmp_path: Path, content: bytes, found: str | None) -> None:
    item = read(tmp_path / "a.html", content)
    if found is not None:
        assert item == Document((Text(found),), source="source")
    else:
        assert isinstance(item, BadInput)
        assert (item.name, item.bytes_lost) == (f"{tmp_path}/a.html", len(content))


def test_an_option_is_the_encoding_of_pages_that_declare_none(tmp_path: Path) -> None:
    for name in ("a.html", "a.md"):
        item = read(tmp_path / name, "grün".encode("latin-1"))
        assert isinstance(item, BadInput)
        assert "the option `encoding` may name another" in item.reason
        item = read(tmp_path / name, "grün".encode("latin-1"), options={"encoding": "latin1"})
        assert item == Document((Text("grün"),), source="source")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "front",
    [
        "---\nlicense: mit\n---\n",
        "---\ntitle: a: b\nlicense: 'mit'\ntags:\n- x\n---\n",
        "---\nlicense: [mit]\n---\n",
        "+++\nlicense = 'mit'\n+++\n",
        "---\nlicense: mit\n...\n",
    ],
)
def test_front_matter_is_read_with_any_line_ends(tmp_path: Path, front: str, line: str, mark: str) -> None:
    page = f"{mark}{front}# T\n\nbody\n".replace("\n", line)
    assert read(tmp_path / "a.md", page) == Document((Text("# T\n\nbody"),), source="source", license="mit")


# -- where images are

STAND_IN = "data:image/gif;base64,R0lGODlhAQABAAAAACw="


@pytest.mark.parametrize(
    ("html", "links"),
    [
        ("<img src=a.png>", ["a.png"]),
        (f"<img src='{STAND_IN}' data-src=a.png>", ["a.png"]),
        ("<img src=blank.gif data-src=a.png>", ["a.png", "blank.gif"]),
        ("<img data-original=a.png>", ["a.png"]),
        ("<img data-lazy-src=a.png src='about:blank'>", ["a.png"]),
        ("<img data-src='{\"x\": 1}' src=a.png>", ["a.png"]),
        ("<img src=a.png srcset='s.png 320w, l.png 1280w, m.png 640w'>", ["l.png", "m.png", "s.png", "a.png"]),
        ("<img src=a.png srcset='a.png, b.png 2x, c.png 1.5x'>", ["b.png", "c.png", "a.png"]),
        ("<img srcset='a,b.png 1x,c_w:2,h:3.png 2x'>", ["c_w:2,h:3.png", "a,b.png"]),
        (f"<img src='{STAND_IN}' data-srcset='s.png 1x, l.png 2x'>", ["l.png", "s.png"]),
        ("<picture><source srcset='a.webp' type='image/webp'><img src=a.png></picture>", ["a.webp", "a.png"]),
        ("<picture><source srcset='a.jxl' type='image/jxl'><img src=a.png></picture>", ["a.png"]),
        ("<picture><source srcset='narrow.png' media='(max-width: 9px)'><img src=a.png></picture>", ["a.png"]),
        (f"<picture><source data-srcset='a.avif'><img src='{STAND_IN}'></picture>", ["a.avif"]),
        (f"<img src='{STAND_IN}'><noscript><img src=a.png></noscript>", ["a.png"]),
        (f"<noscript><img src=a.png></noscript> <img src='{STAND_IN}'>", ["a.png"]),
        (f"<picture><img src='{STAND_IN}'></picture><noscript><img src=a.png></noscript>", ["a.png"]),
        ("<img data-src=a.png><noscript><img src=a-300.png></noscript>", ["a.png"]),
        ("<p>x<noscript><p>y<img src=a.png></noscript>", ["a.png"]),
        ("<img data-src=a.png><p>x</p><noscript><img src=a.png></noscript>", ["a.png"]),
        ("<noscript><img src=count.gif width=1 height=1></noscript>", []),
        ("<noscript><img src=count.gif style='display:none'></noscript>", []),
        (f"<img src='{STAND_IN}'>", []),
        ("<img src='data:image/png;base64,iVBORw0KGgo='>", ["data:image/png;base64,iVBORw0KGgo="]),
    ],
)
def test_the_best_picture_of_an_image_is_found(html: str, links: list[str]) -> None:
    found = [part for part in read_html(html).segments if isinstance(part, Reference)]
    assert [link for part in found for link in (part.target, *part.others)] == links
    assert len(found) == bool(links), "one image"


def test_the_same_image_twice_is_two_images() -> None:
    assert text_of("<img src=a.png>b<img src=a.png>") == "(a.png|None)\nb\n(a.png|None)"


def test_a_picture_that_is_not_there_is_taken_in_another_size(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    page = "<img src=a.png srcset='https://x.test/b.png 3x, b.png 2x' alt=A>"
    assert read(tmp_path / "a.html", page) == Document((Image(PNG, "A"),), source="source")
    item = read(tmp_path / "a.html", page.replace("a.png", "c.png"))
    assert isinstance(item, BadInput)
    assert "there is no image 'c.png'" in item.reason


def test_links_begin_from_the_base_that_a_page_names(tmp_path: Path) -> None:
    for name in ("img/a.png", "b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    source = Source(name="s", format="pages", location=str(tmp_path))
    (tmp_path / "a.html").write_text("<base href='img/'><img src=a.png><img src='../b.png'><img src='/b.png'>")
    (item,) = read_source(source, f"{tmp_path}/a.html")
    assert isinstance(item, Document)
    assert len(item.images) == 3
    (tmp_path / "c").mkdir()
    (tmp_path / "c/a.html").write_text("<base href='../img/x.html'><img src=a.png><img src=../b.png>")
    (item,) = read_source(source, f"{tmp_path}/c/a.html")
    assert isinstance(item, Document)
    assert len(item.images) == 2
    (tmp_path / "a.html").write_text("<base href='https://x.test/img/'><img src=b.png>")  # saved from there
    (item,) = read_source(source, f"{tmp_path}/a.html")
    assert isinstance(item, Document)


@pytest.mark.parametrize("front", ["---\n[broken\n---\n", "---\njust words\n---\n", "--- no front matter\n"])
def test_what_is_no_front_matter_is_text(tmp_path: Path, front: str) -> None:
    item = read(tmp_path / "a.md", f"{front}\nend\n")
    assert isinstance(item, Document)
    assert any(word in item.text for word in ("broken", "just words", "no front matter"))


def test_a_page_too_large_to_be_one_is_not_held(tmp_path: Path) -> None:
    item = read(tmp_path / "a.html.gz", gzip.compress(b" " * (64 << 20)))
    assert isinstance(item, BadInput)
    assert "holds more than 33,554,432 bytes" in item.reason


@given(st.text(max_size=300), st.sampled_from(["a.md", "a.html"]))
def test_no_page_stops_the_reader(tmp_path_factory: pytest.TempPathFactory, text: str, name: str) -> None:
    item = read(tmp_path_factory.mktemp("page") / name, text.encode("utf-8", "replace"))
    assert isinstance(item, Document | BadInput)
