"""GLSL of the talking head, and how an identity becomes its uniforms.

Everything is shaded in linear light in one fragment pass; colours arrive as linear RGB.  Rest
coordinates (the base mesh's dm) drive every procedural feature, so they stick to the skin.
"""

from __future__ import annotations

import numpy as np

from liveavatar.training.synth.people import Identity

VERTEX = """
#version 330
in vec3 in_point; in vec3 in_normal; in vec3 in_rest; in vec4 in_tag;
uniform float focal; uniform vec3 camera; uniform vec2 shift; uniform float has_curtain;
out vec3 point; out vec3 normal; out vec3 rest; out vec4 tag;
void main() {
    point = in_point; normal = in_normal; rest = in_rest; tag = in_tag;
    float w = camera.z - in_point.z;
    vec2 xy = vec2(in_point.x, in_point.y - camera.y) * focal + shift * w;
    // Depth 6..20 dm mapped by hand: perspective in x and y comes from w.
    float near = 6.0, far = 20.0;
    float z = (far + near) / (far - near) * w - 2.0 * far * near / (far - near);
    gl_Position = vec4(xy, z, w);
    // Identities without hanging hair: push the curtain out of the frustum.
    if (in_tag.x > 6.5 && has_curtain < 0.5) gl_Position = vec4(0.0, 0.0, 5.0, 1.0);
}
"""

