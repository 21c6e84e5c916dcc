"""The JSON Schema (draft-07) of a policy file, made from the declarations of fields.py.

For editors: it knows keys, types and spellings. What one key says of another only the loader knows, so everything that
loads without an error fits the schema, but not the other way round.
"""

from .fields import FILE
from .kinds import Schema


def json_schema() -> Schema:
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "pillion policy",
        "description": "A policy file of pillion: services, their routes and rules. See docs/policy.md.",
        **FILE.schema(),
    }
