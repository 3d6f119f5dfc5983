"""Personal data and secrets in texts and captions, replaced by marks such as <EMAIL>.

Every kind is recognized by more than its digits: a card by its check digit and issuer, an IBAN by its country's length
and checksum, an address by being public and standing where no version number does. What is doubtful stays.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from calumma.model.document import Document, Image, Text
from calumma.platform.curation.specification import ScrubRules
from calumma.platform.specification import SpecificationError, import_function

Spans = Iterator[tuple[int, int]]  # where in a text something begins and ends

# -- personal data -----------------------------------------------------------------------------------------------------

_EMAIL = re.compile(
    r"(?<![\w.+%/:@-])[A-Za-z0-9][\w.+%-]{0,63}(?<!\.)@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+"
    r"[A-Za-z]{2,24}(?![\w@-]|\.\w|:[\w/~])"  # with a colon behind it, a place that git or scp reads from
)
# Ends of addresses that are no domains: retina images, and packages with their version.
_NO_DOMAIN = frozenset({"png", "jpg", "jpeg", "gif", "webp", "svg", "css", "js", "json", "html", "py", "txt"})


def emails(text: str) -> Spans:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            if match.group().rpartition(".")[2].lower() not in _NO_DOMAIN:
                yield match.span()


_LABEL = r"(?:phone|tel(?:ephone|efon)?|mobile|mobil|cell|call|fax|hotline|whats\s?app|sms|ph)"
_PHONE = re.compile(
    rf"""
    (?<![\w.+/=#@-])(?:
      \+[1-9]\d{{0,2}}(?:[ .\-]?\(?0?\)?)(?:[ .\-]?\(?\d{{1,4}}\)?){{2,6}}     # +49 (0) 30 1234-567
      | (?:\+?1[ .\-])?\([2-9]\d{{2}}\)\ ?[2-9]\d{{2}}[ .\-]\d{{4}}           # (555) 234-5678
      | (?:1[ .\-])?[2-9]\d{{2}}(?P<between>[ .\-])[2-9]\d{{2}}(?P=between)\d{{4}}  # 555-234-5678
    )(?![\w/=%-]|\.\d)
    | (?i:\b{_LABEL}\b\.?(?:\s?(?:no|number|nr)\b\.?)?\s?[:.]?\s?)
      (?P<labelled>\(?[+0-9]\(?\d[\d ()/.\-]{{4,18}}\d)(?![\w=%-])
    """,
    re.VERBOSE,
)
_DATE = re.compile(r"(?:19|20)\d\d[-./ ](?:0?[1-9]|1[0-2])[-./ ](?:0?[1-9]|[12]\d|3[01])\b")


def phones(text: str) -> Spans:
    for match in _PHONE.finditer(text):
        group = "labelled" if match.group("labelled") else 0
        digits = sum(map(str.isdigit, match.group(group)))
        if 7 <= digits <= 15 and not _DATE.match(match.group(group)):
            yield match.span(group)


_IPV4 = re.compile(r"(?<![\w.\-=])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w\-]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){0,6}(?::)?(?![\w:])")
_HOST_BEFORE = re.compile(
    r"(?:\b(?:ip(?:v4)?|address(?:es)?|host|server|client|ping|ssh|from|peer|gateway|dns)\b\W{0,3}(?:is\W)?|://)$",
    re.IGNORECASE,
)
_VERSION_BEFORE = re.compile(
    r"(?:\b(?:v|ver|vers|version|versions|release|rev|revision|build|update|upgrade|kernel|section|chapter|§)\.?\s*"
    r"|[<>=~^!]=?\s*|\bfrom version\s*)$",
    re.IGNORECASE,
)


def addresses(text: str) -> Spans:
    """Public IP addresses. Four numbers look like a version, too: they count when eight digits long, or after a word
    such as `host`, and never after one such as `version`."""
    for match in _IPV4.finditer(text):
        before = text[max(0, match.start() - 20) : match.start()]
        plausible = sum(map(str.isdigit, match.group())) >= 8 or _HOST_BEFORE.search(before)
        if plausible and not _VERSION_BEFORE.search(before) and _public(match.group()):
            yield match.span()
    for match in _IPV6.finditer(text):
        if match.group().count(":") >= 3 and _public(match.group()):
            yield match.span()


def _public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


# Major issuers: Visa, Mastercard, American Express, Discover, Diners, JCB, UnionPay; grouped as they are printed.
_CARD = re.compile(
    r"(?<![\w.+-])(?:(?:4\d{3}|5[1-5]\d\d|2[2-7]\d\d|6\d{3}|35\d\d)(?P<a>[ -]?)\d{4}(?P=a)\d{4}(?P=a)\d{4}"
    r"|3[47]\d\d(?P<b>[ -]?)\d{6}(?P=b)\d{5}|3[068]\d\d(?P<c>[ -]?)\d{6}(?P=c)\d{4})(?![\w-]|\.\d)"
)


def cards(text: str) -> Spans:
    for match in _CARD.finditer(text):
        if luhn(match.group()):
            yield match.span()


def luhn(number: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1)."""
    digits = [int(c) for c in number if c.isdigit()][::-1]
    doubled = sum(sum(divmod(2 * d, 10)) for d in digits[1::2])
    return (sum(digits[::2]) + doubled) % 10 == 0 and len(set(digits)) > 1


# Country -> length (the IBAN registry, SWIFT).
_IBAN_LENGTHS = {
    country: int(length)
    for country, length in re.findall(
        r"([A-Z]{2})(\d\d)",
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 "
        "ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 "
        "LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 "
        "PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 "
        "YE30",
    )
}
_IBAN = re.compile(r"(?<![A-Za-z0-9])([A-Z]{2})\d{2}(?= ?[A-Z0-9])")


def ibans(text: str) -> Spans:
    for match in _IBAN.finditer(text):
        length = _IBAN_LENGTHS.get(match.group(1))
        whole = length and re.compile(rf"[A-Z0-9](?: ?[A-Z0-9]){{{length - 1}}}(?![A-Za-z0-9])").match(
            text, match.start()
        )
        if whole and _iban(whole.group().replace(" ", "")):
            yield whole.span()


def _iban(iban: str) -> bool:
    """ISO 13616: the digits, letters counting from 10, leave 1 when divided by 97."""
    return int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97 == 1


# In this order: a longer form is taken before what could be a part of it.
PERSONAL_DATA: dict[str, tuple[str, Callable[[str], Spans]]] = {
    "email": ("<EMAIL>", emails),
    "iban": ("<IBAN>", ibans),
    "credit_card": ("<CREDIT_CARD>", cards),
    "ip": ("<IP_ADDRESS>", addresses),
    "phone": ("<PHONE>", phones),
}

# -- secrets -----------------------------------------------------------------------------------------------------------

SECRET = "<SECRET>"
# These guess (from entropy or a variable's name) or are ours to tell; by name they can be asked for.
_GUESSING = frozenset({"Base64HighEntropyString", "HexHighEntropyString", "KeywordDetector", "IPPublicDetector"})
_KEY_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?)-----.*?(?:-----END \1-----|\Z)", re.DOTALL)
# Forms that detect-secrets 1.5 does not know, or gives the first letters of only: GitHub's, Hugging Face's, Google's,
# Anthropic's and OpenAI's.
_FORMS = re.compile(
    r"\b(?:gh[pousr]_\w{36,}|github_pat_\w{22,}|hf_[A-Za-z]{34}|AIza[\w-]{35}|sk-(?:ant|proj|svcacct)-[\w-]{24,})"
)
# What a line must have for one of the detectors that know their secret's form: 20 characters in a row, the beginning of
# a key of Artifactory, or an address with a password. Others are not searched: that is five times faster.
_CANDIDATE = re.compile(r"[\w+/=-]{20}|\bAKC|\bAP[0-9A-F]|://\S+@")
_SHORTEST = 6  # characters; what a detector gives that is shorter is a part of a name


@functools.cache
def secret_detectors(names: tuple[str, ...]) -> list[Any]:
    """detect-secrets' plugins by class name; no names: all that know their secret's form.

    Raises SpecificationError when there is none of that name.
    """
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    known: list[Any] = list(get_mapping_from_secret_type_to_class().values())
    classes = {plugin.__name__: plugin for plugin in known}
    if unknown := sorted(set(names) - set(classes)):
        raise SpecificationError(
            f"scrub.secrets: there is no detector {', '.join(unknown)}; these are: {', '.join(sorted(classes))}"
        )
    chosen = names or sorted(set(classes) - _GUESSING - {"PrivateKeyDetector"})
    return [classes[name]() for name in chosen]


def without_secrets(text: str, plugins: list[Any], candidate: re.Pattern[str] | None = None) -> tuple[str, int]:
    """The text with every secret replaced, and their number; only lines with a `candidate` are searched, if given.

    Nothing is sent anywhere to be verified.
    """
    text, count = _KEY_BLOCK.subn(SECRET, text) if "PRIVATE KEY" in text else (text, 0)
    text, more = _FORMS.subn(SECRET, text)
    count += more
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if candidate is not None and not candidate.search(line):
            continue
        secrets = {s for plugin in plugins for s in plugin.analyze_string(line) if len(s) >= _SHORTEST}
        for secret in sorted(secrets, key=lambda s: (-len(s), s)):
            count += secret in line
            line = line.replace(secret, SECRET)
        lines[number] = line
    return "\n".join(lines), count


MARKS = (SECRET, *(mark for mark, _ in PERSONAL_DATA.values()))

# -- documents ---------------------------------------------------------------------------------------------------------


class Scrubber:
    """Scrubs a document's texts and captions; `counts`: marks by kind."""

    def __init__(self, rules: ScrubRules) -> None:
        """Raises SpecificationError when a detector or hook cannot be found."""
        self._finders = [PERSONAL_DATA[kind] for kind in PERSONAL_DATA if kind in rules.personal]
        names = tuple(rules.secrets) if isinstance(rules.secrets, list) else ()
        self._plugins = secret_detectors(names) if rules.secrets else []
        self._candidate = None if names else _CANDIDATE
        self._hooks = [(path, import_function(path, "scrub.hooks")) for path in rules.hooks]
        self.counts: Counter[str] = Counter()

    def __call__(self, document: Document) -> Document:
        segments = [
            replace(s, text=self.text(s.text))
            if isinstance(s, Text)
            else replace(s, caption=self.text(s.caption))
            if isinstance(s, Image) and s.caption
            else s
            for s in document.segments
        ]
        return replace(document, segments=tuple(segments))

    def text(self, text: str) -> str:
        """A text with marks in place of what was found."""
        if self._plugins or self._finders:
            text = self._replaced(text)
        for path, hook in self._hooks:
            changed = hook(text)
            if not isinstance(changed, str):
                raise SpecificationError(f"scrub.hooks: {path!r} must return a text, not {type(changed).__name__}")
            if changed != text:
                self.counts[path] += 1
            text = changed
        return text

    def _replaced(self, text: str) -> str:
        if self._plugins:
            text, count = without_secrets(text, self._plugins, self._candidate)
            if count:
                self.counts[SECRET] += count
        for mark, find in self._finders:
            pieces, end = [], 0
            for begin, stop in find(text):
                if begin >= end:
                    pieces += [text[end:begin], mark]
                    end = stop
                    self.counts[mark] += 1
            if pieces:
                text = "".join([*pieces, text[end:]])
        return text
