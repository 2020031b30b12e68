"""The error tree. Its branches follow what the caller does: retry, or give up and report the reason.

    SlmopsError
    ├── TemporaryError               retry after `delay`; on the last delivery it is dead-lettered
    │   ├── Unreachable              NATS, S3, the database or a gateway does not answer
    │   │   ├── CredentialsRefused   NATS answers and rejects our credentials
    │   │   └── ServerUntrusted      TLS with the server failed: retried, because a server's operator can repair it
    │   │       ├── UnknownAuthority    none of our authorities signed its certificate: perhaps an impostor
    │   │       ├── WrongHostName       its certificate is for another host
    │   │       ├── CertificateExpired  its certificate is not valid at this time
    │   │       └── NotEncrypted        it answers in plain text where TLS is expected
    │   │   ├── DatabaseUnreachable  the service's own database does not answer: messages are kept until it does
    │   │   └── StoreUnreachable     the object store does not answer; the service that uses it does
    │   ├── Conflict                 another process wrote first: read again, decide again
    │   ├── NotReady                 something that is expected does not exist yet
    │   ├── Throttled                the caller sent too many requests that were rejected
    │   └── DiskFull                 not enough disk space for a write
    │       └── DatabaseFull         the service's own database cannot grow: messages are kept until it can
    └── PermanentError               retrying changes nothing: reject, dead-letter, tell the user
        ├── InvalidMessage           an event, command or configuration that does not validate
        ├── InvalidName              a model, gateway or blueprint name outside the grammar
        ├── InvalidVersion           not a semantic version
        ├── InvalidModel             a model file or directory that cannot be read
        │   ├── NotAModel            neither GGUF nor a Hugging Face directory
        │   ├── TruncatedModel       the header promises more bytes than there are
        │   └── UnsupportedArchitecture
        ├── InvalidRecipe            a recipe that names an unknown pass, or contradicts itself
        ├── InvalidCursor            a cursor that no page of this list ended with
        ├── InvalidBlueprint         a blueprint that contradicts itself
        ├── NotFound
        ├── AlreadyExists            the name is taken by other bytes
        ├── DigestMismatch           the bytes do not match their digest
        │   └── CorruptBlob          the object store holds other bytes under a digest; the blob is in quarantine
        ├── InvalidDelta             a delta that is damaged, hostile, or of another version
        ├── InvalidBundle            a bundle that is damaged, hostile, or of another format
        ├── SignatureInvalid         no valid signature by a trusted key
        │   └── TrustRefused         metadata or a plan that may be an attack; the text begins with the attack's name
        ├── MessageTooLarge          a request or an answer that the bus does not take
        ├── Denied                   the caller may not do this or access this
        │   └── CredentialRevoked    the gateway's key was revoked by an admin
        ├── IllegalTransition        a state machine has no such edge
        ├── FactsMissing             stored events were removed before they were read
        ├── IncompatibleDatabase     a database of a newer release, or of another service
        ├── IncompatibleFolder       a data folder of a newer release, or of another part of slmops
        ├── PortTaken                another process listens on our port
        ├── OptimizationFailed       a pass or its process failed
        ├── JobCancelled             the work was cancelled before it was done
        ├── NotEnoughMemory          the work needs more than the host or its limit has
        ├── InferenceFailed          a model could not be loaded or run
        │   ├── PromptRefused        this request cannot be answered; the runner continues
        │   │   └── ContextLengthExceeded  the prompt leaves no room for an answer within the model's context
        │   └── RunnerDied           the runner's process ended; another or a restarted one may answer
        └── InternalError            a defect of slmops; the log has the traceback

Codes cross the wire and are used in scripts, so a code is never reused for something else.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from slmops.contracts.exit_codes import ExitCode


class SlmopsError(Exception):
    """The root of all errors: `what` went wrong, `where`, and how to `fix` it. All three are texts for a person."""

    code: ClassVar[str] = "error"
    exit_code: ClassVar[ExitCode] = ExitCode.REFUSED

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        text = self.what
        if self.where:
            text += f" (at {self.where})"
        if self.fix:
            text += f". {self.fix}"
        return text


class TemporaryError(SlmopsError):
    """Try again after `delay`."""

    code = "temporary"
    exit_code = ExitCode.TEMPORARY
    default_delay: ClassVar[timedelta] = timedelta(seconds=2)

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        fix: str | None = None,
        delay: timedelta | None = None,
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.delay = self.default_delay if delay is None else delay


class Unreachable(TemporaryError):
    code = "unreachable"


class CredentialsRefused(Unreachable):
    code = "credentials_refused"


class ServerUntrusted(Unreachable):
    code = "server_untrusted"


class UnknownAuthority(ServerUntrusted):
    code = "unknown_authority"


class WrongHostName(ServerUntrusted):
    code = "wrong_host_name"


class CertificateExpired(ServerUntrusted):
    code = "certificate_expired"


class NotEncrypted(ServerUntrusted):
    code = "not_encrypted"


class StoreUnreachable(Unreachable):
    code = "store_unreachable"


class DatabaseUnreachable(Unreachable):
    code = "database_unreachable"


class Conflict(TemporaryError):
    code = "conflict"


class NotReady(TemporaryError):
    code = "not_ready"


class Throttled(TemporaryError):
    code = "throttled"
    default_delay = timedelta(seconds=30)


class DiskFull(TemporaryError):
    code = "disk_full"


class DatabaseFull(DiskFull):
    code = "database_full"


class PermanentError(SlmopsError):
    """Retrying gives the same result."""

    code = "permanent"


class InvalidMessage(PermanentError):
    code = "invalid_message"
    exit_code = ExitCode.WRONG_INPUT


class InvalidName(PermanentError):
    code = "invalid_name"
    exit_code = ExitCode.WRONG_INPUT


class InvalidVersion(PermanentError):
    code = "invalid_version"
    exit_code = ExitCode.WRONG_INPUT


class InvalidModel(PermanentError):
    code = "invalid_model"
    exit_code = ExitCode.WRONG_INPUT


class NotAModel(InvalidModel):
    code = "not_a_model"


class TruncatedModel(InvalidModel):
    code = "truncated_model"


class UnsupportedArchitecture(InvalidModel):
    code = "unsupported_architecture"


class InvalidRecipe(PermanentError):
    code = "invalid_recipe"
    exit_code = ExitCode.WRONG_INPUT


class InvalidCursor(PermanentError):
    code = "invalid_cursor"
    exit_code = ExitCode.WRONG_INPUT


class InvalidBlueprint(PermanentError):
    code = "invalid_blueprint"
    exit_code = ExitCode.WRONG_INPUT


class NotFound(PermanentError):
    code = "not_found"


class AlreadyExists(PermanentError):
    code = "already_exists"


class DigestMismatch(PermanentError):
    code = "digest_mismatch"


class CorruptBlob(DigestMismatch):
    code = "corrupt_blob"


class InvalidDelta(PermanentError):
    code = "invalid_delta"
    exit_code = ExitCode.WRONG_INPUT


class InvalidBundle(PermanentError):
    code = "invalid_bundle"
    exit_code = ExitCode.WRONG_INPUT


class SignatureInvalid(PermanentError):
    code = "signature_invalid"


class TrustRefused(SignatureInvalid):
    """Metadata or a plan may be an attack. `what` is `<attack>: <what was seen>`, with an attack of
    `contracts.tuf_names.Attack`."""

    code = "trust_refused"

    @property
    def attack(self) -> str:
        return self.what.partition(":")[0]


class MessageTooLarge(PermanentError):
    code = "message_too_large"


class Denied(PermanentError):
    code = "denied"
    exit_code = ExitCode.NOT_PERMITTED


class CredentialRevoked(Denied):
    code = "credential_revoked"


class IllegalTransition(PermanentError):
    code = "illegal_transition"


class FactsMissing(PermanentError):
    """Stored events are missing, and a decision without them would be wrong. An operator restores them or accepts the
    loss."""

    code = "facts_missing"


class IncompatibleDatabase(PermanentError):
    """A newer release or another service made the database. Nothing was written to it."""

    code = "incompatible_database"


class IncompatibleFolder(PermanentError):
    """A newer release or another part of slmops wrote the data folder. Nothing was written to it."""

    code = "incompatible_folder"


class PortTaken(PermanentError):
    code = "port_taken"


class OptimizationFailed(PermanentError):
    code = "optimization_failed"


class JobCancelled(PermanentError):
    code = "job_cancelled"


class NotEnoughMemory(PermanentError):
    code = "not_enough_memory"


class InferenceFailed(PermanentError):
    code = "inference_failed"


class PromptRefused(InferenceFailed):
    code = "prompt_refused"


class ContextLengthExceeded(PromptRefused):
    code = "context_length_exceeded"


class RunnerDied(InferenceFailed):
    code = "runner_died"


class InternalError(PermanentError):
    code = "internal"
    exit_code = ExitCode.INTERNAL


def _tree(root: type[SlmopsError]) -> dict[str, type[SlmopsError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


class Problem(BaseModel):
    """An error on the wire: the body of a failed reply and the reason in a failed report."""

    model_config = ConfigDict(frozen=True)

    code: str
    what: str
    where: str | None = None
    fix: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Problem:
        """Describes any exception. Foreign ones become `internal` with only their type: their text may hold secrets."""
        if isinstance(error, SlmopsError):
            return cls(code=error.code, what=error.what, where=error.where, fix=error.fix)
        return cls(code=InternalError.code, what=f"unexpected {type(error).__name__}", fix="See the service's log.")

    def error(self) -> SlmopsError:
        """Returns the exception that this problem describes; an unknown code becomes `PermanentError`."""
        kind = _tree(SlmopsError).get(self.code, PermanentError)
        kwargs: dict[str, Any] = {"where": self.where, "fix": self.fix}
        return kind(self.what, **kwargs)
