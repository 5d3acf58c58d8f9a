"""The description of the paths for programs, OpenAPI 3.1, made from what is checked: /openapi.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

import danlu
from danlu.serve.asked import Asked

REFS = "#/components/schemas/{model}"
ERRORS = {"400": "what was asked cannot be done", "401": "a key is needed, or is wrong",
          "403": "asked from a page of another origin",
          "404": "there is no such model", "405": "another method", "408": "the body came too slowly",
          "413": "the body is too large", "415": "the body is not JSON", "421": "the server is not called so",
          "429": "too many requests of this key; see Retry-After", "431": "the headers are too large",
          "503": "no room now, or about to end; see Retry-After"}
SAID = {
    "/v1/chat/completions": ("Continue a conversation", ("id", "object", "created", "model", "choices", "usage")),
    "/v1/completions": ("Continue texts", ("id", "object", "created", "model", "choices", "usage")),
    "/v1/embeddings": ("Vectors of texts", ("object", "model", "data", "usage")),
    "/v1/classify": ("Classes or scores of texts", ("object", "model", "head", "data", "usage")),
    "/v1/tag": ("Tags of words", ("object", "model", "head", "data", "usage")),
    "/v1/answer": ("Answers out of texts", ("object", "model", "head", "data", "usage")),
}
PLAIN = {"/v1/models": ("The models that are served", ("object", "data")), "/health": ("Whether the process lives", ("status",)),
         "/ready": ("Whether requests are taken", ("status",))}


def described(paths: Mapping[str, type[Asked]], names: Sequence[str]) -> dict[str, Any]:
    """Return the whole description; names: of the models."""
    told, found = models_json_schema([(kind, "validation") for kind in dict.fromkeys(paths.values())], ref_template=REFS)
    schemas: dict[str, Any] = {**found["$defs"], "Error": {
        "type": "object", "required": ["error"], "properties": {"error": {
            "type": "object", "required": ["message", "type", "param", "code"], "properties": {
                "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]}}}}}}
    for kind in paths.values():
        schemas[kind.__name__]["properties"]["model"]["anyOf"] = [{"enum": list(names)}, {"type": "null"}]
    made = {path: {"post": _post(path, told[(kind, "validation")])} for path, kind in paths.items()}
    made |= {path: {"get": {"summary": summary, "responses": _responses(_object(keys), False, sorted({"401", "503", *_ALWAYS}))}}
             for path, (summary, keys) in PLAIN.items()}
    return {"openapi": "3.1.0", "info": {"title": "Danlu", "version": danlu.__version__}, "paths": made,
            "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
            "security": [{"key": []}, {}]}


_ALWAYS = ("403", "408", "413", "421", "429", "431")


def _post(path: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    summary, keys = SAID[path]
    return {"summary": summary, "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": _responses(_object(keys), "completions" in path, list(ERRORS))}


def _object(keys: tuple[str, ...]) -> dict[str, Any]:
    return {"type": "object", "required": list(keys)}


def _responses(good: dict[str, Any], streams: bool, codes: list[str]) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": good}}
    if streams:
        content["text/event-stream"] = {}
    error = {"application/json": {"schema": {"$ref": REFS.format(model="Error")}}}
    later = {"Retry-After": {"schema": {"type": "string"}}}
    return {"200": {"description": "the answer", "content": content}} | {
        code: {"description": ERRORS[code], "content": error} | ({"headers": later} if code in ("429", "503") else {})
        for code in codes}
