"""Bodies and poses of drawn figures: proportions, joint angles, and where they put every joint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from preprocessing.figures.solids import DOWN, FRONT, LEFT

HIDDEN_FACE_DEPTH = -0.1
"""A point of the face is missing where its direction to the viewer falls below this."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """Proportions of one person, in body heights; girths are factors."""

    torso: float
    shoulder: float
    hip: float
    upper_arm: float
    forearm: float
    thigh: float
    shin: float
    head: float
    girth: float
    waist: float


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Joint angles in radians; pairs are right, left. All zero: upright, facing the viewer."""

    turn: float
    lean: float
    sway: float
    twist: float
    head: tuple[float, float, float]
    """Turn to the person's left, nod, tilt."""
    arm: tuple[tuple[float, float, float, float], ...]
    """Per side: away from the body, forwards, about the upper arm's own axis, elbow."""
    leg: tuple[tuple[float, float, float], ...]
    """Per side: away from the other leg, forwards, knee."""


def sample_body(generator: np.random.Generator) -> Body:
    """Draw one person's proportions."""
    u = generator.uniform
    return Body(
        torso=u(0.265, 0.30),
        shoulder=u(0.09, 0.115),
        hip=u(0.050, 0.062),
        upper_arm=u(0.15, 0.17),
        forearm=u(0.125, 0.145),
        thigh=u(0.225, 0.26),
        shin=u(0.215, 0.25),
        head=u(0.072, 0.088),
        girth=u(0.9, 1.25),
        waist=u(0.78, 0.98),
    )


def sample_pose(generator: np.random.Generator) -> Pose:
    """Draw a pose: any side to the viewer, every limb bent independently of the others."""
    u = generator.uniform
    # Front and back are commoner than sides, as in fashion photos.
    facing = (0.0, np.pi, np.pi / 2, -np.pi / 2)[generator.choice(4, p=(0.45, 0.23, 0.16, 0.16))]
    return Pose(
        turn=facing + u(-0.6, 0.6),
        lean=generator.triangular(-0.15, 0.05, 0.6),
        sway=u(-0.25, 0.25),
        twist=u(-0.25, 0.25),
        head=(u(-0.6, 0.6), u(-0.3, 0.15), u(-0.2, 0.2)),
        arm=tuple(
            (generator.triangular(0.1, 0.4, 2.8), u(-0.5, 1.3), u(-1.2, 0.7), u(0.0, 2.1))
            for _ in range(2)
        ),
        leg=tuple(
            (generator.triangular(-0.02, 0.1, 0.6), u(-0.45, 0.9), u(0.0, 1.2)) for _ in range(2)
        ),
    )


def view_of(pose: Pose) -> str:
    """Name the side of the person that faces the viewer: front, back or side."""
    facing = np.cos(pose.turn)
    if abs(facing) < np.cos(0.8):
        return "side"
    return "front" if facing > 0 else "back"


