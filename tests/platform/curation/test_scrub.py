"""Personal data and secrets: what is replaced, and what only looks like them and stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calumma.model.document import Document, Image, Text
from calumma.platform.curation.specification import ScrubRules
from calumma.platform.curation.steps.scrub import MARKS, Scrubber, luhn
from calumma.platform.specification import SpecificationError

ALL = Scrubber(ScrubRules())


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("mail john.doe+x@example.co.uk, ok?", "mail <EMAIL>, ok?"),
        ("<a@b.org>", "<<EMAIL>>"),
        ("call +49 30 1234567 now", "call <PHONE> now"),
        ("+33 1 23 45 67 89 or +1 (555) 234-5678", "<PHONE> or <PHONE>"),
        ("(555) 234-5678, 555-234-5678, 1-800-555-1234", "<PHONE>, <PHONE>, <PHONE>"),
        ("Tel.: 030/1234567, Fax 089 123456-7", "Tel.: <PHONE>, Fax <PHONE>"),
        ("host 8.8.8.8 and http://1.2.3.4/x", "host <IP_ADDRESS> and http://<IP_ADDRESS>/x"),
        ("from 95.217.163.246:8080", "from <IP_ADDRESS>:8080"),
        ("at 2001:4860:4860::8888.", "at <IP_ADDRESS>."),
        ("4111 1111 1111 1111, 378282246310005", "<CREDIT_CARD>, <CREDIT_CARD>"),
        ("DE89 3704 0044 0532 0130 00 and", "<IBAN> and"),
        ("GB82WEST12345698765432 THE END", "<IBAN> THE END"),
        ("GB82 WEST 1234 5698 7654 32 AND MORE", "<IBAN> AND MORE"),
    ],
)
def test_personal_data_become_marks(text: str, scrubbed: str) -> None:
    assert ALL.text(text) == scrubbed


@pytest.mark.parametrize(
    "text",
    [
        # code and packages
        "git clone git@github.com:foo/bar.git",
        "icon@2x.png and numpy@1.2.3 and user@host and @decorator",
        "std::vector<int>::iterator a::b::c = {1:2, 3:4};",
        "x = 1234567890 - 987654321; range(100, 200, 3000)",
        "color: #123456; id=0x1234567890abcdef",
        "9f86d081-884c-7d65-9a2f-eaa0c55ad015",
        # versions and private addresses
        "version 2.6.32.71, v1.2.3.4, python==3.11.2.1, 1.2.3.4",
        "release 10.120.113.104 and >=120.113.104.100",
        "10.0.19041.1 and 255.255.255.255 and 100.200.300.400",
        "127.0.0.1, 192.168.178.100, 10.0.0.200, fe80::1:2:3",
        # other numbers
        "2024-05-01 10:20:30 +0000, 12:30:45.678, 00:1A:2B:3C:4D:5E",
        "pi = 3.14159265358979, 0.4111111111111111",
        "ISBN 978-3-16-148410-0, arXiv:2405.09818, doi:10.1000/182",
        "4111-1111-1111-1112, 1234567812345670, 1000 2000 3000 4000",
        "DE00370400440532013000, AB12CDEF34567890123",
        "1,234,567 people in 2023 and 1914-1918",
    ],
)
def test_what_only_looks_like_personal_data_stays(text: str) -> None:
    assert ALL.text(text) == text


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("key = AKIAIOSFODNN7EXAMPLE", "key = <SECRET>"),
        ('t = "ghp_abcdefghijklmnopqrstuvwxyz0123456789"', 't = "<SECRET>"'),
        ("https://user:hunter22@example.org/x", "https://user:<SECRET>@example.org/x"),
        ("hf_" + "aBcD" * 8 + "ef", "<SECRET>"),
        ("AIza" + "x1_-y" * 7, "<SECRET>"),
        ("a\n-----BEGIN RSA PRIVATE KEY-----\nMII\nabc=\n-----END RSA PRIVATE KEY-----\nb", "a\n<SECRET>\nb"),
        ("-----BEGIN PRIVATE KEY-----\nMII cut off", "<SECRET>"),
    ],
)
def test_secrets_become_marks(text: str, scrubbed: str) -> None:
    assert ALL.text(text) == scrubbed


@pytest.mark.parametrize(
    "text",
    ["sk_test = os.environ['KEY']", "password = getpass()", "sha256: " + "ab12" * 16, "AKIA is a prefix", "gh_x"],
)
def test_code_about_secrets_stays(text: str) -> None:
    assert ALL.text(text) == text


def test_only_the_kinds_asked_for_are_replaced() -> None:
    text = "a@b.org +49 30 1234567 AKIAIOSFODNN7EXAMPLE"
    assert Scrubber(ScrubRules(personal=["phone"], secrets=False)).text(text) == "a@b.org <PHONE> AKIAIOSFODNN7EXAMPLE"
    assert Scrubber(ScrubRules(personal=[], secrets=["AWSKeyDetector"])).text(text) == "a@b.org +49 30 1234567 <SECRET>"
    assert Scrubber(ScrubRules(personal=[], secrets=False)).text(text) == text


def test_texts_and_captions_are_scrubbed_and_counted() -> None:
    scrubber = Scrubber(ScrubRules())
    image = Image(b"x", "by a@b.org", "user")
    chat = Document((image, Text("a@b.org or c@d.org?", "user"), Text("none", "assistant")), license="a@b.org")
    clean = scrubber(chat)
    assert clean.segments == (
        Image(b"x", "by <EMAIL>", "user"),
        Text("<EMAIL> or <EMAIL>?", "user"),
        Text("none", "assistant"),
    )
    assert clean.license == chat.license
    assert scrubber.counts == {"<EMAIL>": 3}


def shout(text: str) -> str:
    return text.upper().replace("CALUMMA", "<NAME>")


def silence(text: str) -> None: ...


def test_hooks_of_ones_own_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "hooks_of_the_test", __import__("sys").modules[__name__])
    scrubber = Scrubber(ScrubRules(hooks=["hooks_of_the_test:shout"]))
    assert scrubber.text("calumma: a@b.org") == "<NAME>: <EMAIL>"
    assert scrubber.counts["hooks_of_the_test:shout"] == 1
    with pytest.raises(SpecificationError, match="must return a text, not NoneType"):
        Scrubber(ScrubRules(hooks=["hooks_of_the_test:silence"])).text("x")


@given(st.text(st.sampled_from("0123456789abcdefAZ@.:+-/ ()\n<>"), max_size=80))
def test_scrubbing_twice_changes_nothing_more_than_once(text: str) -> None:
    once = ALL.text(text)
    assert ALL.text(once) == once


@given(st.text(st.characters(exclude_categories=["Nd", "Cs"], exclude_characters="@:-_+."), max_size=200))
def test_texts_without_digits_and_signs_stay(text: str) -> None:
    assert ALL.text(text) == text


@given(st.lists(st.integers(0, 9), min_size=12, max_size=18), st.integers(1, 9))
def test_every_wrong_digit_breaks_the_check(digits: list[int], change: int) -> None:
    body = "".join(map(str, digits))
    valid = next((body + str(check) for check in range(10) if luhn(body + str(check))), None)
    if valid is None:  # all digits are the same
        return
    for place, digit in enumerate(valid):
        assert not luhn(valid[:place] + str((int(digit) + change) % 10) + valid[place + 1 :])


def test_marks_are_never_found_again() -> None:
    assert ALL.text(" ".join(MARKS)) == " ".join(MARKS)
