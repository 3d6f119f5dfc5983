"""The page of a study and the headers it is sent with."""

from __future__ import annotations

from pathlib import Path

from calumma.serve.http.playground.page import page_headers, read_page

PAGE = read_page(Path(__file__).with_name("study.html"))
PAGE_HEADERS = page_headers(PAGE)
