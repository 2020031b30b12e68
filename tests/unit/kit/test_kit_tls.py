"""Contexts that follow their files, and what a failed handshake is called."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest
import urllib3

from slmops.contracts.errors import (
    CertificateExpired,
    InvalidMessage,
    NotEncrypted,
    ServerUntrusted,
    UnknownAuthority,
    WrongHostName,
)
from slmops.kit.bus.dialing import schemes
from slmops.kit.settings import BusSettings, ObjectSettings
from slmops.kit.tls import client_context, server_context, untrusted
from slmops.local.certificates import Certificates

NOW = datetime.now(UTC)


@pytest.fixture
def ours(tmp_path: Path) -> Certificates:
    certificates = Certificates(tmp_path / "tls")
    certificates.renew(NOW)
    return certificates


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str = "localhost") -> bytes | None:
    """Completes a handshake in memory and returns the server's certificate. Raises the client's error."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server, server_hostname=name)
    answering = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (asking, answering):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return asking.getpeercert(binary_form=True)  # raises `ValueError` if the handshake is not complete


def test_a_context_follows_its_files_in_both_directions(ours: Certificates, tmp_path: Path) -> None:
    client, server = client_context(ours.trusted), server_context(ours.server("nats"))
    handshake(client, server)
    other = Certificates(tmp_path / "other")
    other.renew(NOW)
    os.replace(other.server("nats"), ours.server("nats"))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client, server)
    both = ours.trusted.read_text() + other.trusted.read_text()
    ours.trusted.write_text(both)
    handshake(client, server)
    ours.trusted.write_text(both.removesuffix(other.trusted.read_text()))  # an authority can be forgotten, too
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(client, server)


@pytest.mark.parametrize("damage", ["removed", "damaged"])
def test_a_damaged_file_leaves_the_last_good_one_in_use(ours: Certificates, damage: str) -> None:
    client, server = client_context(ours.trusted), server_context(ours.server("nats"))
    good = handshake(client, server)
    for file in (ours.trusted, ours.server("nats")):
        file.unlink() if damage == "removed" else file.write_text("no certificate")
    assert good is not None
    assert [handshake(client, server) for _ in range(2)] == [good, good]


@pytest.mark.parametrize("content", [None, "", "no certificate"])
def test_an_unusable_file_is_refused_with_the_setting(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InvalidMessage, match="SLMOPS_TLS_CA"):
        client_context(file)
    with pytest.raises(InvalidMessage, match="SLMOPS_HTTP_TLS_CERT"):
        server_context(file)


def test_a_key_of_another_certificate_is_refused(ours: Certificates) -> None:
    with pytest.raises(InvalidMessage, match="KEY_VALUES_MISMATCH"):
        server_context(ours.server("nats"), ours.server("s3"))


def verification(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, "why"
    return error


def plain(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, reason)
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (verification(20), UnknownAuthority),
        (verification(18), UnknownAuthority),
        (verification(62), WrongHostName),
        (verification(64), WrongHostName),
        (verification(10), CertificateExpired),
        (verification(9), CertificateExpired),
        (plain("WRONG_VERSION_NUMBER"), NotEncrypted),
        (plain("SSLV3_ALERT_HANDSHAKE_FAILURE"), ServerUntrusted),
        (plain("UNSUPPORTED_PROTOCOL"), ServerUntrusted),
        (plain("APPLICATION_DATA_AFTER_CLOSE_NOTIFY"), type(None)),
        (ConnectionRefusedError(), type(None)),
    ],
)
def test_a_failed_handshake_has_a_name(error: Exception, kind: type) -> None:
    wrapped = urllib3.exceptions.MaxRetryError(None, "/", urllib3.exceptions.SSLError(error))  # type: ignore[arg-type]
    for seen in (error, wrapped):
        found = untrusted(seen, "nats:4222")
        assert type(found) is kind
        assert found is None or (found.where == "nats:4222" and found.fix)


def test_the_settings_of_encryption_agree(ours: Certificates) -> None:
    assert schemes(BusSettings(nats_url="tls://a, tls://b,c:4222")) == {"tls", "nats"}
    assert not ObjectSettings().s3_is_secure
    assert ObjectSettings(tls_ca=ours.trusted).s3_is_secure
    assert not ObjectSettings(tls_ca=ours.trusted, s3_secure=False).s3_is_secure
    assert ObjectSettings(s3_secure=True).s3_is_secure
