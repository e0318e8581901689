"""Loaders of the user's weights: random weights of the right shapes go through them, and the arithmetic is checked by hand."""

import hashlib
import json
import re
import weakref

import numpy as np
import pytest
import torch
from test_cli import error_of, run
from torch import nn

from liveavatar.conditioning.media import VideoWriter
from liveavatar.core import ConfigError, InputError, WeightsError
from liveavatar.evaluation import embeddings, judge, perceptual, s3fd, syncnet, weighted
from liveavatar.evaluation.backends import KNOWN, Backends, Given, examine, fingerprint

cv2 = pytest.importorskip("cv2", reason="the extra [eval]")


def given(path, **more) -> Given:
    return Given(path=str(path), sha256=fingerprint(path), **more)


def judged(frames, pcm, backends, points=None, **more):
    """weighted.judge on frames that are the whole video; points [T, 5, 2] of each."""
    sample = weighted.Sample()
    for k, (at, picture) in enumerate(frames):
        sample.see(at, picture, np.full((5, 2), np.nan) if points is None else points[k])
    return weighted.judge(frames, pcm, backends, sample, **more)


def saved(path, module: nn.Module) -> Given:
    torch.save(module.state_dict(), path)
    return given(path)


AUTHORS = "961e8696" + "0" * 52 + "5442"  # begins and ends as SyncNet's


def pictures(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


# ---------------------------------------------------------------- files


def test_nothing_given_is_not_measured_and_says_which_file():
    frames = [(k / 25, p) for k, p in enumerate(pictures(5))]
    found = {m.name: m for m in judged(frames, np.zeros(3200, np.float32), Backends())}
    assert set(found) == {"Sync-C", "Sync-D", "sync_offset", "LPIPS", "tLPIPS", "Dino-S", "Dino-S_worst", "Dino-S_own", "ArcFace", "ArcFace_worst",
                          "ArcFace_own", "ASE", "IQA"}
    assert all(m.status == "not_measured" and m.value is None for m in found.values())
    assert "syncnet_v2.model (backends.syncnet) and sfd_face.pth" in found["Sync-C"].reason and "onnx" in found["ArcFace"].reason
    both = {m.name: m for m in weighted.Distribution(Backends()).measures()}
    assert "inception" in both["FID"].reason and "i3d" in both["FVD"].reason and "real set" in both["FVD"].reason


def test_only_the_very_file_is_taken(tmp_path):
    path = tmp_path / "syncnet_v2.model"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="SHA-256 .* expects 00"):
        Backends({"syncnet": Given(path=str(path), sha256="00")}).path("syncnet")
    with pytest.raises(WeightsError, match="no such file.*published at"):
        Backends({"syncnet": Given(path=str(tmp_path / "absent"), sha256="00")}).path("syncnet")
    with pytest.raises(WeightsError, match="missing or of another shape: netcnnaud.0.weight.*unknown: a"):
        _ = Backends({"syncnet": given(path)}).syncnet
    path.write_bytes(b"junk")
    with pytest.raises(WeightsError, match="not a file of tensors"):
        _ = Backends({"syncnet": given(path)}).syncnet
    with pytest.raises(ConfigError, match=re.escape("backends.sincnet: unknown")):
        Backends({"sincnet": Given(path="x", sha256="00")})


def test_a_folder_is_known_by_its_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="no weights in this folder"):
        fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"one")
    assert fingerprint(tmp_path) == hashlib.sha256(b"one").hexdigest()
    (tmp_path / "more.bin").write_bytes(b"two")
    assert fingerprint(tmp_path) not in (hashlib.sha256(b"one").hexdigest(), hashlib.sha256(b"two").hexdigest())


def test_doctor_names_every_file_and_what_is_wrong(tmp_path):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "alex")
    found = {f.known.name: f for f in examine(Backends({
        "lpips_backbone": given(tmp_path / "alex"), "lpips_heads": given(tmp_path / "alex"), "i3d": Given(path=str(tmp_path / "none"), sha256="0"),
        "inception": Given(path=str(tmp_path / "alex"), sha256="0"), "arcface": given(tmp_path / "alex"),
    }))}  # fmt: skip
    assert set(found) == set(KNOWN) and all(f.known.licence and f.known.published for f in found.values())
    assert {name: f.state for name, f in found.items()} == {
        "syncnet": "not given", "s3fd": "not given", "lpips_backbone": "does not load", "lpips_heads": "does not load", "dinov2": "not given",
        "arcface": "does not load", "inception": "another file", "i3d": "absent", "qalign": "not given"}  # fmt: skip


