"""The page of a study and the headers it is sent with."""

from __future__ import annotations

from pathlib import Path

from calumma.serve.http.playground.page import page_headers

PAGE = Path(__file__).with_name("study.html").read_text(encoding="utf-8")
PAGE_HEADERS = page_headers(PAGE)
