"""Equal inputs have equal manifests, byte for byte, whatever process made them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from PIL import Image as PILImage

PROGRAM = """
from calumma.platform.curation import curate
from calumma.platform.curation.specification import CurateSpecification

class NoRun:
    def __getattr__(self, name):
        return lambda *arguments, **fields: None

curate.run(CurateSpecification.model_validate({
    "storage": ".", "resources": {"workers": 0}, "max_bad_share": 1.0, "min_text": 1, "documents_per_shard": 3,
    "duplicates": {}, "captions": {},
    "sources": [
        {"name": name, "format": format, "location": location}
        for name, format, location in (
            ("pairs", "webdataset", "RAW/*.tar"),
            ("texts", "text", "RAW/texts"),
            ("pages", "pages", "RAW/pages"),
        )
    ],
}), NoRun(), lambda *_: None)
"""


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8, 8), color).save(buffer, "PNG")
    return buffer.getvalue()


def write_inputs(folder: Path) -> None:
    """Good and bad of several kinds: what is told of them must not depend on the order of a set, or on an address."""
    (folder / "texts/.ipynb_checkpoints").mkdir(parents=True)
    (folder / "pages").mkdir()
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    bad = {"html": b"<html>no</html>", "cut": png("red")[:40], "heic": heic, "none": b"", "noise": bytes(range(99))}
    with tarfile.open(folder / "a.tar", "w") as tar:
        members = {
            f"{color}.{form}": data
            for color in ("red", "blue", "lime")
            for form, data in (
                ("png", png(color)),
                ("txt", f"A {color} square".encode()),
                ("json", b'{"id": 1, "b": 2}'),
            )
        }
        members |= {f"{name}.jpg": data for name, data in bad.items()} | {
            "._red.png": b"x",
            "caf\udce9.jpg": b"",
            "x.cls": b"7",
        }
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    rows = [
        {"text": f"a text, number {n % 7}", **{f"field {k}": k for k in range(n % 5)}, "\ud800": 1} for n in range(20)
    ]
    lines = [json.dumps(row) for row in rows] + ["[]", "{", '{"text": "\\ud800"}', '{"words": "none"}']
    (folder / "texts/a.jsonl").write_text("\n".join(lines))
    (folder / "texts/.ipynb_checkpoints/a.jsonl").write_text("{}")
    (folder / "texts/b.csv").write_text("a,b")
    (folder / "pages/a.html").write_text("<img src=b.png srcset='c.png 2x'>words")
    (folder / "pages/b.html").write_text("<meta charset=klingon><p>words")
    (folder / "pages/c.md").write_bytes("grün".encode("latin-1"))


def test_processes_with_other_seeds_of_their_hashes_write_the_same(tmp_path: Path) -> None:
    write_inputs(tmp_path / "raw")
    program = PROGRAM.replace("RAW", str(tmp_path / "raw"))
    processes = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        processes.append(subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path / seed, env=environment))
    assert [process.wait() for process in processes] == [0, 0]
    made = [
        {
            str(path.relative_to(tmp_path / seed)): path.read_bytes()
            for path in sorted((tmp_path / seed).rglob("*"))
            if path.is_file() and path.name not in ("report.json", "report.html")  # they hold how long each step took
        }
        for seed in ("1", "2")
    ]
    assert made[0] == made[1]
    manifests = [name for name in made[0] if name.endswith("manifest.json")]
    assert len(manifests) == 4
    told = json.loads(made[0][min(manifests, key=len)])["report"]["sources"]["pairs"]
    assert (told["kept"], told["bad"]) == (3, 7)
    assert "0x" not in json.dumps(told["bad_inputs"])
