"""Signs plans in an envelope (DSSE) for the rollout service, and verifies them for services and gateways."""

from __future__ import annotations

from base64 import b64decode, b64encode
from datetime import datetime, timedelta

from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import Key, Signature, Signer

from slmops.contracts import freshness
from slmops.contracts.plan import Plan
from slmops.contracts.signed import PLAN_TYPE, PlanSignature, PlanStatement, SignedPlan
from slmops.contracts.tuf_names import Attack, RolloutKeys, refused
from slmops.kit.trust.keys import trusted, usable


def sign_plan(plan: Plan, signer: Signer, now: datetime, valid_for: timedelta = freshness.PLAN) -> bytes:
    """Returns the envelope to write to the bucket."""
    statement = PlanStatement(plan=plan, signed_at=now, expires_at=now + valid_for)
    envelope = Envelope(statement.model_dump_json(by_alias=True).encode(), PLAN_TYPE, {})
    signature = envelope.sign(signer)
    signed = SignedPlan(
        payload=b64encode(envelope.payload).decode(),
        signatures=(PlanSignature(keyid=signature.keyid, sig=b64encode(bytes.fromhex(signature.signature)).decode()),),
    )
    return signed.model_dump_json(by_alias=True).encode()


def open_plan(data: bytes, keys: RolloutKeys) -> tuple[PlanStatement, str]:
    """Verifies an envelope; returns its statement and the id of the key. The caller checks the expiry date.

    Raises `TrustRefused`.
    """
    signed = SignedPlan.decode(data)
    envelope = Envelope(signed.content(), signed.payload_type, _signatures(signed))
    try:
        accepted = envelope.verify(_usable(keys), 1)
    except (VerificationError, ValueError) as error:
        what = "the plan is not signed by a key of the rollout service"
        fix = "If the key was changed, add the new one to the trust metadata: slmops trust rotate rollout."
        raise refused(Attack.WRONG_KEY, what, where="plan", fix=fix) from error
    return signed.statement(), next(iter(accepted))


def still_good(data: bytes, plan: Plan, signer: Signer, now: datetime) -> bool:
    """Returns whether an envelope has exactly this plan, signed by this key, with more than half of its time left."""
    try:
        statement, _ = open_plan(data, RolloutKeys(keys=(trusted(signer.public_key),)))
    except Exception:  # any other content must be replaced
        return False
    lasts = statement.expires_at - statement.signed_at
    return statement.plan == plan and statement.signed_at <= now < statement.signed_at + lasts / 2


def _signatures(signed: SignedPlan) -> dict[str, Signature]:
    found: dict[str, Signature] = {}
    for signature in signed.signatures:
        try:
            raw = b64decode(signature.sig, validate=True)
        except ValueError as error:
            raise refused(Attack.CORRUPT, "the plan's signature is not base64", where="plan") from error
        found[signature.keyid] = Signature(signature.keyid, raw.hex())
    return found


def _usable(keys: RolloutKeys) -> list[Key]:
    """Returns the keys without those whose scheme is unknown to this release."""
    found = []
    for key in keys.keys:
        try:
            found.append(usable(key))
        except (ValueError, KeyError):
            continue
    return found