# ---------------------------------------------------------------- SyncNet


def test_sync_c_and_d_by_hand():
    """Sound is 3 pictures late: row t of the lips lies 1 from row t + 3 of the sound, and far from every other."""
    rng, count, width = np.random.default_rng(0), 40, 16
    places = rng.normal(size=(count + 3, width)) * 100
    lips, audio = torch.tensor(places[3:]), torch.tensor(np.roll(places[3:], 3, axis=0))
    audio[:, 0] += 1
    found = syncnet.verdict(lips, audio)
    heard = {t: audio[t] for t in range(count)}  # silence is zero on either side
    distances = [np.mean([np.linalg.norm(lips[t] - heard.get(t + s, 0 * audio[0]) + 1e-6) for t in range(count)]) for s in range(-15, 16)]
    assert found.distance == pytest.approx(min(distances)) and found.confidence == pytest.approx(np.median(distances) - min(distances))
    assert found.offset_ms == 120 and syncnet.verdict(audio, lips).offset_ms == -120


def test_a_constant_offset_is_invisible_to_sync_c_and_printed_beside_it():
    rng = np.random.default_rng(1)
    lips = torch.tensor(rng.normal(size=(200, 8)))
    found = [syncnet.verdict(lips, torch.roll(lips, shift, 0)) for shift in (0, 5, -5)]
    assert [f.offset_ms for f in found] == [0, 200, -200]
    assert max(f.confidence for f in found) - min(f.confidence for f in found) < 0.25


def test_mfcc_is_that_of_the_published_pipeline():
    """Values of python_speech_features 0.6, which the authors use, for the same signal."""
    tone = np.round(32767 * 0.3 * np.sin(2 * np.pi * 220 * np.arange(8000) / 16000)) / 32768
    found = syncnet.mfcc(tone)
    assert found.shape == (13, 49)
    assert found[:5, 10].round(4).tolist() == [18.181, 21.7903, 12.5443, 6.604, 0.5591]
    assert found[:3, 48].round(4).tolist() == [17.936, 22.1096, 13.1117]


