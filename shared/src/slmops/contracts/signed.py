"""The plan as stored in the bucket: signed by the rollout service's own key, in a DSSE envelope (secure-systems-lab).

This module does not check signatures, which is enough for readers that only display a plan. Gateways verify a plan
with `kit.trust.plans`.
"""

from __future__ import annotations

from base64 import b64decode
from typing import Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from slmops.contracts.plan import Plan
from slmops.contracts.tuf_names import Attack, refused

PLAN_TYPE: Final = "application/vnd.slmops.plan.v1+json"
PLAN_LIMIT_BYTES: Final = 1 << 20


class PlanStatement(BaseModel):
    """The signed content. After `expires_at` nobody acts on it; the rollout service signs a new one before."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    plan: Plan
    signed_at: AwareDatetime
    expires_at: AwareDatetime


class PlanSignature(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    keyid: str = Field(min_length=1, max_length=128)
    sig: str = Field(max_length=8192, description="Base64")


class SignedPlan(BaseModel):
    """The envelope. `payload` is the statement's JSON in base64. The signature covers these bytes, so the JSON needs no
    canonical form."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, serialize_by_alias=True, extra="ignore")

    payload: str
    payload_type: Literal["application/vnd.slmops.plan.v1+json"] = Field(default=PLAN_TYPE, alias="payloadType")
    signatures: tuple[PlanSignature, ...] = Field(min_length=1, max_length=16)

    @classmethod
    def decode(cls, data: bytes) -> SignedPlan:
        """Parses an envelope. Raises `TrustRefused` for other data, in particular for an unsigned plan."""
        if len(data) > PLAN_LIMIT_BYTES:
            raise refused(Attack.ENDLESS_DATA, f"the plan has {len(data)} bytes", where="plan")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            what = f"the plan is not in a signed envelope ({error.error_count()} errors)"
            raise refused(Attack.TOO_FEW_KEYS, what, where="plan", fix="Upgrade the rollout service.") from error

    def statement(self) -> PlanStatement:
        """Returns the content without verifying it. Raises `TrustRefused` if it is not a plan."""
        try:
            return PlanStatement.model_validate_json(self.content())
        except ValidationError as error:
            what = f"the signed plan is not valid ({error.error_count()} errors)"
            raise refused(Attack.CORRUPT, what, where="plan") from error

    def content(self) -> bytes:
        try:
            return b64decode(self.payload, validate=True)
        except ValueError as error:
            raise refused(Attack.CORRUPT, "the plan's payload is not base64", where="plan") from error


def plan_in(data: bytes) -> Plan:
    """Returns the plan of an envelope without verifying it. Raises `TrustRefused`."""
    return SignedPlan.decode(data).statement().plan
