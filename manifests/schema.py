"""Whether objects are what their kinds may be: Kubernetes' own schemas, and of other kinds those kept in schemas/."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate

from manifests.objects import FOLDER, Object, name_of

# The oldest release that the manifests are for. preStop's sleep needs 1.30.
KUBERNETES = "1.31"
SCHEMAS = FOLDER / "schemas"


def schema(objects: list[Object]) -> Iterator[str]:
    """What does not fit its kind's schema, a misspelt field included; a kind that nobody knows fits none."""
    for one in objects:
        try:
            if known := _custom(one["apiVersion"], one["kind"]):
                jsonschema.Draft7Validator(known).validate(one)
            else:
                kubernetes_validate.validate(one, KUBERNETES, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            yield (
                f"{name_of(one)}: nobody knows {one['kind']} of {one['apiVersion']}: is it misspelt? A custom "
                f"resource's schema goes into {SCHEMAS.relative_to(FOLDER.parent)}"
            )
        except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
            where = ".".join(str(part) for part in error.path)
            yield f"{name_of(one)}: {where or 'it'}: {error.message[:300]}"


@cache
def _custom(api_version: str, kind: str) -> dict[str, Any] | None:
    group, _, version = api_version.rpartition("/")
    path = SCHEMAS / group / f"{kind}_{version}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found