class Towers(nn.Module):
    """Stands in for the two towers where only what surrounds them is looked at: it takes milliseconds."""

    def lips(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((3, 4)).flatten(1)

    def audio(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, :, :15].mean(1)


def test_syncnet_takes_its_tensors(tmp_path):
    torch.manual_seed(0)
    net = Backends({"syncnet": saved(tmp_path / "syncnet_v2.model", syncnet.SyncNet())}).syncnet
    assert {"netcnnaud.0.weight", "netcnnlip.0.weight", "netfcaud.3.weight", "netfclip.3.weight"} <= set(net.state_dict())
    with torch.no_grad():
        assert net.lips(torch.zeros(1, 3, 5, 224, 224)).shape == net.audio(torch.zeros(1, 1, 13, 20)).shape == (1, 1024)


def test_windows_of_pictures_and_sound_go_together():
    faces, pcm = pictures(30, 224), np.random.default_rng(2).normal(size=19200).astype(np.float32) * 0.1
    found = syncnet.compare(Towers(), faces, pcm, batch=7)
    columns, bgr = torch.from_numpy(syncnet.mfcc(pcm)).float(), torch.from_numpy(faces[..., ::-1].copy()).float().mean((1, 2))
    lips = torch.stack([bgr[k : k + 5].T.flatten() for k in range(25)])
    audio = torch.stack([columns[:, 4 * k : 4 * k + 15].mean(0) for k in range(25)])
    expected = syncnet.verdict(lips, audio)
    assert found.pictures == 25 and found.distance == pytest.approx(expected.distance, rel=1e-5)
    assert found.confidence == pytest.approx(expected.confidence, abs=1e-3) and syncnet.compare(Towers(), faces[:20], pcm) is None


def test_the_crop_is_wider_below_and_grey_outside():
    picture = np.zeros((1, 100, 100, 3), np.uint8)
    picture[0, 40:60, 40:60] = 200
    boxes = np.repeat([[40.0, 40, 60, 60]], 1, axis=0)
    face = syncnet.crop_face(np.repeat(picture, 13, 0), np.repeat(boxes, 13, 0))[6]
    rows, columns = np.flatnonzero(face[:, 112, 0] > 100), np.flatnonzero(face[40, :, 0] > 100)
    assert rows[0] == 0 and rows[-1] == pytest.approx(160, abs=3)  # 20 of 28 pixels
    assert columns[0] == pytest.approx(32, abs=3) and columns[-1] == pytest.approx(192, abs=3)
    outside = syncnet.crop_face(np.zeros((13, 100, 100, 3), np.uint8), np.repeat([[-10.0, 0, 10, 20]], 13, 0))[6]
    assert (outside[100, 10] == syncnet.GREY).all() and (outside[100, 200] == 0).all()


# ---------------------------------------------------------------- S3FD


def test_boxes_of_s3fd_by_hand():
    """Only the coarsest level believes in faces; its one cell of a 128 pixel picture is centred and 512 wide before regression."""
    net = s3fd.S3FD().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        for k, head in enumerate(net.conf):
            head.bias[-1] = 10.0 if k == 5 else -10.0
        net.loc[5].bias.copy_(torch.tensor([1.0, 0.0, np.log(0.5) / 0.2, 0.0]))
    found = s3fd.detect(net, np.zeros((512, 512, 3), np.uint8))
    assert found == pytest.approx(4 * np.array([[64 + 51.2 - 128, 64 - 256, 64 + 51.2 + 128, 64 + 256]]))


def test_s3fd_takes_its_tensors(tmp_path):
    net = Backends({"s3fd": saved(tmp_path / "sfd_face.pth", s3fd.S3FD())}).s3fd
    names = set(net.state_dict())
    assert {"vgg.0.weight", "vgg.33.bias", "L2Norm3_3.weight", "extras.3.bias", "loc.5.weight", "conf.0.weight"} <= names and len(names) == 65


def test_suppression_and_tracks_by_hand():
    boxes = np.array([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]])
    assert s3fd.iou(boxes[0], boxes) == pytest.approx([1.0, 90 / 110, 0.0])
    assert s3fd.suppress(boxes, np.array([0.9, 0.95, 0.5]), 0.1).tolist() == [1, 2]
    walk = [np.array([[k, 0.0, k + 200, 200]]) if k not in (10, 11) else np.zeros((0, 4)) for k in range(40)]
    walk[5] = np.vstack([walk[5], [[500.0, 500, 520, 520]]])
    ((numbers, filled),), dropped = s3fd.tracks(walk)
    assert len(numbers) == 40 and dropped == 1 and filled[10] == pytest.approx([10, 0, 210, 200])
    assert s3fd.tracks([np.array([[0.0, 0, 200, 200]])] * 20) == ([], 1)


# ---------------------------------------------------------------- LPIPS


