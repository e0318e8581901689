"""The signed side-car of an HLS stream, and `verify` of one (serving.md 19.4): as a folder, at a URL, and of streams without any."""

import json
import shutil
import threading
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import av
import pytest
import typer
from test_watermark import KEY, PAYLOAD, clip, marked, through_h264
from typer.testing import CliRunner

from liveavatar.core import InputError, LiveAvatarError
from liveavatar.serving.fragments import KEPT, SIDECAR, SideCar, fetched, folder_reader, named
from liveavatar.serving.provenance_commands import TOKEN, verify
from liveavatar.serving.targets import FORMS, PLAYLIST

pytest.importorskip("c2pa", reason="signing needs liveavatar[serve]")

from liveavatar.serving.signing import AUTHORITY, Signer, unseal  # noqa: E402


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A server's folder."""
    folder = tmp_path_factory.mktemp("var")
    (folder / "watermark.key").write_bytes(KEY)
    return folder


@pytest.fixture(scope="module")
def signer(keys):
    return Signer(keys)


@pytest.fixture(scope="module")
def aired(tmp_path_factory, signer):
    """Three seconds of marked pictures as HLS, one fragment a second, with their side-car."""
    folder = tmp_path_factory.mktemp("web")
    options = {**FORMS["hls"].options, "hls_segment_filename": str(folder / "0-%d.m4s"), "hls_fmp4_init_filename": "0-init.mp4"}
    with av.open(str(folder / PLAYLIST), "w", format="hls", options=options) as out:
        stream = out.add_stream("libx264", rate=25, options={"g": "25", "bf": "0", "preset": "ultrafast"})
        stream.width = stream.height = 128
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 25)
        for n, picture in enumerate(marked(clip(128, 128)) * 3):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = n, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    sidecar = SideCar(folder, {"stream": "web"}, signer.seal)
    assert sidecar.look() and not sidecar.look()
    return folder


@pytest.fixture
def copy(aired, tmp_path):
    return shutil.copytree(aired, tmp_path / "copy")


@pytest.fixture
def run(keys):
    app = typer.Typer()
    app.command()(verify)
    return lambda *words, env=None: CliRunner().invoke(app, [*map(str, words), "--folder", str(keys)], env=env)


def judged(folder, keys):
    return fetched(folder_reader(folder), PLAYLIST, (keys / AUTHORITY).read_bytes()).manifest


def test_a_folder_is_read_mark_and_signature(run, copy, aired):
    told = run(copy)
    assert told.exit_code == 0, told.output
    mark, signature = told.output.splitlines()
    assert f"found, payload 0x{PAYLOAD:08x}" in mark and "75 pictures" in mark
    assert signature == "3 fragments: side-car: valid, says made by a machine, signed by liveavatar local signer, who is the folder's server"
    (copy / SIDECAR).unlink()
    assert run(copy / PLAYLIST).output.splitlines()[1] == "3 fragments: side-car: none"
    statement, _ = unseal((aired / SIDECAR).read_text())
    assert statement["stream"] == "web" and [f["name"] for f in statement["files"]] == ["0-init.mp4", "0-0.m4s", "0-1.m4s", "0-2.m4s"]


@pytest.mark.parametrize("name", ["0-init.mp4", "0-1.m4s"])
def test_one_changed_bit_shows(copy, keys, name):
    data = bytearray((copy / name).read_bytes())
    data[-9] ^= 1
    (copy / name).write_bytes(data)
    assert judged(copy, keys).problems == (f"{name}: changed",) and not judged(copy, keys).valid


def test_added_exchanged_and_missing_fragments_show(copy, keys):
    text = (copy / PLAYLIST).read_text()
    shutil.copy(copy / "0-2.m4s", copy / "0-3.m4s")
    (copy / PLAYLIST).write_text(text.replace("#EXT-X-ENDLIST", "#EXTINF:1.0,\n0-3.m4s\n#EXT-X-ENDLIST"))
    assert judged(copy, keys).problems == ("0-3.m4s: not in the side-car",)
    (copy / PLAYLIST).write_text(text.replace("0-0.m4s", "x").replace("0-1.m4s", "0-0.m4s").replace("x", "0-1.m4s"))
    assert judged(copy, keys).problems == ("order: changed",)
    (copy / PLAYLIST).write_text(text)
    (copy / "0-1.m4s").unlink()
    assert judged(copy, keys).problems == ("0-1.m4s: is not there",)


