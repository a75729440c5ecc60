"""The surfaces of drawn figures: the solids of a posed body, its hair and its skirt."""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Float

from preprocessing.figures.body import PosedBody, head_radii
from preprocessing.figures.solids import DOWN, FRONT, LEFT, Part, Solid


def body_solids(posed: PosedBody) -> list[Solid]:
    """The body's surface. Legs' heights go on from the torso's, so that patterns do too."""
    return [*_torso_and_head(posed), *_arms(posed), *_legs(posed)]


def skirt_solids(posed: PosedBody, length: float, flare: float) -> list[Solid]:
    """A skirt hanging between the thighs."""
    girth = posed.body.girth
    thighs = [posed.limbs[f"{side}_thigh"][1][DOWN] for side in ("right", "left")]
    hang = np.mean([*thighs, posed.pelvis[DOWN]], axis=0)
    frame = _along(hang, posed.pelvis)
    radii = (max(0.1 * girth, posed.body.hip + 0.054 * girth), length + 0.035, 0.07 * girth)
    start = -0.035 * posed.pelvis[DOWN]
    height = posed.body.torso - 0.035
    return [
        Solid(
            part=Part.SKIRT, centre=start, frame=frame, radii=radii, height=height, taper=1 + flare
        )
    ]


def hair_solids(posed: PosedBody, style: str) -> list[Solid]:
    """Hair that stands off the head: none for `short`."""
    if style == "short":
        return []
    size, head = posed.body.head, posed.head
    down, back, radii = {
        "long": (0.75, 0.42, (0.86, 1.5, 0.52)),
        "bun": (-1.0, 0.45, (0.45, 0.42, 0.45)),
        "bob": (0.1, 0.3, (0.98, 0.98, 0.78)),
    }[style]
    centre = posed.skull + size * (down * head[DOWN] - back * head[FRONT])
    scaled = (size * radii[0], size * radii[1], size * radii[2])
    return [Solid(part=Part.HAIR, centre=centre, frame=head, radii=scaled)]


def _torso_and_head(posed: PosedBody) -> list[Solid]:
    body, chest, head, neck = posed.body, posed.chest, posed.head, posed.neck
    girth, torso = body.girth, body.torso
    width = 0.9 * body.shoulder * (0.6 + 0.4 * girth)
    waist = 0.094 * girth * body.waist
    # Half widths down the torso; its depth is a fixed share of them.
    levels = ((0.0, width), (0.32, 1.02 * width), (0.7, waist), (1.0, 0.094 * girth))
    solids = []
    for (top, wide), (bottom, next_wide) in itertools.pairwise(levels):
        solids.append(
            Solid(
                part=Part.TORSO,
                centre=neck + top * torso * chest[DOWN],
                frame=chest,
                radii=(wide, (bottom - top) * torso, 0.64 * wide),
                height=top * torso,
                taper=next_wide / wide,
            )
        )
    skull = head_radii(body)
    solids += [
        Solid(part=Part.TORSO, centre=neck, frame=chest, radii=(width, 0.03, 0.64 * width)),
        Solid(
            part=Part.TORSO,
            centre=np.zeros(3),
            frame=posed.pelvis,
            radii=(0.094 * girth, 0.06, 0.06 * girth),
            height=torso,
        ),
        Solid(
            part=Part.NECK,
            centre=posed.skull,
            frame=_along(neck - posed.skull, chest),
            radii=(0.42 * body.head, float(np.linalg.norm(neck - posed.skull)), 0.42 * body.head),
            taper=1.1,
        ),
        Solid(
            part=Part.HEAD,
            centre=posed.skull,
            frame=head,
            radii=(float(skull[0]), float(skull[1]), float(skull[2])),
        ),
        Solid(  # the nose
            part=Part.NECK,
            centre=posed.skull + body.head * (0.22 * head[DOWN] + 0.84 * head[FRONT]),
            frame=head,
            radii=(0.11 * body.head, 0.19 * body.head, 0.2 * body.head),
        ),
    ]
    return solids


def _arms(posed: PosedBody) -> list[Solid]:
    body, girth = posed.body, posed.body.girth
    solids = []
    for side in ("right", "left"):
        solids += _limb(
            Part.ARM,
            [posed.limbs[f"{side}_{bone}"] for bone in ("upper_arm", "forearm")],
            lengths=(body.upper_arm, body.forearm),
            widths=(0.04 * girth, 0.033 * girth, 0.026 * girth),
            height=0.0,
        )
        wrist, frame = posed.limbs[f"{side}_hand"]
        solids.append(
            Solid(
                part=Part.ARM,
                centre=wrist + 0.028 * frame[DOWN],
                frame=frame,
                radii=(0.024, 0.044, 0.03),
                height=body.upper_arm + body.forearm + 0.04,
            )
        )
    return solids


def _legs(posed: PosedBody) -> list[Solid]:
    body, girth = posed.body, posed.body.girth
    solids = []
    for side in ("right", "left"):
        solids += _limb(
            Part.LEG,
            [posed.limbs[f"{side}_{bone}"] for bone in ("thigh", "shin")],
            lengths=(body.thigh, body.shin),
            widths=(0.06 * girth, 0.046 * girth, 0.032 * girth),
            height=body.torso,
        )
        ankle, frame = posed.limbs[f"{side}_foot"]
        solids.append(
            Solid(
                part=Part.SHOE,
                centre=ankle + 0.016 * frame[DOWN] + 0.03 * frame[FRONT],
                frame=frame,
                radii=(0.036, 0.034, 0.068),
            )
        )
    return solids


def _limb(
    part: Part,
    bones: list[tuple[Float[np.ndarray, " xyz"], Float[np.ndarray, "3 3"]]],
    *,
    lengths: tuple[float, float],
    widths: tuple[float, float, float],
    height: float,
) -> list[Solid]:
    """Two tapered tubes with balls at their starts and at the far end."""
    solids = []
    for (start, frame), length, width, next_width in zip(
        bones, lengths, widths[:-1], widths[1:], strict=True
    ):
        ball, tube = (width,) * 3, (width, length, width)
        taper = next_width / width
        solids += [
            Solid(part=part, centre=start, frame=frame, radii=ball, height=height),
            Solid(part=part, centre=start, frame=frame, radii=tube, height=height, taper=taper),
        ]
        height += length
        end = start + length * frame[DOWN]
    solids.append(Solid(part=part, centre=end, frame=frame, radii=(next_width,) * 3, height=height))
    return solids


def _along(
    direction: Float[np.ndarray, " xyz"], frame: Float[np.ndarray, "3 3"]
) -> Float[np.ndarray, "3 3"]:
    """A frame whose second row is `direction`, turned as little as possible out of `frame`."""
    down = direction / np.linalg.norm(direction)
    left = frame[LEFT] - (frame[LEFT] @ down) * down
    left /= np.linalg.norm(left)
    front = frame[FRONT] - (frame[FRONT] @ down) * down - (frame[FRONT] @ left) * left
    return np.stack([left, down, front / np.linalg.norm(front)])
