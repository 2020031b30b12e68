"""Work that one of several workers pulls from a queue."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from slmops.contracts.cloudevent import event_id
from slmops.contracts.descriptor import Descriptor, Digest
from slmops.contracts.model import ModelFile
from slmops.contracts.names import Name, Version
from slmops.contracts.profile import DeviceProfile


class OptimizeJob(BaseModel):
    """Make the variants of one version for one device profile. On `jobs.optimize.<profile>`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: Name
    version: Version
    digest: Digest = Field(description="Identity of the version's files")
    format: str
    files: tuple[ModelFile, ...] = Field(min_length=1)
    golden: Descriptor | None = None
    profile: DeviceProfile
    recipes: tuple[Name, ...] = Field(min_length=1)

    @property
    def work(self) -> str:
        """What there is to do, whatever it is called: jobs with the same work have the same outcome."""
        return event_id("optimize", self.digest, self.profile.model_dump_json(), *self.recipes)

    @property
    def id(self) -> str:
        """The same job has the same id, however often it is asked for."""
        return event_id(self.work, self.model, self.version)
