"""`python -m docs.build` (`make docs`): written pages, generated reference and the picture of imports, as a site.

The site is strict: a link or an anchor that leads nowhere, an image that is missing, or a page without a place in the
navigation fails the build. Nothing is fetched from a network.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from docs import house, imports
from docs.reference import commands, http, metrics, specifications

HERE = Path(__file__).resolve().parent
OUT = house.ROOT / "build" / "docs"
ELSEWHERE = re.compile(r"""(?:src|href)=["']?(https?:)?//[^"' >]+\.(?:js|css|woff2?|ttf|png|svg|json)\b""")


def main() -> int:
    shutil.rmtree(OUT, ignore_errors=True)
    source = assemble(OUT / "source")
    shutil.copy(HERE / "zensical.toml", OUT)
    program = Path(sys.executable).with_name("zensical")
    done = subprocess.run([str(program), "build", "--strict", "--clean", "--config-file", str(OUT / "zensical.toml")])
    if done.returncode:
        return done.returncode
    wrong = [*unreachable(source), *fetched(OUT / "site")]
    for one in wrong:
        print(f"error: {one}", file=sys.stderr)
    print(f"the site: {OUT / 'site' / 'index.html'}; with its search: python -m http.server --directory {OUT / 'site'}")
    return 1 if wrong else 0


def reference() -> dict[str, str]:
    """Path below reference/ -> Markdown of every generated page."""
    return {
        **specifications.pages(),
        "commands.md": commands.page(),
        "http.md": http.page(),
        "metrics.md": metrics.page(),
    }


def assemble(source: Path) -> Path:
    """All pages in one folder."""
    shutil.copytree(HERE / "pages", source)
    for name, text in reference().items():
        file = source / "reference" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    picture = imports.draw(house.ROOT, "What imports what, today")
    (source / "pictures" / "imports.svg").write_text(picture, encoding="utf-8")
    return source


def unreachable(source: Path) -> list[str]:
    """Pages without a place in the navigation, and images that are not there."""
    settings = (HERE / "zensical.toml").read_text(encoding="utf-8")
    pages = sorted(source.rglob("*.md"))
    wrong = [f"{page.relative_to(source)} is not in the nav of zensical.toml" for page in pages
             if f'"{page.relative_to(source).as_posix()}"' not in settings]  # fmt: skip
    for page in pages:
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / target).is_file():
                wrong.append(f"{page.relative_to(source)}: there is no picture {target}")
    return wrong


def fetched(site: Path) -> list[str]:
    """What a page would load from elsewhere."""
    return [
        f"{page.relative_to(site)} loads {found[0]}"
        for page in sorted(site.rglob("*.html"))
        for found in ELSEWHERE.finditer(page.read_text(encoding="utf-8"))
    ]


if __name__ == "__main__":
    sys.exit(main())
