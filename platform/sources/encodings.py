"""Bytes of pages and captions as text, in the encodings that the web's labels mean.

https://encoding.spec.whatwg.org: `iso-8859-1` is windows-1252, `gb2312` is gb18030, and so on: what is declared is as a
rule what somebody's program wrote by that name, with characters that the standard of that name does not have.
"""

from __future__ import annotations

import codecs
from typing import Annotated

from pydantic import AfterValidator

from calumma.platform.sources.files import Malformed

DEFAULT = "utf-8"
_MARKS = (  # that of UTF-32 begins as that of UTF-16 does
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# The encodings of WHATWG that Python has under another name, or only a part of under the same.
_CODECS = {
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc-kr": "cp949",
    "iso-8859-8-i": "iso-8859-8",
    "macintosh": "mac-roman",
    "x-mac-cyrillic": "mac-cyrillic",
    "windows-874": "cp874",
    "x-user-defined": "cp1252",
}
SHARE_OF_NULS = 4  # of text in UTF-16 that is mostly ASCII, every second byte is one
_UNDEFINED_BYTES = "calumma-undefined-bytes"


def _as_control(error: UnicodeError) -> tuple[str, int]:
    """A byte from 0x80 to 0x9f that windows-125x does not define is a control character."""
    assert isinstance(error, UnicodeDecodeError)
    undefined = error.object[error.start : error.end]
    if max(undefined) > 0x9F:
        raise error
    return "".join(map(chr, undefined)), error.end


codecs.register_error(_UNDEFINED_BYTES, _as_control)


def decode_text(data: bytes, declared: str | None = None, default: str | None = None) -> str:
    """Text in the encoding that its byte order mark says, else that it declares, else the default (UTF-8), without the
    mark. Raises Malformed."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return _decoded(data[len(mark) :], name, "its byte order mark says")
    # What can be read as far as a declaration is not UTF-16, whatever it says.
    if (codec := codec_of(declared or "")) is not None:
        return _decoded(data, DEFAULT if codec.startswith("utf-16") else codec, "it declares")
    if default is not None and (named := codec_of_option(default)) != DEFAULT:
        return _decoded(data, named, "the source's options say")
    if SHARE_OF_NULS * data.count(0) > len(data):
        raise Malformed("is UTF-16 without a byte order mark, as it seems: the option `encoding` may name it")
    return _decoded(data, DEFAULT, "is the default: the option `encoding` may name another")


def codec_of(label: str) -> str | None:
    """Python's name for what a label of the web means, or None for a label that there is none of."""
    import webencodings

    encoding = webencodings.lookup(label)
    return None if encoding is None else _CODECS.get(encoding.name, encoding.name)


def codec_of_option(name: str) -> str:
    """The codec of an encoding as a person may write it: the web's label or Python's name. Raises ValueError."""
    try:
        return codec_of(name) or codecs.lookup(name).name
    except LookupError as error:
        raise ValueError("there is no encoding of this name") from error


def _known(name: str) -> str:
    codec_of_option(name)
    return name


Encoding = Annotated[str, AfterValidator(_known)]  # an option of readers


def _decoded(data: bytes, codec: str, why: str) -> str:
    try:
        return data.decode(codec, _UNDEFINED_BYTES if codec.startswith(("windows-", "cp1252", "cp874")) else "strict")
    except (UnicodeError, LookupError) as error:
        raise Malformed(f"is no text in {codec}, which {why}: {error}") from error
