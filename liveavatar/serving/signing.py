"""C2PA: a signed statement inside a recording that a machine made it (serving.md 19.4).

    signer = Signer(folder)                    # or Signer(folder, certificate=..., key=...): PEM files of the operator
    signer.sign(Path("talk.mp4"), title="talk")   # the finished file, ordinary or fragmented, is replaced by its signed copy
    inspect(Path("talk.mp4"))                  # -> Manifest

Both block (12 ms for three seconds of video, more for long files): off the event loop, in a thread. Separate HLS fragments cannot be signed:
`signer.seal` signs a statement about them with the same key (fragments.py).

Without a certificate of the operator's, a local authority and a leaf are made at first start. Such a signature proves that
the file is unchanged since it was signed by this server; it says nothing to strangers, whose programs show "unknown
signer", because the authority is in no trust list. The hash covers pictures, sound and their index; C2PA leaves out the boxes ftyp,
free, skip and mfra and the frame of its own box, so a byte changed there goes unseen and changes nothing that is shown.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from liveavatar import __version__
from liveavatar.core import ConfigError, LiveAvatarError
from liveavatar.serving.durable import private_folder, replace_file

CREATED_BY_MACHINE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
FORMAT = "video/mp4"
AUTHORITY_YEARS, LEAF_YEARS = 10, 2
DOCUMENT_SIGNING = "1.3.6.1.5.5.7.3.36"  # RFC 9336; of the extended key usages that C2PA allows
CHAIN, KEY, AUTHORITY = "c2pa.pem", "c2pa.key", "c2pa-authority.pem"
JWS = {"es256": "ES256", "es384": "ES384", "es512": "ES512", "ed25519": "EdDSA", "ps256": "PS256"}  # C2PA's names -> those of RFC 7518

Seal = Callable[[bytes], str]  # a JSON statement -> the same, signed, with the certificates


class SigningError(LiveAvatarError):
    """A recording could not be signed; it is as it was."""


@dataclass(frozen=True)
class Manifest:
    """What a file says of itself. found: there is a manifest. valid: it and the media are as they were signed. trusted: by somebody on
    a trust list of this machine. made_by_machine: declares trainedAlgorithmicMedia. signer: name in the certificate. problems: codes of C2PA."""

    found: bool
    valid: bool = False
    trusted: bool = False
    made_by_machine: bool = False
    signer: str = ""
    problems: tuple[str, ...] = ()


class Signer:
    """Signs finished mp4 files; one object may serve many threads.

    folder: where a local authority's files are kept or made. certificate, key: PEM files, the chain with the leaf first. Raises ConfigError.
    """

    def __init__(self, folder: str | Path, certificate: str | Path | None = None, key: str | Path | None = None):
        if (certificate is None) != (key is None):
            raise ConfigError("provenance.certificate and provenance.key go together: set both or neither")
        self.local = certificate is None
        if self.local:
            self._chain, self._key = _local_identity(Path(folder))
        else:
            self._chain, self._key = read(Path(certificate)), read(Path(key))
        self._algorithm = _algorithm(self._key)
        self._sealer().close()  # refuses now, and not after the first recording, what C2PA does not accept

    def sign(self, path: Path, title: str = "") -> None:
        """Replace a finished mp4 by its signed copy, at once or not at all. Raises SigningError."""
        import c2pa

        signed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            with c2pa.Builder(_statement(title or path.name)) as builder, self._sealer() as sealer:
                with open(path, "rb") as source, open(signed, "w+b") as target:
                    builder.sign(sealer, FORMAT, source, target)
                    target.flush()
                    os.fsync(target.fileno())
            os.replace(signed, path)
        except (c2pa.C2paError, OSError) as error:
            raise SigningError(f"{path}: cannot be signed: {error}") from None
        finally:
            signed.unlink(missing_ok=True)

    def seal(self, statement: bytes) -> str:
        """A JSON Web Signature of it, compact, with the certificates in x5c (RFC 7515)."""
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import Encoding
        from jwt.api_jws import PyJWS

        chain = [base64.b64encode(one.public_bytes(Encoding.DER)).decode() for one in x509.load_pem_x509_certificates(self._chain)]
        return PyJWS().encode(statement, self._key, JWS[self._algorithm], headers={"typ": "provenance", "x5c": chain})

    def _sealer(self):
        import c2pa

        try:
            return c2pa.Signer.from_info(c2pa.C2paSignerInfo(self._algorithm.encode(), self._chain, self._key, None))
        except c2pa.C2paError as error:
            raise ConfigError(f"the certificate cannot sign for C2PA: {error}") from None


def inspect(path: Path) -> Manifest:
    """The manifest inside an mp4 and whether it holds. Raises LiveAvatarError when the file cannot be read."""
    import c2pa

    try:
        with open(path, "rb") as file:
            if file.read(8)[4:] != b"ftyp":  # no mp4
                return Manifest(found=False)
            file.seek(0)
            with c2pa.Reader(FORMAT, file) as reader:
                report = json.loads(reader.json())
    except c2pa.C2paError.ManifestNotFound:
        return Manifest(found=False)
    except c2pa.C2paError as error:
        return Manifest(found=True, problems=(str(error)[:200],))
    except OSError as error:
        raise LiveAvatarError(f"{path}: cannot be read: {error.strerror}") from None
    return _judged(report)


def unseal(token: str, authority: bytes = b"") -> tuple[dict, Manifest]:
    """The statement of a JWS and what is to be thought of it; {} where it is not as it was signed. authority: PEM certificates that are trusted."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from jwt.api_jws import PyJWS
    from jwt.exceptions import PyJWTError

    try:
        said = PyJWS().get_unverified_header(token).get("x5c", [])
        chain = [x509.load_der_x509_certificate(base64.b64decode(one, validate=True)) for one in said]
        leaf = chain[0]
        for one, issuer in zip(chain, chain[1:]):
            one.verify_directly_issued_by(issuer)
        statement = dict(json.loads(PyJWS().decode(token, leaf.public_key(), algorithms=list(JWS.values()))))
    except (PyJWTError, InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError, LookupError):
        return {}, Manifest(found=True, problems=("signature.invalid",))
    now = datetime.datetime.now(datetime.timezone.utc)
    ended = () if leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc else ("signingCredential.expired",)
    trusted = set(x509.load_pem_x509_certificates(authority)) if authority else set()
    names = leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return statement, Manifest(found=True, valid=not ended, trusted=not trusted.isdisjoint(chain), signer=str(names[0].value) if names else "",
                               made_by_machine=statement.get("digitalSourceType") == CREATED_BY_MACHINE, problems=ended)  # fmt: skip


