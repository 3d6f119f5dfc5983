"""What a source is: a name, a format, a location."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from calumma.platform.specification import Section


class Source(Section):
    name: str = Field(pattern=r"^[a-z0-9_-]+$", description="of the folder of its documents, and in reports")
    format: str = Field(description="the name of a format, or a reader of your own as package.module:function")
    location: str = Field(description="a file, or a prefix whose files are all read")
    images: str | None = Field(
        None,
        description="the folder of the images that files refer to; default: each file's own, or for pages the location",
    )
    options: dict[str, Any] = Field({}, description="options of the reader, such as {field: body}")

    @field_validator("format")
    @classmethod
    def _known(cls, format: str) -> str:
        _check(format, {})
        return format

    @field_validator("options")
    @classmethod
    def _understood(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "format" in info.data:  # else the format is wrong already
            _check(info.data["format"], options)
        return options


def _check(format: str, options: dict[str, Any]) -> None:
    from calumma.platform.sources import formats  # only where a source is given: readers need Pillow and numpy

    formats.check_format(format, options)