class Alex(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = perceptual.LPIPS().features
        self.classifier = nn.Linear(1, 1)


def lpips_files(tmp_path, value: float = 0.5) -> dict:
    torch.manual_seed(0)
    torch.save({f"lin{k}.model.1.weight": torch.full((1, n, 1, 1), value) for k, n in enumerate(perceptual.TAPS)}, tmp_path / "alex.pth")
    return {"lpips_backbone": saved(tmp_path / "alexnet.pth", Alex()), "lpips_heads": given(tmp_path / "alex.pth")}


def test_lpips_by_hand(tmp_path):
    """With all heads at h the distance is h * sum over taps of the mean of 2 - 2 cos of the activations."""
    net = Backends(lpips_files(tmp_path, 0.25)).lpips
    a, b = pictures(3, 64, 1), pictures(3, 64, 2)
    floats = [torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (a, b)]
    with torch.no_grad():
        expected = sum(0.25 * (2 - 2 * (one * two).sum(1)).mean((1, 2)) for one, two in zip(*(net.taps(x) for x in floats), strict=True))
    assert perceptual.lpips(net, a, b) == pytest.approx(expected.numpy(), abs=1e-5)
    assert perceptual.lpips(net, a, a) == pytest.approx(0) and [t.shape[-1] for t in net.taps(floats[0])] == [15, 7, 3, 3, 3]


def test_tlpips_is_zero_for_equal_change(tmp_path):
    net = Backends(lpips_files(tmp_path)).lpips
    a = pictures(5, 64, 1)
    still = np.repeat(a[:1], 5, 0)
    assert perceptual.tlpips(net, a, a) == pytest.approx(0)
    assert perceptual.tlpips(net, a, still) == pytest.approx(perceptual.lpips(net, a[1:], a[:-1]))


def test_lpips_needs_a_pair(tmp_path):
    backends, a = Backends(lpips_files(tmp_path)), pictures(4, 64, 1)
    frames = [(k / 25, p) for k, p in enumerate(a)]
    alone, pair = ({m.name: m for m in judged(frames, np.zeros(0, np.float32), backends, paired=p)} for p in (None, frames))
    assert alone["LPIPS (other weights)"].reason == "needs a reference video"
    other = pair["LPIPS (other weights)"]
    assert other.value == pytest.approx(0) and other.weights_sha256 == backends.sha256("lpips_backbone", "lpips_heads")


def test_lpips_pairs_pictures_by_their_times_and_refuses_other_sizes(tmp_path):
    """The reference begins 200 ms later in the file: by index every picture would meet another one."""
    backends, a = Backends(lpips_files(tmp_path)), pictures(10, 64, 1)
    frames = [(k / 25, p) for k, p in enumerate(a)]
    found = {m.name: m for m in judged(frames, np.zeros(0, np.float32), backends, paired=frames[5:], cut="first 30 s of 90")}
    assert found["LPIPS (other weights)"].value == pytest.approx(0) and found["LPIPS (other weights)"].n == 5
    assert found["LPIPS (other weights)"].reason == "first 30 s of 90"
    assert found["tLPIPS (other weights)"].n == 4 and found["tLPIPS (other weights)"].value == pytest.approx(0)
    small = [(at, p[:32]) for at, p in frames]
    other = {m.name: m for m in judged(frames, np.zeros(0, np.float32), backends, paired=small)}
    said = str(other["LPIPS (other weights)"])
    assert said.startswith("not measured") and "64x64 pixels, the reference video 64x32" in said


def test_a_file_that_is_seen_in_part_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "KEPT_SECONDS", 1.0)
    for name, side in (("a", 64), ("b", 48)):
        with VideoWriter(tmp_path / f"{name}.mp4", side, side) as writer:
            writer.write(pictures(75, side), np.zeros(0, np.float32))
    backends = Backends(lpips_files(tmp_path))
    found = {m.name: m for m in judge.judge_video(tmp_path / "a.mp4", reference=tmp_path / "a.mp4", backends=backends)}
    assert found["LPIPS (other weights)"].reason == "first 1 s of 3" and found["LPIPS (other weights)"].n == 25
    other = {m.name: m for m in judge.judge_video(tmp_path / "a.mp4", reference=tmp_path / "b.mp4", backends=backends)}
    assert "64x64 pixels, the reference video 48x48" in other["LPIPS (other weights)"].reason


def test_a_sample_is_of_the_whole_video_however_long():
    sample, short = weighted.Sample(), weighted.Sample()
    for k in range(25 * 1000):
        sample.see(3 + k / 25, k, None)
    times = [at for at, _ in sample.frames]
    assert len(times) <= weighted.MOST and np.diff(times) == pytest.approx(sample.every) and (times[0], times[-1]) == (3, pytest.approx(1003, abs=16))
    assert sample.remark == "one picture every 16 s" and len(sample.start) == 10
    for k in range(25 * 5):
        short.see(k / 25, k, None)
    assert [at for at, _ in short.frames] == [0, 1, 2, 3, 4] and not short.remark


# ---------------------------------------------------------------- vectors


