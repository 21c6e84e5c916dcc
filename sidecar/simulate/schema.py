"""The JSON Schema (draft-07) of a scenario file, made from the declarations of fields.py.

For editors, as that of policy files: every scenario that is read without an error fits it, but not the other way round.
A policy that stands in the scenario is held to the schema of policies.
"""

from sidecar.model.kinds import Schema

from .fields import SCENARIO


def json_schema() -> Schema:
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "pillion scenario",
        "description": "A scenario for `pillion simulate`. See docs/simulate.md.",
        **SCENARIO.schema(),
    }