_FRAGMENT = """
in vec3 point; in vec3 normal; in vec3 rest; in vec4 tag;
uniform vec3 camera;
uniform vec3 light_dir[3]; uniform vec3 light_rgb[3]; uniform vec3 ambient;
uniform vec3 skin_rgb, hair_rgb, lip_rgb, iris_rgb, shirt_rgb;
uniform float brow_amount, hair_kind, grain, blush;
out vec4 colour;

float hash(vec3 p) { p = fract(p * 0.3183099 + 0.1); p *= 17.0;
    return fract(p.x * p.y * p.z * (p.x + p.y + p.z)); }
float noise(vec3 x) { vec3 i = floor(x), f = fract(x); f = f * f * (3.0 - 2.0 * f);
    return mix(mix(mix(hash(i), hash(i + vec3(1,0,0)), f.x),
                   mix(hash(i + vec3(0,1,0)), hash(i + vec3(1,1,0)), f.x), f.y),
               mix(mix(hash(i + vec3(0,0,1)), hash(i + vec3(1,0,1)), f.x),
                   mix(hash(i + vec3(0,1,1)), hash(i + vec3(1,1,1)), f.x), f.y), f.z); }

vec3 lit(vec3 n, vec3 v, vec3 albedo, vec3 wrap, float rough, float f0, float occ) {
    vec3 sum = albedo * ambient * occ * mix(0.55, 1.0, n.y * 0.5 + 0.5);
    float a2 = rough * rough * rough * rough;
    for (int i = 0; i < 3; i++) {
        vec3 l = light_dir[i], h = normalize(l + v);
        float nl = dot(n, l), nh = max(dot(n, h), 0.0), nv = max(dot(n, v), 0.05);
        vec3 diffuse = clamp((vec3(nl) + wrap) / ((1.0 + wrap) * (1.0 + wrap)), 0.0, 1.0);
        float d = nh * nh * (a2 - 1.0) + 1.0;
        float fresnel = f0 + (1.0 - f0) * pow(1.0 - max(dot(h, v), 0.0), 5.0);
        float spec = a2 / (3.14159 * d * d) * fresnel / (4.0 * max(nv, 0.25)) * clamp(nl, 0.0, 1.0);
        sum += light_rgb[i] * mix(0.35, 1.0, occ) * occ * (albedo * diffuse * 0.62 + vec3(spec));
    }
    return sum;
}

vec3 hair_lit(vec3 n, vec3 v, vec3 along, vec3 base, float strand) {
    // Kajiya-style highlight along the strand direction.
    vec3 sum = base * ambient * mix(0.5, 1.0, n.y * 0.5 + 0.5);
    for (int i = 0; i < 3; i++) {
        vec3 l = light_dir[i], h = normalize(l + v);
        float nl = clamp((dot(n, l) + 0.25) / 1.25, 0.0, 1.0);
        float th = dot(along, h);
        float spec = pow(sqrt(max(1.0 - th * th, 0.0)), 40.0) * (0.3 + strand);
        sum += light_rgb[i] * nl * (base * 0.7 + (base * 0.8 + 0.045) * spec * strand);
    }
    return sum;
}

float brow(vec2 p) {
    // p.x = distance from the midline, p.y = height; arc from inner to outer end.
    float t = (p.x - 0.13) / 0.46;
    float mid = 7.515 + 0.06 * sin(clamp(t, 0.0, 1.0) * 2.4) - 0.04 * t * t;
    float half_w = 0.046 * mix(1.0, 0.28, smoothstep(0.35, 1.0, t));
    float inside = 1.0 - smoothstep(half_w * 0.45, half_w * 1.25, abs(p.y - mid));
    return inside * smoothstep(-0.06, 0.10, t) * (1.0 - smoothstep(0.9, 1.05, t));
}

void main() {
    int part = int(tag.x + 0.5);
    vec3 n = normalize(normal), v = normalize(camera - point);
    if (dot(n, v) < 0.0 && part != 0) n = -n;
    vec3 c;
    float ax = abs(rest.x);
#if PASS == 2
    if (part != 5) {
        float angle = atan(rest.x, rest.z - 0.25);
        vec3 q = part == 7 ? vec3(angle * 26.0, rest.y * 1.3, 3.0)
                           : vec3(rest.x * 20.0, rest.z * 3.0, rest.y * 3.0);
        float strand = 0.6 * noise(q) + 0.4 * noise(q * vec3(2.3, 1.0, 1.0) + 7.0);
        float edge = tag.w + (part == 6 ? 0.05 * (noise(vec3(rest.x * 40.0, rest.y * 6.0, rest.z * 9.0)) - 0.5) - 0.09 * hash(floor(rest * 220.0)) : 0.0);
        if (part == 6 && (edge < 0.0 || hair_kind < 0.5)) discard;
        if (part == 7 && rest.y < 5.45 + 0.25 * noise(vec3(angle * 14.0, 0.0, 1.0))) discard;
        vec3 base = hair_rgb * mix(0.62, 1.25, strand);
        base *= part == 6 ? mix(0.65, 1.0, smoothstep(0.0, 0.18, edge)) : mix(1.0, 0.72, smoothstep(7.2, 5.6, rest.y));
        vec3 along = part == 7 ? vec3(0.0, -1.0, 0.0) : vec3(0.0, -0.5, 0.85);
        along = normalize(along - n * dot(along, n));
        if (hair_kind < 1.5) base = mix(base, skin_rgb, 0.16);   // buzz cut: scalp shows through
        c = hair_lit(n, v, along, base, strand);
        if (part == 7 && dot(normal, v) < 0.0) c *= 0.35;
    } else {
        // Upper lashes only, thinned to hairs: the strips themselves would read as bars.
        if (rest.y < 7.276 || noise(vec3(ax * 210.0, rest.y * 9.0, 0.5)) < 0.56) discard;
        c = vec3(0.012, 0.010, 0.009) + 0.05 * hair_rgb;
    }
#elif PASS == 1
    vec3 base, wrap = vec3(0.4, 0.3, 0.25);
    float rough, f0, occ, catch_light = 0.0;
    if (part == 1) {
        vec3 d = normalize(rest - vec3(sign(rest.x) * 0.308, 7.284, 1.245));
        float r = acos(clamp(d.z, -1.0, 1.0));
        float a = atan(d.y, d.x);
        float streak = noise(vec3(a * 9.0, r * 6.0, 2.0));
        vec3 white = vec3(0.74, 0.70, 0.67) * mix(1.0, 0.86, smoothstep(0.5, 1.2, r));
        vec3 iris = iris_rgb * mix(0.75, 1.45, streak) * mix(1.25, 0.75, smoothstep(0.18, 0.46, r));
        iris *= mix(1.0, 0.35, smoothstep(0.40, 0.49, r));
        iris = mix(iris, vec3(0.004), 1.0 - smoothstep(0.17, 0.21, r));
        base = mix(iris, white, smoothstep(0.47, 0.53, r));
        // Upper lid shadows the ball.
        occ = mix(1.0, 0.45, smoothstep(7.30, 7.40, rest.y)); rough = 0.22; f0 = 0.03;
        // One steady catch light per eye, so that the gaze reads even at 128 pixels.
        vec3 h = normalize(light_dir[0] * vec3(0.55, 0.55, 1.0) + v);
        catch_light = 0.9 * smoothstep(0.990, 0.997, dot(n, h));
    } else if (part == 2 || part == 3) {
        float gum = part == 2 ? smoothstep(6.68, 6.70, rest.y) : smoothstep(6.58, 6.56, rest.y);
        float a = atan(rest.x, rest.z - 0.95);
        float slit = smoothstep(0.10, 0.0, abs(fract(a * 3.6) - 0.5));
        base = mix(vec3(0.80, 0.76, 0.68) * (1.0 - 0.18 * slit), vec3(0.42, 0.13, 0.13), gum);
        // Dark towards the mouth corners: a closed mouth must not show a white speck there.
        occ = mix(0.15, 0.95, smoothstep(1.10, 1.42, rest.z) * smoothstep(0.26, 0.15, ax))
            * (part == 3 ? 0.75 : 1.0);
        rough = 0.3; f0 = 0.04;
    } else {
        occ = mix(0.08, 0.62, smoothstep(1.0, 1.42, rest.z));
        base = vec3(0.36, 0.085, 0.08); rough = 0.6; f0 = 0.012;
    }
    c = lit(n, v, base, wrap, rough, f0, occ) + vec3(catch_light);
#else
    {
        float lip = smoothstep(0.25, 0.75, tag.y), inner = smoothstep(0.3, 0.8, tag.z);
        float mottle = noise(rest * 9.0 + grain) - 0.5;
        float fine = noise(rest * 42.0 + grain) - 0.5;
        vec3 base = skin_rgb * (1.0 + 0.10 * mottle + 0.08 * fine);
        // Blood nearer the surface on cheeks, nose tip and ears.
        float cheek = exp(-dot(vec2(ax - 0.55, rest.y - 6.85), vec2(ax - 0.55, rest.y - 6.85)) / 0.06);
        float nose = exp(-dot(vec2(ax, rest.y - 6.9), vec2(ax, rest.y - 6.9)) / 0.015);
        base *= mix(vec3(1.0), vec3(1.06, 0.86, 0.84), blush * clamp(cheek + 0.6 * nose, 0.0, 1.0));
        // Scalp shadow below the shell, so that thin hairlines do not show bare skin.
        if (hair_kind > 0.5) base = mix(base, hair_rgb, 0.75 * smoothstep(-0.06, 0.10, tag.w + 0.06 * mottle) * step(6.4, rest.y));
        float b = brow(vec2(ax, rest.y)) * step(1.0, rest.z);
        float strand = noise(vec3((ax * 0.8 + rest.y * 0.9) * 70.0, (rest.y - ax) * 12.0, 4.0));
        base = mix(base, hair_rgb * 0.55 + 0.01 * skin_rgb, clamp(b * brow_amount * mix(0.65, 1.0, strand), 0.0, 0.95));
        // Dark line on the lid margins stands in for lash roots.
        vec2 e = (vec2(ax, rest.y) - vec2(0.325, 7.275)) / vec2(0.20, 0.095);
        float rim = dot(e, e);
        float occ = mix(0.74, 1.0, smoothstep(0.9, 2.2, rim));
        base = mix(base, base * vec3(0.62, 0.50, 0.48), (1.0 - smoothstep(0.75, 1.25, rim)) * step(1.1, rest.z));
        base = mix(base, lip_rgb * (1.0 + 0.10 * fine), lip);
        float under = smoothstep(6.30, 5.95, rest.y) * smoothstep(1.25, 0.85, rest.z);
        occ *= mix(1.0, 0.55, under * smoothstep(5.2, 5.8, rest.y));
        float rough = mix(0.50, 0.34, lip), f0 = 0.028 * (1.0 - 0.9 * min(b, 1.0));
        vec3 wrap = mix(vec3(0.42, 0.22, 0.16), vec3(0.35, 0.2, 0.2), lip);
        // Shirt: crew neck, a curve in rest space.
        float collar = 5.86 - 0.16 * smoothstep(0.1, 0.8, rest.z);
        float shirt = 1.0 - smoothstep(collar - 0.01, collar + 0.01, rest.y);
        if (shirt > 0.5) {
            float weave = noise(rest * 60.0) - 0.5;
            float fold = smoothstep(0.10, 0.085, abs(rest.y - collar + 0.0));
            base = shirt_rgb * (1.0 + 0.16 * weave) * mix(1.0, 0.8, fold);
            rough = 0.8; wrap = vec3(0.15); occ = 1.0;
        } else occ *= mix(1.0, 0.7, smoothstep(collar + 0.12, collar, rest.y));
        if (inner > 0.5) {
            // Cavity: red near the lips, black deeper in.
            float depth = smoothstep(1.42, 1.05, rest.z);
            base = mix(vec3(0.20, 0.045, 0.045), vec3(0.02, 0.004, 0.004), depth);
            occ = mix(0.5, 0.1, depth); rough = 0.5;
        }
        // Lash roots: the rim of the upper lid, dark enough to read when the eye is shut.
        base = mix(base, vec3(0.015, 0.011, 0.010), 0.85 * smoothstep(0.80, 0.95, -tag.z));
        c = lit(n, v, base, wrap, rough, f0, occ);
    }
#endif
    c = c / (1.0 + 0.18 * c);  // soft shoulder instead of clipped highlights
    colour = vec4(pow(clamp(c, 0.0, 1.0), vec3(1.0 / 2.2)), 1.0);
}
"""

