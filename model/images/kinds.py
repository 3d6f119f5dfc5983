"""What bytes are, told from their first ones, for messages: `an HTML page`, `a HEIC picture`, `a PDF document`."""

from __future__ import annotations

import re

# The first bytes, and what begins with them. The longer stand before the shorter that they begin with.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (b"GIF87a", "a GIF picture"),
    (b"GIF89a", "a GIF picture"),
    (b"II*\0\x10\0\0\0CR", "a camera's raw picture (CR2)"),
    (b"IIU\0", "a camera's raw picture (RW2)"),
    (b"IIRO", "a camera's raw picture (ORF)"),
    (b"II\x1a\0\0\0HEAPCCDR", "a camera's raw picture (CRW)"),
    (b"FUJIFILMCCD-RAW", "a camera's raw picture (RAF)"),
    (b"II*\0", "a TIFF picture"),
    (b"MM\0*", "a TIFF picture"),
    (b"II+\0", "a TIFF picture"),
    (b"MM\0+", "a TIFF picture"),
    (b"II\xbc", "a JPEG XR picture"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"BM", "a BMP picture"),
    (b"qoif", "a QOI picture"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"\0\0\2\0", "a cursor (CUR)"),
    (b"icns", "an icon (ICNS)"),
    (b"8BPS", "a Photoshop document"),
    (b"gimp xcf", "a GIMP document"),
    (b"DDS ", "a texture (DDS)"),
    (b"v/1\x01", "an OpenEXR picture"),
    (b"#?RADIANCE", "a Radiance HDR picture"),
    (b"AT&TFORM", "a DjVu document"),
    (b"SIMPLE  =", "a FITS picture"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"GRIB", "a GRIB file"),
    (b"BUFR", "a BUFR file"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript document"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"PK\x05\x06", "a ZIP archive"),
    (b"\x1f\x8b", "gzip data"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"BZh", "bzip2 data"),
    (b"\xfd7zXZ\0", "xz data"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document"),
    (b"\0\x05\x16\x07", "what macOS keeps beside a file (AppleDouble)"),
    (b"\0\x05\x16\0", "what macOS keeps beside a file (AppleSingle)"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM film"),
    (b"\0\0\1\xba", "an MPEG film"),
    (b"\0\0\1\xb3", "an MPEG film"),
    (b"FLV\x01", "a Flash film"),
    (b"OggS", "Ogg sound or film"),
    (b"fLaC", "FLAC sound"),
    (b"ID3", "MP3 sound"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"version https://git-lfs.github.com/spec/", "a pointer of Git LFS; fetch the files it stands for (git lfs pull)"),
)
_RIFF = {b"WEBP": "a WebP picture", b"AVI ": "an AVI film", b"WAVE": "WAVE sound"}
# Brands of ISO base media files (`ftyp` boxes).
_BRANDS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"avif", b"avis"), "an AVIF picture"),
    ((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"heif"), "a HEIC picture"),
    ((b"crx ",), "a camera's raw picture (CR3)"),
    ((b"M4A ", b"M4B "), "MPEG-4 sound"),
    ((b"qt  ",), "a QuickTime film"),
)
_NETPBM = re.compile(rb"P[1-7fF][\s#]")
_HTML = re.compile(r"<(!doctype\s+html|html|head|body|title|script|meta)\b", re.IGNORECASE)
_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
_HEAD = 1024  # bytes that are looked at
READ = "JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP or JPEG 2000"


def kind_of(data: bytes) -> str:
    """What bytes are, with its article: `a JPEG picture`, `an HTML page`, `nothing (0 bytes)`."""
    head = data[:_HEAD]
    if not head:
        return "nothing (0 bytes)"
    if not head.strip(b"\0"):
        return "zeros" if not data.strip(b"\0") else "unknown data that begins with zeros"
    for magic, kind in _MAGIC:
        if head.startswith(magic) and (len(magic) > 2 or b"\0" in head[:64]):
            return kind
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12], "a RIFF file")
    if head[4:8] == b"ftyp":
        brands = [head[at : at + 4] for at in (8, *range(16, min(int.from_bytes(head[:4]), _HEAD), 4))]
        return next((kind for known, kind in _BRANDS if any(b in known for b in brands)), "an MP4 film")
    if head[128:132] == b"DICM":
        return "a DICOM picture"
    if head[40:44] == b" EMF":
        return "a Windows metafile"
    if _NETPBM.match(head):
        return "a PPM picture"
    if data[257:262] == b"ustar":
        return "a tar archive"
    return _kind_of_text(head) or f"unknown data that begins with {head[:8].hex(' ')}"


def _kind_of_text(head: bytes) -> str | None:
    """What a text is, or None where the bytes are none."""
    utf16 = head.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = head.decode("utf-16" if utf16 else "utf-8-sig", "replace")
    odd = sum(not (c.isprintable() or c in "\t\n\r\f\x1b") for c in text) + text.count("\ufffd")
    if odd > len(text) // 20 + 1 or (odd and len(text) < 20):
        return None
    begin = text.lstrip()
    if begin.startswith(("<svg", "<!DOCTYPE svg")) or (begin.startswith(("<?xml", "<!--")) and "<svg" in begin):
        return "an SVG drawing"
    if begin.startswith("<") and _HTML.search(begin):
        return "an HTML page"
    if begin.startswith("<?xml"):
        return "an XML document"
    if begin.startswith("data:image/"):
        return "the data URL of a picture, as text"
    if begin.startswith(_BASE64):
        return "a picture in base64, as text"
    if begin.startswith(("http://", "https://")):
        return "an address"
    if begin[:1] in ("{", "["):
        return "JSON"
    return "text" if begin else "white space"
