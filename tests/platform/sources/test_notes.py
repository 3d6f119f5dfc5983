"""What is not read is counted by name, in whatever order it was found."""

from __future__ import annotations

from calumma.platform.sources.notes import MOST_NAMES, MOST_WARNINGS, OTHERS, Notes, sentences, suffix


def test_equal_counts_have_equal_reports() -> None:
    one, two = Notes(), Notes()
    for notes, names in ((one, ("id", "score", "id")), (two, ("score", "id", "id"))):
        for name in names:
            notes.skip("fields", name)
    one.skip("members", ".cls")
    two.add(Notes(unread={"members": {".cls": 1}}))
    assert list(one.report()["unread"]["fields"]) == list(two.report()["unread"]["fields"]) == ["id", "score"]
    assert one.report() == two.report() == {"unread": {"fields": {"id": 2, "score": 1}, "members": {".cls": 1}}}
    assert Notes().report() == {}


def test_sentences_name_the_most_frequent_first() -> None:
    notes = Notes(lacking={"caption": 6})
    for number in range(10):
        notes.skip("fields", f"f{number}", number + 1)
    assert sentences({"read": 6, **notes.report()}) == [
        "fields not read: f9 (10), f8 (9), f7 (8), f6 (7), f5 (6), f4 (5), f3 (4), f2 (3) and 2 more",
        "6 of 6 documents have no caption",
    ]
    told = sentences({"read": 3, "bad": 4, **Notes(lacking={"caption": 6}).report()})
    assert told == ["6 of 7 documents, with those that are unreadable, have no caption"]


def test_notes_stay_small_and_lose_no_count() -> None:
    notes = Notes()
    for number in range(1000):
        notes.skip("fields", f"{number}")
        notes.warn(f"{number}", "odd")
    assert len(notes.unread["fields"]) == MOST_NAMES + 1
    assert notes.unread["fields"][OTHERS] == 1000 - MOST_NAMES
    assert (len(notes.warnings), notes.warned) == (MOST_WARNINGS, 1000)
    notes.add(notes.model_copy(deep=True))
    assert sum(notes.unread["fields"].values()) == notes.warned == 2000
    assert len(notes.warnings) == MOST_WARNINGS


def test_suffixes_are_counted_with_their_compression() -> None:
    names = ("a/b.JPG", "a.b/c", "x.tar.gz", "x.en.txt", ".hidden", "s3://bucket/a.csv")
    assert [suffix(name) for name in names] == [".jpg", "c", ".tar.gz", ".txt", ".hidden", ".csv"]
