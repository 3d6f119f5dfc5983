"""The emoji sets that ship, what of them is held out, and how a set is made from SVG."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from calumma.jobs.emoji import rasterize
from calumma.jobs.emoji.documents import FULL, WITH_SKINS
from calumma.jobs.emoji.pictures import SKINS, Picture, choose, read_sets, split, write_set
from calumma.platform.specification import SpecificationError

SETS = Path(rasterize.__file__).parent / "sets"


@pytest.fixture(scope="module")
def shipped() -> list[Picture]:
    return read_sets()


@pytest.fixture(scope="module")
def chosen(shipped: list[Picture]) -> list[Picture]:
    return choose(shipped, FULL.groups, FULL.things, WITH_SKINS)


def test_two_styles_ship_in_under_eight_megabytes_with_their_licences(shipped: list[Picture]) -> None:
    assert Counter(p.style for p in shipped).keys() == {"Noto", "Fluent"}
    assert sum(file.stat().st_size for file in SETS.glob("*.parquet")) < 8e6
    assert {file.name for file in SETS.glob("LICENSE.*")} == {"LICENSE.noto", "LICENSE.fluent", "LICENSE.unicode"}
    apple = next(p for p in shipped if (p.thing, p.style) == ("red apple", "Noto"))
    assert (apple.picture().size, apple.group) == ((64, 64), "Food & Drink")
    assert {"fruit", "red"} <= set(apple.keywords)
    red, green, blue = np.asarray(apple.picture(), float)[24:44, 20:44].mean((0, 1))
    assert red > 1.5 * max(green, blue)


def test_every_thing_is_shown_in_every_style_and_every_skin(chosen: list[Picture]) -> None:
    shown = Counter((p.thing, p.skin) for p in chosen)
    assert set(shown.values()) == {2}
    assert {thing for thing, skin in shown if skin} == set(WITH_SKINS)
    assert len({thing for thing, _ in shown}) == FULL.things + len(WITH_SKINS)
    assert all((thing, skin) in shown for thing in WITH_SKINS for skin in ("", *SKINS))


@pytest.mark.parametrize("seed", range(5))
def test_what_is_held_out_can_be_composed_of_what_is_trained(chosen: list[Picture], seed: int) -> None:
    train, held_out = split(chosen, seed)
    combinations = [{(p.thing, p.skin, p.style) for p in part} for part in (train, held_out)]
    assert combinations[0].isdisjoint(combinations[1])
    assert len(train) + len(held_out) == len(chosen)
    assert len(held_out) >= 0.1 * len(chosen)
    for p in held_out:
        assert any(q.thing == p.thing and q.skin == p.skin for q in train)  # in another style
        assert any(q.style == p.style and q.skin == p.skin for q in train)  # another thing
        if p.skin:
            assert any(q.thing == p.thing and q.style == p.style for q in train)  # in another skin
    assert split(chosen, seed)[1] == held_out
    assert split(chosen, seed + 1)[1] != held_out


def test_a_moved_picture_is_another_of_the_same_size_on_white(chosen: list[Picture]) -> None:
    moved = chosen[0].moved(np.random.default_rng(0))
    assert (moved.word, moved.picture().size) == (chosen[0].word, (64, 64))
    assert moved.encoded != chosen[0].encoded
    assert min(moved.picture().getpixel((0, 0))) > 250  # type: ignore[arg-type]


# -- making a set


SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 1"><rect width="2" height="1" fill="#f00"/></svg>'


def annotations(folder: Path) -> Path:
    entries = {"\U0001f34e": ("red apple", ["fruit"]), "\U0001f44b": ("waving hand", ["hand"]), "\u2764": ("heart", [])}
    entries |= {"\U0001f468\u200d\U0001f3eb": ("man teacher", [])}
    values = {key: {"tts": [name], "default": words} for key, (name, words) in entries.items()}
    file = folder / "annotations.json"
    file.write_text(json.dumps({"annotations": {"annotations": values}}))
    return file


def test_a_folder_of_svg_becomes_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("resvg_py")
    names = ["1f34e", "emoji_u1f44b_1f3ff", "2764-fe0f", "1f468-1f3ff-200d-1f3eb", "1f9ff"]
    for name in names:  # the last one has no name in the annotations
        (tmp_path / f"{name}.svg").write_text(SVG)
    out = tmp_path / "sets"
    given = [
        "--out",
        str(out),
        "--set",
        f"Mine={tmp_path}",
        "--size",
        "32",
        "--annotations",
        str(annotations(tmp_path)),
    ]
    assert rasterize.main(given) == 0
    found = read_sets(str(out))
    assert [(p.thing, p.skin) for p in found] == [("heart", ""), ("red apple", ""), ("waving hand", "dark")]
    picture = found[0].picture()
    assert picture.size == (32, 32)
    assert min(picture.getpixel((16, 2))) > 240  # type: ignore[arg-type]  # the drawing is half as high as wide
    assert picture.getpixel((16, 16))[0] > 240 > 60 > picture.getpixel((16, 16))[1]  # type: ignore[index]


def test_what_is_no_set_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    given = ["--out", str(tmp_path), "--set", f"Mine={tmp_path / 'empty'}", "--annotations", str(annotations(tmp_path))]
    assert rasterize.main(given) == 1
    assert "neither icons.json" in capsys.readouterr().err
    assert rasterize.main(["--out", str(tmp_path), "--annotations", str(tmp_path / "empty")]) == 1
    assert "holds no annotations" in capsys.readouterr().err
    with pytest.raises(SpecificationError, match="rasterize makes them"):
        read_sets(str(tmp_path / "empty"))
    (tmp_path / "empty" / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(SpecificationError, match=r"a\.parquet is no set"):
        read_sets(str(tmp_path / "empty"))


def test_a_written_set_is_read_as_it_was(chosen: list[Picture], tmp_path: Path) -> None:
    own = [p for p in chosen if p.style == "Noto"][:9]
    write_set(tmp_path / "noto.parquet", own)
    assert read_sets(str(tmp_path)) == own
