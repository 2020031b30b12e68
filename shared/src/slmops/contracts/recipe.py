"""A recipe: the list of passes that turns a version into a variant. It is data, so it can be shown and compared."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

from slmops.contracts.descriptor import Digest, digest_of
from slmops.contracts.names import Name

_DIGEST: TypeAdapter[Digest] = TypeAdapter(Digest)
ANCHOR = "anchor"
"""The pass that keeps the grids of the variant that its parameter `predecessor` names."""

ADAPTERS = "adapters"
"""The parameter of `pack` that names the projections at which the graph takes a LoRA."""


class PassSpec(BaseModel):
    """One step: the pass by name, and its parameters. Absent parameters have the pass's defaults."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, serialize_by_alias=True, extra="ignore")

    pass_: Name = Field(alias="pass")
    params: dict[str, JsonValue] = Field(default_factory=dict)


class Recipe(BaseModel):
    """A named list of passes in order. The optimizer checks that the passes exist and fit together."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Name
    description: str = ""
    passes: tuple[PassSpec, ...] = Field(min_length=1)

    @property
    def anchored_on(self) -> Digest | None:
        """The variant whose grids this recipe keeps."""
        found = [step.params.get("predecessor") for step in self.passes if step.pass_ == ANCHOR]
        return _DIGEST.validate_python(found[0]) if found else None

    @property
    def takes_adapters(self) -> bool:
        """Whether the variant can be run with a separate LoRA, so an adapter is not merged into its base."""
        return any(step.params.get(ADAPTERS) for step in self.passes)

    @property
    def digest(self) -> Digest:
        """The digest of the passes. Recipes that differ only in name or description have the same digest."""
        passes = [step.model_dump() for step in self.passes]
        return digest_of(json.dumps(passes, sort_keys=True, separators=(",", ":")).encode())
