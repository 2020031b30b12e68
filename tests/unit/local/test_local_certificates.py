"""The local authority: what it issues, when it renews, and whom clients trust meanwhile."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from slmops.contracts.errors import InvalidMessage
from slmops.local.certificates import AUTHORITY_VALID_FOR, SERVERS, VALID_FOR, Certificates, Issued

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def certificates(folder: Path, *hosts: str) -> Certificates:
    return Certificates(folder / "tls", hosts)


def shown(ours: Certificates, server: str = "nats") -> x509.Certificate:
    found = Issued.read(ours.server(server))
    assert found
    return found.certificate


def names(certificate: x509.Certificate) -> set[str]:
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in found}


def trusted(ours: Certificates) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(ours.trusted.read_bytes())


def test_each_server_gets_a_certificate_of_the_authority_for_this_machine(tmp_path: Path) -> None:
    ours = certificates(tmp_path)
    assert ours.renew(NOW) == list(SERVERS)
    [authority] = trusted(ours)
    for server in SERVERS:
        certificate = shown(ours, server)
        certificate.verify_directly_issued_by(authority)
        assert names(certificate) == {"localhost", "127.0.0.1", "::1"}
        assert certificate.not_valid_after_utc == NOW + timedelta(days=90)
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert key.curve.name == "secp256r1"
    assert b"PRIVATE" not in ours.trusted.read_bytes()
    assert {stat.S_IMODE(path.stat().st_mode) for path in ours.folder.iterdir()} == {0o600}
    assert stat.S_IMODE(ours.folder.stat().st_mode) == 0o700


def test_a_certificate_is_renewed_after_two_thirds_of_its_life(tmp_path: Path) -> None:
    ours = certificates(tmp_path)
    ours.renew(NOW)
    first = shown(ours)
    assert ours.renew(NOW + timedelta(days=59)) == []
    assert ours.renew(NOW + timedelta(days=61)) == list(SERVERS)
    assert shown(ours) != first
    assert len(trusted(ours)) == 1


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_missing_or_damaged_certificate_is_issued_again(tmp_path: Path, damage: str) -> None:
    ours = certificates(tmp_path)
    ours.renew(NOW)
    ours.server("s3").unlink() if damage == "missing" else ours.server("s3").write_text("no certificate")
    assert ours.renew(NOW) == ["s3"]


def test_a_further_host_is_added_and_stays(tmp_path: Path) -> None:
    certificates(tmp_path).renew(NOW)
    assert certificates(tmp_path, "edge.example", "192.0.2.7").renew(NOW) == list(SERVERS)
    assert certificates(tmp_path).renew(NOW) == []
    assert certificates(tmp_path).renew(NOW + VALID_FOR) == list(SERVERS)
    assert {"edge.example", "192.0.2.7"} < names(shown(certificates(tmp_path)))


@pytest.mark.parametrize("host", ["", " edge", "bücher.example"])
def test_an_invalid_host_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(InvalidMessage, match="not a host name"):
        certificates(tmp_path, host).renew(NOW)


def test_a_new_authority_is_trusted_beside_the_old_one_until_that_expires(tmp_path: Path) -> None:
    ours = certificates(tmp_path)
    ours.renew(NOW)
    [old] = trusted(ours)
    late = NOW + AUTHORITY_VALID_FOR * 0.7
    assert ours.renew(late) == list(SERVERS)
    new, kept = trusted(ours)
    assert kept == old
    shown(ours).verify_directly_issued_by(new)
    assert ours.renew(late) == []
    ours.renew(NOW + AUTHORITY_VALID_FOR + timedelta(days=1))
    assert old not in trusted(ours)


def test_without_its_key_the_authority_is_replaced(tmp_path: Path) -> None:
    ours = certificates(tmp_path)
    ours.renew(NOW)
    [old] = trusted(ours)
    ours.authority.unlink()
    assert ours.renew(NOW) == list(SERVERS)
    assert trusted(ours)[1] == old


def test_a_clock_that_was_set_back_leads_to_a_valid_certificate(tmp_path: Path) -> None:
    ours = certificates(tmp_path)
    ours.renew(NOW)
    before = NOW - timedelta(days=30)
    assert ours.renew(before) == list(SERVERS)
    assert shown(ours).not_valid_before_utc < before
