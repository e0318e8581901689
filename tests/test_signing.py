"""C2PA (serving.md 19.4): signed recordings play, say what made them, and show any change."""

import datetime
import shutil
import subprocess

import numpy as np
import pytest

from liveavatar.conditioning.media import VideoWriter
from liveavatar.core import ConfigError

pytest.importorskip("c2pa", reason="signing needs liveavatar[serve]")

from liveavatar.serving.signing import CHAIN, KEY, Manifest, Signer, SigningError, _certificate, _name, inspect, local_chain  # noqa: E402

NOW = datetime.datetime.now(datetime.timezone.utc)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """An ordinary mp4 of one second."""
    path, rng = tmp_path_factory.mktemp("video") / "talk.mp4", np.random.default_rng(0)
    with VideoWriter(path, 64, 64) as out:
        out.write(rng.integers(0, 256, (25, 64, 64, 3), dtype=np.uint8), rng.normal(0, 0.1, 16000).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def fragmented(video):
    """The same in fragments, as a recorder leaves it."""
    import av

    path = video.with_name("fragments.mp4")
    with av.open(str(video)) as source, av.open(str(path), "w", options={"movflags": "frag_keyframe+empty_moov+default_base_moof"}) as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    return path


@pytest.fixture(scope="module")
def signer(tmp_path_factory):
    return Signer(tmp_path_factory.mktemp("keys"))


def signed(signer, source, folder):
    path = folder / source.name
    shutil.copy(source, path)
    signer.sign(path, title="a talk")
    return path


def pictures(path) -> int:
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("kind", ["video", "fragmented"])
def test_a_signed_recording_says_what_made_it_and_still_plays(request, signer, tmp_path, kind):
    source = request.getfixturevalue(kind)
    assert inspect(source) == Manifest(found=False)
    path = signed(signer, source, tmp_path)
    assert inspect(path) == Manifest(found=True, valid=True, trusted=False, made_by_machine=True, signer="liveavatar local signer",
                                     problems=("signingCredential.untrusted",))  # fmt: skip
    assert pictures(path) == pictures(source) == 25 and (b"moof" in boxes(path.read_bytes())) == (kind == "fragmented")
    assert [f.name for f in tmp_path.iterdir()] == [source.name]


def boxes(data: bytes) -> dict[bytes, tuple[int, int]]:
    """First of each kind of top-level box: start and end of its content."""
    found, at = {}, 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.setdefault(data[at + 4 : at + 8], (at + 8, at + size))
        at += size
    return found


@pytest.mark.parametrize("kind, box", [("video", b"mdat"), ("video", b"moov"), ("fragmented", b"mdat"), ("fragmented", b"moof"), ("fragmented", b"moov")])
def test_one_changed_bit_anywhere_in_pictures_sound_or_index_shows(request, signer, tmp_path, kind, box):
    path = signed(signer, request.getfixturevalue(kind), tmp_path)
    data = path.read_bytes()
    start, end = boxes(data)[box]
    for at in np.linspace(start, end - 1, 9).astype(int):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert not inspect(path).valid, at


def test_a_changed_manifest_shows(signer, video, tmp_path):
    path = signed(signer, video, tmp_path)
    data = path.read_bytes()
    assert data.count(b"trainedAlgorithmicMedia") == 1
    path.write_bytes(data.replace(b"trainedAlgorithmicMedia", b"digitalCaptureNotMadeXX"))
    assert not inspect(path).valid and not inspect(path).made_by_machine
    path.write_bytes(data.replace(b"a talk", b"a walk"))
    assert not inspect(path).valid


def test_a_cut_off_end_shows(signer, video, tmp_path):
    path = signed(signer, video, tmp_path)
    path.write_bytes(path.read_bytes()[:-500])
    assert not inspect(path).valid


def test_what_cannot_be_signed_stays_as_it_was(signer, tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("no video")
    with pytest.raises(SigningError, match="text.mp4"):
        signer.sign(path)
    assert path.read_text() == "no video" and [f.name for f in tmp_path.iterdir()] == ["text.mp4"] and inspect(path) == Manifest(found=False)
    with pytest.raises(SigningError, match="none.mp4"):
        signer.sign(tmp_path / "none.mp4")


def test_the_local_identity_is_kept_private_and_renewed_before_its_end(tmp_path):
    Signer(tmp_path)
    chain, key = (tmp_path / CHAIN).read_bytes(), tmp_path / KEY
    assert key.stat().st_mode & 0o777 == 0o600 and Signer(tmp_path).local and (tmp_path / CHAIN).read_bytes() == chain
    (tmp_path / CHAIN).write_bytes(local_chain(NOW - datetime.timedelta(days=2 * 365 - 20))[0])
    Signer(tmp_path)
    assert (tmp_path / CHAIN).read_bytes() != chain


def test_openssl_accepts_the_chain(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    Signer(tmp_path)
    told = subprocess.run(["openssl", "verify", "-x509_strict", "-purpose", "smimesign", "-CAfile", tmp_path / "c2pa-authority.pem", tmp_path / CHAIN],
                          capture_output=True, text=True)  # fmt: skip
    assert told.returncode == 0, told.stderr


def test_an_operators_own_certificate(tmp_path, video):
    """A chain with a P-384 leaf under an authority of the operator's."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    root, leaf = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
    made = [_certificate(_name("Studio"), _name("Root"), leaf.public_key(), root, NOW, 1, usages),
            _certificate(_name("Root"), _name("Root"), root.public_key(), root, NOW, 1, None)]  # fmt: skip
    (tmp_path / "own.pem").write_bytes(b"".join(c.public_bytes(form.Encoding.PEM) for c in made))
    (tmp_path / "own.key").write_bytes(leaf.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    signer = Signer(tmp_path / "unused", tmp_path / "own.pem", tmp_path / "own.key")
    (tmp_path / "out").mkdir()
    manifest = inspect(signed(signer, video, tmp_path / "out"))
    assert manifest.valid and manifest.signer == "Studio" and not signer.local and not (tmp_path / "unused").exists()


@pytest.mark.parametrize("certificate, key", [("c.pem", None), ("none.pem", "none.key"), ("text", "text")])
def test_unusable_certificates_are_refused_at_once(tmp_path, certificate, key):
    (tmp_path / "text").write_text("text")
    with pytest.raises(ConfigError):
        Signer(tmp_path, tmp_path / certificate, key and tmp_path / key)