def test_what_was_not_signed_so_is_no_signature(copy, keys, tmp_path):
    head, body, signature = (copy / SIDECAR).read_text().split(".")
    stranger = Signer(tmp_path / "stranger")
    for token in (f"{head}.{body[:-8]}AAAAAAAA.{signature}", "no.such.token", f"{head}.{body}.", stranger.seal(b"{}"), stranger.seal(b"[1]")):
        (copy / SIDECAR).write_text(token)
        assert judged(copy, keys).found and not judged(copy, keys).valid
    (copy / SIDECAR).write_text(stranger.seal(json.dumps(unseal(f"{head}.{body}.{signature}")[0]).encode()))
    assert judged(copy, keys).valid and not judged(copy, keys).trusted  # whole, and by somebody else


def test_the_side_car_of_a_live_stream_follows(copy, keys, signer):
    """The newest fragment is in the playlist before the side-car names it; it speaks for no more than KEPT."""
    text = (copy / PLAYLIST).read_text().replace("#EXT-X-ENDLIST\n", "")
    sidecar = SideCar(copy, {}, signer.seal)
    for n in range(3, KEPT + 3):
        shutil.copy(copy / "0-2.m4s", copy / f"0-{n}.m4s")
        text += f"#EXTINF:1.0,\n0-{n}.m4s\n"
    (copy / PLAYLIST).write_text(text)
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        sidecar.look()

    stream = fetched(folder_reader(copy), PLAYLIST, (keys / AUTHORITY).read_bytes(), sleep)
    assert stream.manifest.valid and stream.checked == KEPT and len(pauses) == 1
    names = [file["name"] for file in unseal((copy / SIDECAR).read_text())[0]["files"]]
    assert len(names) == KEPT + 1 and names[:2] == ["0-init.mp4", "0-3.m4s"] and len(named(text)) == KEPT + 3


def test_names_that_leave_the_folder_are_not_followed(copy, keys):
    (copy / PLAYLIST).write_text((copy / PLAYLIST).read_text().replace("0-1.m4s", "../secret"))
    assert fetched(folder_reader(copy), PLAYLIST) is None


class Guarded(SimpleHTTPRequestHandler):
    """Files for who has the token; an mp4 for everybody; /slow/ gives nothing, /moved/ sends on."""

    def do_GET(self):
        if self.path.startswith("/slow/"):
            threading.Event().wait(3)
        elif self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", "/index.m3u8")
            self.end_headers()
        elif self.path.endswith(".mp4") and "init" not in self.path or self.headers["Authorization"] == "Bearer secret":
            super().do_GET()
        else:
            self.send_error(401)

    def log_message(self, *args):
        """Nothing."""


def test_urls(run, copy):
    """An HLS stream that is not public, and any other URL that FFmpeg reads, for a bounded time."""
    through_h264(marked(clip(128, 128)), 400_000, str(copy / "clip.mp4"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(copy)))
    server.daemon_threads, url = True, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        told = run(f"{url}/index.m3u8?owner=x", env={TOKEN: "secret"})
        assert told.exit_code == 0 and "3 fragments: side-car: valid" in told.output, told.output
        for words, env, said in ((["/index.m3u8"], {TOKEN: ""}, "status 401"), (["/moved/index.m3u8"], {TOKEN: "secret"}, "status 302"),
                                 (["/slow/key.flv", "--seconds", "1"], {}, "^127.0.0.1: not a video")):  # fmt: skip
            error = run(url + words[0], *words[1:], env=env).exception
            assert isinstance(error, LiveAvatarError)
            with pytest.raises(InputError, match=said):
                raise error
        told = run(f"{url}/clip.mp4", "--pictures", "25")
        assert told.exit_code == 0 and told.output.splitlines()[1] == "C2PA: a stream carries no manifest"
    finally:
        server.shutdown()
        server.server_close()
