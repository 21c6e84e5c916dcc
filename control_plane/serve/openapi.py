"""The OpenAPI 3.1 document of the operator API, made of its declarations. Pure."""

from typing import Any

from .answers import ERROR
from .operations import ANYBODY, OPERATIONS, Operation


def document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for each in OPERATIONS:
        paths.setdefault(each.path, {})[each.method.lower()] = _operation(each)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pillion operator API",
            "version": version or "0",
            "description": "Joining a mesh and operating it. TLS 1.3; errors have one form, with a stable code.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "an operator token"},
                "certificate": {"type": "mutualTLS", "description": "an operator's certificate (POST /v1/login)"},
            },
            "schemas": {"Error": ERROR.schema()},
            "responses": {
                "Error": {
                    "description": "No, and why.",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
            },
        },
    }


def statuses(operation: Operation) -> tuple[int, ...]:
    """Every status that an operation may answer with."""
    found = {200, 503, *operation.codes}
    if operation.query or operation.parameters or operation.body is not None:
        found.add(400)
    if operation.parameters:
        found.add(404)
    if operation.body is not None:
        found |= {413, 415, 429}
    if operation.access != ANYBODY:
        found |= {401, 403, 429}
    return tuple(sorted(found | {400}))


def _operation(each: Operation) -> dict[str, Any]:
    data: dict[str, Any] = {"operationId": each.name, "summary": each.summary}
    if each.access == ANYBODY:
        data["security"] = []
    else:
        data["security"] = [{"token": []}, {"certificate": []}]
        data["x-pillion-role"] = each.access
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": shape.schema()}
        for name, shape in each.parameters.items()
    ]
    for name, (shape, usual) in each.query.items():
        schema = shape.schema() if usual is None else shape.schema() | {"default": usual}
        parameters.append({"name": name, "in": "query", "required": False, "schema": schema})
    if parameters:
        data["parameters"] = parameters
    if each.body is not None:
        data["requestBody"] = {"required": True, "content": {"application/json": {"schema": each.body.schema()}}}
    data["responses"] = {
        "200": {"description": "Yes.", "content": {"application/json": {"schema": each.answer.schema()}}},
        **{str(status): {"$ref": "#/components/responses/Error"} for status in statuses(each) if status != 200},
    }
    return data
