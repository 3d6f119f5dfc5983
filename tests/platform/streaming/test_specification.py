"""How a stage says that its shards are read."""

from __future__ import annotations

from pathlib import Path

from calumma.platform.streaming.specification import ReadingSettings


def test_settings_make_the_reader_that_training_and_held_out_measurement_share(tmp_path: Path) -> None:
    plain = ReadingSettings().reader()
    assert plain.verify
    assert plain.cache is None
    asked = ReadingSettings.model_validate(
        {"verify": False, "cache": {"directory": str(tmp_path), "gigabytes": 0.5}}
    ).reader()
    assert not asked.verify
    assert asked.cache is not None
    assert (asked.cache.directory, asked.cache.limit) == (tmp_path, 500_000_000)
