"""Forms (multipart/form-data) as values: fields, and files by their field's name."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from calumma.serve.http.wire.errors import APIError, describe_errors

Model = TypeVar("Model", bound=BaseModel)


async def read_form(request: Request, files: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """The form's texts, those given twice as a list, and the contents of the files named. A list's name may end in
    `[]`, as OpenAI's clients send it. Raises APIError on another body, and where a file is a text or a text a file."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise APIError("send a form, with the header Content-Type: multipart/form-data")
    values: dict[str, Any] = {}
    found: dict[str, list[bytes]] = {}
    async with request.form() as form:
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            if isinstance(value, UploadFile) != (name in files):
                raise APIError("must be a file" if name in files else "must not be a file", param=name)
            if isinstance(value, UploadFile):
                found.setdefault(name, []).append(await value.read())
            elif key.endswith("[]"):
                values.setdefault(name, []).append(value)
            elif name in values:
                raise APIError("the field is given twice", param=name)
            else:
                values[name] = value
    return values, found


def validated(model: type[Model], values: Any) -> Model:
    """Raises APIError that names the field, as for a body of JSON."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        message, param = describe_errors(error.errors(), values)
        raise APIError(message, param=param, code="invalid_value") from error


def form_body(model: str, files: dict[str, bool]) -> dict[str, Any]:
    """How the OpenAPI document describes a form: the fields of a schema, and files; whether there may be several."""
    one = {"type": "string", "format": "binary"}
    properties = {name: {"type": "array", "items": one} if several else one for name, several in files.items()}
    fields = {"type": "object", "properties": properties, "required": list(files)}
    schema = {"allOf": [{"$ref": f"#/components/schemas/{model}"}, fields]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