@dataclass(frozen=True)
class PosedBody:
    """A body in a pose, in camera coordinates, in body heights, the middle of the hips at 0."""

    body: Body
    pose: Pose

    @cached_property
    def pelvis(self) -> Float[np.ndarray, "3 3"]:
        """Frame of the hips."""
        return _swing(FRONT, LEFT, self.pose.turn)

    @cached_property
    def chest(self) -> Float[np.ndarray, "3 3"]:
        """Frame of the torso."""
        pose = self.pose
        bend = _swing(DOWN, LEFT, pose.sway) @ _swing(FRONT, DOWN, pose.lean)
        return _swing(FRONT, LEFT, pose.twist) @ bend @ self.pelvis

    @cached_property
    def head(self) -> Float[np.ndarray, "3 3"]:
        """Frame of the head."""
        turn, nod, tilt = self.pose.head
        bend = _swing(DOWN, LEFT, tilt) @ _swing(FRONT, DOWN, nod)
        return _swing(FRONT, LEFT, turn) @ bend @ self.chest

    @cached_property
    def neck(self) -> Float[np.ndarray, " xyz"]:
        """The middle of the shoulders."""
        return -self.body.torso * self.chest[DOWN]

    @cached_property
    def skull(self) -> Float[np.ndarray, " xyz"]:
        """The middle of the head."""
        lift = 0.035 * self.chest[DOWN] + 1.02 * self.body.head * self.head[DOWN]
        return self.neck - lift

    @cached_property
    def limbs(self) -> dict[str, tuple[Float[np.ndarray, " xyz"], Float[np.ndarray, "3 3"]]]:
        """Start and frame of every limb's bone; the frame's second row points along it."""
        body, limbs = self.body, {}
        for side, sign in enumerate((-1, 1)):
            name = ("right", "left")[side]
            away, forwards, roll, elbow = self.pose.arm[side]
            upper = _swing(DOWN, LEFT, sign * away) @ self.chest
            upper = _swing(FRONT, LEFT, -sign * roll) @ _swing(DOWN, FRONT, forwards) @ upper
            shoulder = self.neck + sign * body.shoulder * self.chest[LEFT]
            elbow_at = shoulder + body.upper_arm * upper[DOWN]
            fore = _swing(DOWN, FRONT, elbow) @ upper
            limbs[f"{name}_upper_arm"] = (shoulder, upper)
            limbs[f"{name}_forearm"] = (elbow_at, fore)
            limbs[f"{name}_hand"] = (elbow_at + body.forearm * fore[DOWN], fore)

            away, forwards, knee = self.pose.leg[side]
            thigh = _swing(DOWN, FRONT, forwards) @ _swing(DOWN, LEFT, sign * away) @ self.pelvis
            hip = sign * body.hip * self.pelvis[LEFT]
            knee_at = hip + body.thigh * thigh[DOWN]
            shin = _swing(DOWN, FRONT, -knee) @ thigh
            limbs[f"{name}_thigh"] = (hip, thigh)
            limbs[f"{name}_shin"] = (knee_at, shin)
            limbs[f"{name}_foot"] = (knee_at + body.shin * shin[DOWN], shin)
        return limbs

    @cached_property
    def joints(self) -> Float[np.ndarray, "18 3"]:
        """The 18 joints in OpenPose's order; NaN for points of the face that look away."""
        chain = ("upper_arm", "forearm", "hand"), ("thigh", "shin", "foot")
        starts = [
            self.limbs[f"{side}_{bone}"][0]
            for bones in chain
            for side in ("right", "left")
            for bone in bones
        ]
        return np.stack([self._face(0.0, 0.2), self.neck, *starts, *self._eyes_and_ears()])

    def _eyes_and_ears(self) -> list[Float[np.ndarray, " xyz"]]:
        angles = (-EYE_ANGLE, EYE_ANGLE, -np.pi / 2, np.pi / 2)
        return [self._face(angle, EYE_HEIGHT) for angle in angles]

    def _face(self, angle: float, height: float) -> Float[np.ndarray, " xyz"]:
        """The point of the face at an angle from its middle, `height` head radii below it."""
        ring = np.sqrt(1 - height**2)
        unit = np.array([np.sin(angle) * ring, height, np.cos(angle) * ring])
        looks_away = self.head[FRONT][2] < -0.25  # the pose network finds no ears from behind
        if looks_away or (unit @ self.head)[2] < HIDDEN_FACE_DEPTH:
            return np.full(3, np.nan)
        return self.skull + (unit * head_radii(self.body)) @ self.head


EYE_ANGLE, EYE_HEIGHT, MOUTH_HEIGHT = 0.42, -0.08, 0.5
"""Where eyes and mouth are on the head; heights in head radii below its middle."""


def head_radii(body: Body) -> Float[np.ndarray, " xyz"]:
    """Half extents of the head: to the left, down, to the front."""
    return body.head * np.array([0.76, 1.0, 0.86])


def _swing(start: int, end: int, angle: float) -> Float[np.ndarray, "3 3"]:
    """Turn a frame's row `start` towards its row `end`."""
    turn = np.eye(3)
    turn[start, start] = turn[end, end] = np.cos(angle)
    turn[start, end], turn[end, start] = np.sin(angle), -np.sin(angle)
    return turn
