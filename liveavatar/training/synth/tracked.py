"""Which vertex of the head is where the face tracker sees a landmark: of lips, corners of the eyes and bridge of the nose.

Made by `python bench/calibrate.py` from 24 people with five faces each: over them all a vertex is .013 to .038 eye distances from
its landmark, .022 on the mean. The tracker errs, and vertices lie where they lie.
"""

VERTICES = {  # landmark of the tracker: vertex of MPFB2's base.obj
    61: 407, 146: 503, 91: 477, 181: 484, 84: 486, 17: 492, 314: 7245, 405: 7239,
    321: 7200, 375: 10372, 291: 7128, 185: 408, 40: 410, 39: 5354, 37: 450, 0: 455,
    267: 7215, 269: 11956, 270: 7135, 409: 7123, 78: 498, 95: 519, 88: 519, 178: 518,
    87: 517, 14: 540, 317: 7279, 402: 7265, 318: 7266, 324: 7197, 308: 7172, 191: 448,
    80: 5361, 81: 506, 82: 462, 13: 509, 312: 7256, 311: 7254, 310: 7208, 415: 7173,
    33: 1303, 133: 1156, 362: 7822, 263: 7969, 168: 169, 6: 133, 197: 135, 195: 5063,
}  # fmt: skip
