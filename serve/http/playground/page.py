"""The playground's page and the headers it is sent with."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

LOOK = Path(__file__).with_name("look.css").read_text(encoding="utf-8")  # what all pages share: colours, controls


def read_page(path: Path) -> str:
    """A page of ours, with the look that all have."""
    page = path.read_text(encoding="utf-8")
    assert page.count("  /* look.css */\n") == 1, path
    return page.replace("  /* look.css */\n", LOOK)


PAGE = read_page(Path(__file__).with_name("playground.html"))


def _hashes(page: str, tag: str) -> str:
    """The contents of a page's elements of one kind, as a Content-Security-Policy names them."""
    inner = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inner)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def page_headers(page: str) -> dict[str, str]:
    """The page loads nothing from elsewhere and runs no script but its own; pictures are data URLs."""
    return {
        "Content-Security-Policy": f"default-src 'none'; script-src {_hashes(page, 'script')}; style-src "
        f"{_hashes(page, 'style')}; img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'",
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


PAGE_HEADERS = page_headers(PAGE)