def test_dinov2_through_transformers(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, patch_size=14, image_size=224))
    model.save_pretrained(tmp_path / "dino")
    backends = Backends({"dinov2": given(tmp_path / "dino")})
    one, two = pictures(2, 60)
    frames = [(0.0, one), (1.0, two), (1.04, two)]
    by_name = {m.name: m for m in judged(frames, np.zeros(0, np.float32), backends, portrait=one)}
    found = by_name["Dino-S"]
    assert by_name["Dino-S_own"].n == 2 and by_name["Dino-S_own"].value > 0.5, "to the mean of both"
    part = {m.name: m for m in judged(frames, np.zeros(0, np.float32), backends, portrait=one, own="a part")}
    assert part["Dino-S_own"].reason == "a part" and part["Dino-S"] == found
    a, b = embeddings.dino(backends.dinov2, [one, two])
    cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
    assert found.n == 2 and found.value == pytest.approx((1 + cosine) / 2, abs=1e-5) and "32" in found.backend
    (tmp_path / "dino" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="no DINOv2"):
        embeddings.load_dino(tmp_path / "dino")


def test_similarity_recovers_a_turn_a_scale_and_a_shift():
    angle, points = 0.3, np.random.default_rng(0).normal(size=(5, 2)) * 50
    turn = 1.7 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    assert embeddings.similarity(points, points @ turn.T + [5, -8]) == pytest.approx(np.column_stack([turn, [5, -8]]))


def onnx_mean_colour(path) -> None:
    """An ONNX model [1, 3, 112, 112] -> [1, 3]: the mean of each channel, written as the bytes of its protobuf."""
    def field(number: int, payload: bytes | str | int) -> bytes:
        if isinstance(payload, int):
            return bytes([number << 3, payload])
        data = payload.encode() if isinstance(payload, str) else payload
        return bytes([number << 3 | 2]) + (bytes([len(data)]) if len(data) < 128 else bytes([len(data) & 127 | 128, len(data) >> 7])) + data

    def value(name: str, sizes: list[int]) -> bytes:
        shape = b"".join(field(1, field(1, size)) for size in sizes)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, shape)))

    nodes = field(1, field(1, "x") + field(2, "m") + field(4, "GlobalAveragePool")) + field(1, field(1, "m") + field(2, "y") + field(4, "Flatten"))
    graph = nodes + field(2, "g") + field(11, value("x", [1, 3, 112, 112])) + field(12, value("y", [1, 3]))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13)))


