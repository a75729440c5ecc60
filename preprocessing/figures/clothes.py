"""Clothes, hair and skin of drawn figures: who wears what, and how a point of it looks."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Bool, Float, UInt8

from preprocessing.figures.body import EYE_ANGLE, EYE_HEIGHT, MOUTH_HEIGHT, Body
from preprocessing.figures.solids import Part, SurfaceBuffer

Colour = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""

BACKGROUND = 242
"""Grey level behind every figure."""

GIRTHS = {Part.TORSO: 0.5, Part.ARM: 0.2, Part.LEG: 0.28, Part.SKIRT: 0.6}
"""Length round a part in body heights, for patterns: whole periods close without a seam."""

TEXTURES = ("plain", "stripes", "checks", "dots")


class Region(IntEnum):
    """What a pixel shows."""

    BACKGROUND = 0
    TOP = 1
    BOTTOM = 2
    SKIN = 3
    HAIR = 4
    SHOES = 5


@dataclass(frozen=True, kw_only=True)
class Texture:
    """A pattern of two colours; `waves` are periods (round, down) per body height, and offsets."""

    kind: str
    colours: tuple[Colour, Colour]
    waves: tuple[tuple[float, float, float], tuple[float, float, float]]
    duty: float


@dataclass(frozen=True, kw_only=True)
class ChestPrint:
    """A figure on the chest; `height` and `radius` in body heights."""

    shape: str
    colour: Colour
    height: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Outfit:
    """All of a person's appearance but the proportions; lengths are shares of torso or limb."""

    top: Texture
    bottom: Texture
    chest_print: ChestPrint | None
    skin: Colour
    hair: Colour
    shoes: Colour
    hair_style: str
    hairline: float
    hem: float
    sleeve: float
    leg: float
    has_skirt: bool
    flare: float


def sample_outfit(generator: np.random.Generator) -> Outfit:
    """Draw one person's clothes, hair and skin; every colour comes from a continuous range."""
    u = generator.uniform
    kinds = generator.permutation(TEXTURES)
    top, bottom = (_sample_texture(generator, kind) for kind in kinds[:2])
    chest_print = _sample_print(generator, top.colours[0])
    has_skirt = bool(u() < 0.3)
    lightness = u()
    return Outfit(
        top=top,
        bottom=bottom,
        chest_print=chest_print if u() < 0.5 else None,
        skin=_skin_colour(lightness, u(-0.03, 0.03)),
        hair=_hair_colour(generator),
        shoes=colorsys.hsv_to_rgb(u(), u(0.0, 0.7), u(0.08, 0.5)),
        hair_style=str(generator.choice(["short", "long", "bun", "bob"])),
        hairline=u(-0.65, -0.35),
        hem=u(0.84, 1.12),
        sleeve=(u(0.0, 0.05), u(0.2, 0.6), u(0.85, 1.0))[generator.choice(3, p=(0.2, 0.4, 0.4))],
        leg=u(0.2, 0.6) if has_skirt else (u(0.2, 0.5), u(0.7, 1.0))[generator.choice(2)],
        has_skirt=has_skirt,
        flare=u(0.15, 0.75),
    )