def _judged(report: dict) -> Manifest:
    manifest = report["manifests"][report["active_manifest"]]
    actions = [action for part in manifest.get("assertions", ()) if part["label"].startswith("c2pa.actions") for action in part["data"]["actions"]]
    failures = tuple(sorted({status["code"] for status in report.get("validation_status", ())}))
    state = report.get("validation_state", "Invalid")
    return Manifest(
        found=True, valid=state in ("Valid", "Trusted"), trusted=state == "Trusted",
        made_by_machine=any(action.get("digitalSourceType") == CREATED_BY_MACHINE for action in actions),
        signer=str(manifest.get("signature_info", {}).get("common_name") or manifest.get("signature_info", {}).get("issuer") or ""),
        problems=failures,
    )  # fmt: skip


def _statement(title: str) -> dict:
    created = {"action": "c2pa.created", "digitalSourceType": CREATED_BY_MACHINE, "softwareAgent": {"name": "liveavatar", "version": __version__}}
    return {
        "claim_generator_info": [{"name": "liveavatar", "version": __version__}], "title": title, "format": FORMAT,
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }  # fmt: skip


def read(file: Path) -> bytes:
    """Raises ConfigError."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None


def expiry(chain: bytes) -> float:
    """Unix seconds at which the first certificate of a PEM chain ends. Raises ConfigError."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(chain).not_valid_after_utc.timestamp()
    except ValueError as error:
        raise ConfigError(f"the certificate cannot be read: {error}") from None


def _algorithm(key: bytes) -> str:
    """C2PA's name of how a private key in PEM signs."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the signing key cannot be read: {error}") from None
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in ("secp256r1", "secp384r1", "secp521r1"):
        return {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}[private.curve.name]
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(private, rsa.RSAPrivateKey):
        return "ps256"
    raise ConfigError("the signing key must be P-256, P-384, P-521, Ed25519 or RSA")


# ---------------------------------------------------------------- the local authority


def _local_identity(folder: Path) -> tuple[bytes, bytes]:
    """Chain (leaf, authority) and the leaf's key, PEM; made at first start, anew when the leaf is within a month of its end."""
    from cryptography import x509

    now = datetime.datetime.now(datetime.timezone.utc)
    both = folder / CHAIN
    if both.exists():
        leaf = x509.load_pem_x509_certificates(read(both))[0]
        if leaf.not_valid_after_utc - now > datetime.timedelta(days=30):
            return read(both), read(folder / KEY)
    chain, key, authority = local_chain(now)
    private_folder(folder)
    both.unlink(missing_ok=True)
    for name, data in ((AUTHORITY, authority), (KEY, key), (CHAIN, chain)):  # the chain last: where it is, all are
        replace_file(folder / name, data)
    return chain, key


def local_chain(now: datetime.datetime) -> tuple[bytes, bytes, bytes]:
    """A fresh authority and leaf -> PEM of the chain, of the leaf's key, and of the authority alone. The authority's key is forgotten."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    root_key, leaf_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root_name, leaf_name = _name("liveavatar local authority"), _name("liveavatar local signer")
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION, x509.ObjectIdentifier(DOCUMENT_SIGNING)])
    root = _certificate(root_name, root_name, root_key.public_key(), root_key, now, AUTHORITY_YEARS, None)
    leaf = _certificate(leaf_name, root_name, leaf_key.public_key(), root_key, now, LEAF_YEARS, usages)
    pem = [certificate.public_bytes(form.Encoding.PEM) for certificate in (leaf, root)]
    key = leaf_key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    return b"".join(pem), key, pem[1]


def _name(common: str):
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "liveavatar local"), x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(subject, issuer, public, signing_key, now: datetime.datetime, years: int, usages):
    """X.509 v3 with the key identifiers that C2PA asks for. usages: extended ones of a leaf, None for an authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256

    authority = usages is None
    rights = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False)
    builder = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public).serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5)).not_valid_after(now + datetime.timedelta(days=365 * years))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **rights), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False)
    )  # fmt: skip
    return (builder if authority else builder.add_extension(usages, critical=False)).sign(signing_key, SHA256())
