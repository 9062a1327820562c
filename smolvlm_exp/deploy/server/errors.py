"""Errors in OpenAI's format, in words."""

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse


def describe(error: Mapping[str, Any]) -> str:
    """What pydantic found, and where: `messages[0].content[1].image_url.url: Field required`."""
    _, *path = error["loc"]
    if error["type"] == "json_invalid":
        return f"the request's body is not JSON: {error['ctx']['error']}, at letter {path[0]}."
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    message = error["msg"].removeprefix("Value error, ")
    if not where and error["type"] != "value_error":
        return "the request's body must be a JSON object, sent as application/json."
    return f"{where}: {message}" if where else message


def error_response(
    status: int, message: str, kind: str = "invalid_request_error", headers: Mapping[str, str] | None = None
) -> JSONResponse:
    return JSONResponse(error_content(message, kind), status_code=status, headers=headers)


def error_content(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