def paint(
    surface: SurfaceBuffer, body: Body, outfit: Outfit
) -> tuple[Float[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]:
    """Give every point of the surface its colour, in [0, 1], and its region."""
    seen = surface.part > 0
    part, angle, height = surface.part[seen], surface.angle[seen], surface.height[seen]
    regions = _regions(part, angle, height, body, outfit)
    flat = np.zeros((len(Region), 3), np.float32)
    flat[[Region.SKIN, Region.HAIR, Region.SHOES]] = outfit.skin, outfit.hair, outfit.shoes
    colours = flat[regions]
    for region, texture in ((Region.TOP, outfit.top), (Region.BOTTOM, outfit.bottom)):
        mine = regions == region
        colours[mine] = _weave(texture, part[mine], angle[mine], height[mine])
    if outfit.chest_print:
        torso = np.flatnonzero((part == Part.TORSO) & (regions == Region.TOP))
        printed = _is_printed(outfit.chest_print, angle[torso], height[torso])
        colours[torso[printed]] = outfit.chest_print.colour
    face = np.flatnonzero((part == Part.HEAD) & (regions == Region.SKIN))
    _draw_face(colours, face, angle[face], height[face] / body.head)
    colours *= (0.8 + 0.22 * np.clip(surface.light[seen], 0, 1))[:, None]

    image = np.full((*seen.shape, 3), BACKGROUND / 255, np.float32)
    labels = np.zeros(seen.shape, np.uint8)
    image[seen], labels[seen] = np.clip(colours, 0, 1), regions
    return image, labels


def _regions(
    part: UInt8[np.ndarray, " points"],
    angle: Float[np.ndarray, " points"],
    height: Float[np.ndarray, " points"],
    body: Body,
    outfit: Outfit,
) -> UInt8[np.ndarray, " points"]:
    """Each part changes once down its height: at a hem, a cuff, the hairline."""
    arm, leg = body.upper_arm + body.forearm, body.thigh + body.shin
    sleeve = outfit.sleeve * arm
    table = {  # part: (above, below, height of the change)
        Part.TORSO: (Region.TOP, Region.BOTTOM, outfit.hem * body.torso),
        Part.NECK: (Region.SKIN, Region.SKIN, 0.0),
        Part.HEAD: (Region.HAIR, Region.SKIN, 0.0),
        Part.HAIR: (Region.HAIR, Region.HAIR, 0.0),
        Part.ARM: (Region.TOP, Region.SKIN, sleeve),
        Part.LEG: (Region.BOTTOM, Region.SKIN, body.torso + outfit.leg * leg),
        Part.SKIRT: (Region.BOTTOM, Region.BOTTOM, 0.0),
        Part.SHOE: (Region.SHOES, Region.SHOES, 0.0),
    }
    above, below = np.zeros((2, len(Part)), np.uint8)
    change = np.zeros(len(Part), np.float32)
    for key, (upper, lower, at) in table.items():
        above[key], below[key], change[key] = upper, lower, at
    limit = change[part]
    head = part == Part.HEAD
    # From the forehead down to the nape: hair covers the back of the head.
    front = np.cos(angle[head])
    limit[head] = body.head * (outfit.hairline + 1.1 * (1 - front) ** 1.5)
    regions = np.where(height < limit, above[part], below[part])
    # The top hangs over the hips, where the legs are wider than the torso.
    regions[(part == Part.LEG) & (height < change[Part.TORSO])] = Region.TOP
    return regions


def _weave(
    texture: Texture,
    part: UInt8[np.ndarray, " points"],
    angle: Float[np.ndarray, " points"],
    height: Float[np.ndarray, " points"],
) -> Float[np.ndarray, "points 3"]:
    """The texture's colour at points of the body."""
    first, second = (np.array(colour, np.float32) for colour in texture.colours)
    if texture.kind == "plain":
        return np.broadcast_to(first, (len(part), 3))
    phases = []
    for round_, down, offset in texture.waves:
        turns = np.zeros(len(Part), np.float32)
        for key, girth in GIRTHS.items():
            turns[key] = np.round(girth * round_)
        phase = turns[part] * angle / np.float32(2 * np.pi) + np.float32(down) * height
        phases.append((phase + np.float32(offset)) % 1)
    if texture.kind == "stripes":
        mix = phases[0] < texture.duty
    elif texture.kind == "checks":
        mix = ((phases[0] < texture.duty) * np.float32(0.5)) + (phases[1] < texture.duty) * 0.5
    else:
        mix = (phases[0] - 0.5) ** 2 + (phases[1] - 0.5) ** 2 < texture.duty**2 * 0.5
    return first + (second - first) * mix.astype(np.float32)[:, None]


def _is_printed(
    chest_print: ChestPrint,
    angle: Float[np.ndarray, " points"],
    height: Float[np.ndarray, " points"],
) -> Bool[np.ndarray, " points"]:
    """Where the print is; `x` and `y` are 1 at its edge."""
    is_front = np.abs(angle) < np.pi / 2
    x = np.sin(angle) * 0.088 / chest_print.radius
    y = (height - chest_print.height) / chest_print.radius
    shape = {
        "disk": x**2 + y**2 < 1,
        "ring": np.abs(x**2 + y**2 - 0.7) < 0.35,
        "square": np.maximum(np.abs(x), np.abs(y)) < 0.85,
        "diamond": np.abs(x) + np.abs(y) < 1.15,
        "cross": (np.minimum(np.abs(x), np.abs(y)) < 0.33) & (np.maximum(abs(x), abs(y)) < 1),
        "triangle": (np.abs(x) < (y + 0.9) * 0.55) & (y < 0.8),
    }[chest_print.shape]
    return is_front & shape


PRINTS = ("disk", "ring", "square", "diamond", "cross", "triangle")


def _draw_face(
    colours: Float[np.ndarray, "points 3"],
    face: np.ndarray,
    angle: Float[np.ndarray, " skin"],
    height: Float[np.ndarray, " skin"],
) -> None:
    """Darken eyes and redden the mouth; `height` is in head radii below the middle."""
    eye = (np.abs(angle) - EYE_ANGLE) ** 2 / 0.2**2 + (height - EYE_HEIGHT) ** 2 / 0.13**2 < 1
    mouth = angle**2 / 0.36**2 + (height - MOUTH_HEIGHT) ** 2 / 0.09**2 < 1
    colours[face[eye]] = 0.08, 0.07, 0.1
    colours[face[mouth]] = 0.55, 0.12, 0.15


def _sample_texture(generator: np.random.Generator, kind: str) -> Texture:
    u = generator.uniform
    first = _cloth_colour(generator)
    second = _second_colour(generator, first)
    # Periods in body heights: stripes of 3 to 6 pixels on a figure of 58 pixels.
    frequency, tilt = 1 / (u(0.085, 0.13) if kind == "dots" else u(0.11, 0.2)), u(0, np.pi)
    if kind == "checks":
        tilt = (0.0, np.pi / 4)[generator.choice(2)]
    round_, down = frequency * np.sin(tilt), frequency * np.cos(tilt)
    return Texture(
        kind=kind,
        colours=(first, second),
        waves=((round_, down, u()), (down, -round_, u())),
        duty=u(0.4, 0.6),
    )


def _sample_print(generator: np.random.Generator, shirt: Colour) -> ChestPrint:
    return ChestPrint(
        shape=str(generator.choice(PRINTS)),
        colour=_contrasting_colour(generator, shirt),
        height=generator.uniform(0.085, 0.12),
        radius=generator.uniform(0.045, 0.07),
    )


def _cloth_colour(generator: np.random.Generator) -> Colour:
    """Any hue; never so light that it could pass for the background."""
    while True:
        hue, saturation, value = generator.uniform((0, 0.1, 0.15), (1, 1, 0.95))
        colour = colorsys.hsv_to_rgb(hue, saturation, value)
        if min(colour) < 0.5:
            return colour


def _contrasting_colour(generator: np.random.Generator, other: Colour) -> Colour:
    """A cloth colour of a clearly, but not glaringly, other brightness."""
    while True:
        colour = _cloth_colour(generator)
        if 0.2 < abs(_luminance(colour) - _luminance(other)) < 0.45:
            return colour


def _second_colour(generator: np.random.Generator, first: Colour) -> Colour:
    """The other colour of a pattern, a shade of nearly the same hue: a garment has one colour."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*first)
    while True:
        shift, factor, value = generator.uniform((-0.05, 0.6, 0.15), (0.05, 1.4, 1.0))
        colour = colorsys.hsv_to_rgb((hue + shift) % 1, min(saturation * factor, 1), value)
        if 0.15 < abs(_luminance(colour) - _luminance(first)) < 0.3 and min(colour) < 0.6:
            return colour


def _luminance(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _skin_colour(lightness: float, warmth: float) -> Colour:
    dark, light = np.array([0.30, 0.19, 0.13]), np.array([0.93, 0.76, 0.64])
    red, green, blue = dark + (light - dark) * lightness + warmth * np.array([1, 0, -1])
    return (float(red), float(green), float(blue))


def _hair_colour(generator: np.random.Generator) -> Colour:
    """Black to blond, red or grey; now and then dyed."""
    hue, saturation, value = generator.uniform((0.02, 0.25, 0.06), (0.13, 0.8, 0.8))
    if generator.uniform() < 0.15:
        hue = generator.uniform()
    return colorsys.hsv_to_rgb(hue, saturation, value)