# One program per pass: llvmpipe runs both sides of a branch, so a shader that holds all parts
# would evaluate every light five times per pixel.  Only pass 2 may discard (it loses early z).
FRAGMENTS = tuple(f"#version 330\n#define PASS {k}\n{_FRAGMENT}" for k in range(3))
"""Fragment shaders: 0 skin and shirt, 1 eyes, teeth and tongue, 2 hair and lashes."""

BACKDROP_VERTEX = """
#version 330
in vec2 in_corner; out vec2 where;
void main() { where = in_corner; gl_Position = vec4(in_corner, 0.0, 1.0); }
"""

BACKDROP_FRAGMENT = """
#version 330
in vec2 where; uniform vec3 background_rgb; uniform vec2 background_tilt; out vec4 colour;
void main() {
    float grade = 1.0 + dot(where, background_tilt) - 0.10 * dot(where, where);
    colour = vec4(pow(clamp(background_rgb * grade, 0.0, 1.0), vec3(1.0 / 2.2)), 1.0);
}
"""


def linear(colour: tuple[float, float, float]) -> np.ndarray:
    """sRGB 0..1 [3] -> linear light float32 [3] (power 2.2, as the shader's output inverts)."""
    return np.asarray(colour, np.float32) ** np.float32(2.2)


def uniforms(identity: Identity) -> dict[str, object]:
    """All identity uniforms: float32 arrays or floats, ready for ``Raster.style``."""
    lights = np.asarray(identity.lights, np.float32)
    rng = np.random.default_rng([0x5A4E, identity.seed])
    return {
        "light_dir": np.ascontiguousarray(lights[:, :3]),
        "light_rgb": np.ascontiguousarray(lights[:, 3:]),
        "ambient": np.asarray(identity.ambient, np.float32),
        "skin_rgb": linear(identity.skin),
        "hair_rgb": linear(identity.hair),
        "lip_rgb": linear(identity.lips),
        "iris_rgb": linear(identity.iris),
        "shirt_rgb": linear(identity.shirt),
        "background_rgb": linear(identity.background),
        "background_tilt": rng.uniform(-0.12, 0.12, 2).astype(np.float32),
        "brow_amount": float(identity.brow),
        "hair_kind": {"bald": 0.0, "buzz": 1.0}.get(identity.style, 2.0),
        "grain": float(rng.uniform(0, 50)),
        "blush": float(rng.uniform(0.4, 1.0)),
    }
