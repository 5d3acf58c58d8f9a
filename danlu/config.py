"""YAML and dotted overrides to frozen, typed objects; every problem of a file is told at once, with its line."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """A frozen value that knows no unknown keys.  `kind` tags the members of a union."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())