def test_arcface_through_onnxruntime(tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra [eval]")
    onnx_mean_colour(tmp_path / "face.onnx")
    backends = Backends({"arcface": given(tmp_path / "face.onnx")})
    red, grey = np.zeros((2, 112, 112, 3), np.uint8)
    red[..., 0], grey[:] = 255, 191
    points = np.repeat(embeddings.ARCFACE_POINTS[None], 3, 0)
    vectors = embeddings.arcface(backends.arcface, np.stack([red, grey]), points[:2])
    assert vectors == pytest.approx(np.array([[1, -1, -1], [63.5 / 127.5] * 3]), abs=1e-5)
    points[2] = np.nan
    frames = [(0.0, red), (1.0, grey), (2.0, grey)]
    found = {m.name: m for m in judged(frames, np.zeros(0, np.float32), backends, portrait=red, portrait_points=points[0], points=points)}
    assert found["ArcFace"].value == pytest.approx((1 - 1 / 3) / 2, abs=1e-5) and found["ArcFace"].reason == "1 pictures without a face"
    with pytest.raises(WeightsError, match="no ONNX model"):
        (tmp_path / "bad.onnx").write_bytes(b"junk")
        embeddings.load_onnx(tmp_path / "bad.onnx")


# ---------------------------------------------------------------- distributions


class Images(nn.Module):
    def forward(self, x: torch.Tensor, return_features: bool) -> torch.Tensor:
        return x.float().mean((2, 3)).repeat(1, 4)[:, :5] if return_features else x.float()


class Clips(nn.Module):
    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return x.mean((3, 4))[:, 0] if rescale and resize and return_features else x


class Clip:
    """A video whose pictures are given; held: most of them alive at once."""

    def __init__(self, path, frames):
        self.path, self.held, self._frames = path, 0, frames
        self.height, self.width = frames.shape[1:3]

    def frames(self):
        alive = weakref.WeakSet()
        for k, frame in enumerate(self._frames):
            picture = frame.copy().view(Weak)
            alive.add(picture)
            self.held = max(self.held, len(alive))
            yield k / 25, picture
            del picture


class Weak(np.ndarray):
    """One that a set can hold weakly."""

    __hash__ = object.__hash__


def test_statistics_from_the_command_line(tmp_path):
    torch.jit.script(Images()).save(tmp_path / "inception.pt")
    said = given(tmp_path / "inception.pt")
    (tmp_path / "w.yaml").write_text(json.dumps({"backends": {"inception": {"path": said.path, "sha256": said.sha256}}}))
    (tmp_path / "real").mkdir()
    for k in range(2):
        with VideoWriter(tmp_path / f"real/{k}.mp4", 32, 32) as writer:
            writer.write(pictures(20, seed=k), np.zeros(0, np.float32))
    made = run("evaluate", "statistics", tmp_path / "real", "--out", tmp_path / "r.npz", "--config", tmp_path / "w.yaml", "--crop", "face")
    assert made.exit_code == 0 and f"SHA-256 {fingerprint(tmp_path / 'r.npz')}" in made.output
    found = weighted.Real(tmp_path / "r.npz", "face")
    assert found.resolution == "32x32" and len(found.features("inception", said.sha256)) == 40
    assert "inception-2015-12-05.pt (backends.inception) or" in error_of("evaluate", "statistics", tmp_path / "real", "--out", tmp_path / "r.npz")
    absent = error_of("evaluate", "statistics", tmp_path, "--out", tmp_path / "r.npz", "--config", tmp_path / "w.yaml")
    assert "no mp4 in it" in absent


def test_fid_and_fvd_through_torchscript(tmp_path):
    for name, module in (("inception", Images()), ("i3d", Clips())):
        torch.jit.script(module).save(tmp_path / f"{name}.pt")
    backends = Backends({name: given(tmp_path / f"{name}.pt") for name in ("inception", "i3d")})
    real, dark = ([Clip(tmp_path / "x.mp4", pictures(40, 8, seed) // by) for seed in (1, 2)] for by in (1, 2))
    hashes = {weighted.write_real(tmp_path / "real.npz", backends, real, crop="none") for _ in range(2)}
    assert hashes == {fingerprint(tmp_path / "real.npz")}
    same, other = (weighted.Distribution(backends, weighted.Real(tmp_path / "real.npz", "none")) for _ in range(2))
    for mine, theirs in zip(real, dark, strict=True):
        same.add(mine)
        other.add(theirs)
    fid, kid, fvd, kvd = same.measures()
    assert [m.name for m in (fid, kid, fvd, kvd)] == ["FID", "KID", "FVD", "KVD"]
    assert fid.value == pytest.approx(0, abs=1e-3) and fid.n == 80 and "small n: 80 of 2000" in fid.reason
    assert f"real set {hashes.pop()[:12]}, 8x8, crop none" in fid.reason
    assert fvd.value == pytest.approx(0, abs=1e-3) and fvd.n == 4 and all(m.value > 100 for m in other.measures()[::2])
    assert max(clip.held for clip in real) <= 2 * embeddings.CLIP < 40, "no video is held whole"
    with pytest.raises(InputError, match="pictures of 8x8, .* has 6x6"):
        same.add(Clip(tmp_path / "y.mp4", pictures(40, 6)))
    with pytest.raises(InputError, match="a set is of one size"):
        weighted.write_real(tmp_path / "two.npz", backends, [real[0], Clip(tmp_path / "y.mp4", pictures(40, 6))], crop="none")
    with pytest.raises(InputError, match="crop 'none', suite.crop says 'face'"):
        weighted.Real(tmp_path / "real.npz", "face")
    with pytest.raises(InputError, match="very weights"):
        weighted.Real(tmp_path / "real.npz", "none").features("inception", "0" * 64)
    with pytest.raises(WeightsError, match="no TorchScript"):
        (tmp_path / "bad.pt").write_bytes(b"junk")
        embeddings.load_script(tmp_path / "bad.pt")


QALIGN = '''
import torch
from transformers import PretrainedConfig, PreTrainedModel

class Config(PretrainedConfig):
    model_type = "tiny_qalign"

class Model(PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.post_init()
    def score(self, images, task_, input_):
        return torch.tensor([{"quality": 4.0, "aesthetics": 2.0}[task_] + i.getpixel((0, 0))[0] / 255 for i in images]) * self.weight
'''


def test_qalign_runs_its_own_code_only_when_allowed(tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "align"
    folder.mkdir()
    (folder / "modeling_tiny.py").write_text(QALIGN)
    places = {"AutoConfig": "modeling_tiny.Config", "AutoModelForCausalLM": "modeling_tiny.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny_qalign", "auto_map": places}))
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="run_code"):
        _ = Backends({"qalign": given(folder)}).qalign
    frames = [(0.0, np.full((8, 8, 3), 255, np.uint8)), (1.0, np.zeros((8, 8, 3), np.uint8))]
    found = {m.name: m for m in judged(frames, np.zeros(0, np.float32), Backends({"qalign": given(folder, run_code=True)}))}
    assert found["IQA"].value == pytest.approx(4.5) and found["ASE"].value == pytest.approx(2.5) and found["IQA"].n == 2


# ---------------------------------------------------------------- around the networks


def test_sync_c_through_tracks_and_crop(monkeypatch):
    """Random networks find no face and know no speech: boxes and towers are given, all between them is real."""
    backends = Backends({name: Given(path=name, sha256=AUTHORS) for name in ("syncnet", "s3fd")})
    backends.__dict__.update(syncnet=Towers(), s3fd=None)
    frames = [(k / 25, p) for k, p in enumerate(pictures(30, 160))]
    pcm = np.random.default_rng(2).normal(size=19200).astype(np.float32) * 0.1
    monkeypatch.setattr(s3fd, "detect", lambda net, picture: np.array([[20.0, 20, 140, 140]]))
    found = {m.name: m for m in judged(frames, pcm, backends)}
    assert found["Sync-C"].measured and found["Sync-D"].value > 0 and abs(found["sync_offset"].value) <= 600
    assert found["Sync-C"].weights_sha256 == backends.sha256("syncnet", "s3fd") and found["Sync-C"].n == 1
    monkeypatch.setattr(s3fd, "detect", lambda net, picture: np.zeros((0, 4)))
    lost = {m.name: m for m in judged(frames, pcm, backends)}
    assert lost["Sync-C"].status == "failed" and "no face" in lost["Sync-C"].reason
    mesh = Backends({"syncnet": backends.given["syncnet"]})
    mesh.__dict__.update(syncnet=Towers())
    other = {m.name: m for m in judged(frames, pcm, mesh, boxes=np.repeat([[20.0, 20, 140, 140]], 30, 0))}
    assert other["Sync-C"].status == "not_measured" and other["Sync-C (mesh crop)"].value == pytest.approx(found["Sync-C"].value)


def test_a_name_belongs_to_its_authors_weights(tmp_path):
    """SyncNet's published hash is known at both ends, AlexNet's at one; of others no hash is known."""
    for sha, own in ((AUTHORS, True), (AUTHORS.upper(), True), ("961e8696" + "0" * 56, False), ("0" * 60 + "5442", False)):
        backends = Backends({name: Given(path=name, sha256=sha) for name in ("syncnet", "s3fd")})
        assert backends.title("Sync-C", "syncnet", "s3fd") == ("Sync-C" if own else "Sync-C (other weights)")
    found = {f.known.name: f.note for f in examine(Backends(lpips_files(tmp_path)))}
    assert "authors' is 7be5be79" in found["lpips_backbone"] and "no hash that we know" in found["lpips_heads"]
    backends = Backends({name: Given(path=name, sha256="0" * 64) for name in ("syncnet", "s3fd")})
    backends.__dict__.update(syncnet=Towers(), s3fd=None)
    frames = [(k / 25, p) for k, p in enumerate(pictures(30, 160))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3fd, "detect", lambda net, picture: np.array([[20.0, 20, 140, 140]]))
        names = {m.name for m in judged(frames, np.ones(19200, np.float32), backends)}
    assert "Sync-C (other weights)" in names and not names & {"Sync-C", "Sync-D"}


def test_pictures_at_25_per_second_are_those_on_screen():
    assert weighted.at_rate(np.arange(50) / 25).tolist() == list(range(50))
    assert weighted.at_rate(np.arange(10) / 12.5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9]
    assert weighted.at_rate(np.arange(12) / 50).tolist() == [0, 2, 4, 6, 8, 10, 11]
