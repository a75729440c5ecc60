import dataclasses

import numpy as np
import pytest

from preprocessing.figures import Figure, draw_figure, find_silhouette, pose_figure
from preprocessing.figures.body import Pose, PosedBody, sample_body, sample_pose
from preprocessing.figures.clothes import ChestPrint, Region, paint, sample_outfit
from preprocessing.figures.shapes import body_solids
from preprocessing.figures.solids import DOWN, FRONT, Part, Solid, cast_rays

NUM_PERSONS, NUM_IMAGES = 24, 6
R_SHOULDER, L_SHOULDER, R_HIP, L_HIP = 2, 5, 8, 11
FACE = [0, 14, 15, 16, 17]
GRID = np.linspace(-1, 1, 401)
MARKER = (1.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def figures() -> list[list[Figure]]:
    """Pictures of several persons."""
    return [
        [draw_figure(person, image, size=(64, 64), seed=0) for image in range(NUM_IMAGES)]
        for person in range(NUM_PERSONS)
    ]


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


def top_colour(figure: Figure) -> np.ndarray:
    return figure.image[figure.regions == Region.TOP].mean(axis=0) / 255


def upright(turn: float = 0.0, **changes: float) -> Pose:
    arm, leg = ((0.3, 0.0, 0.0, 0.0),) * 2, ((0.1, 0.0, 0.0),) * 2
    pose = Pose(turn=turn, lean=0.0, sway=0.0, twist=0.0, head=(0.0, 0.0, 0.0), arm=arm, leg=leg)
    return dataclasses.replace(pose, **changes)


def colours_of(pose: Pose, chest_print: ChestPrint | None = None) -> tuple[PosedBody, np.ndarray]:
    """One person, with a print of our choice, on a fine grid of 400 x 400 a body height."""
    generator = np.random.default_rng(5)
    outfit = dataclasses.replace(sample_outfit(generator), chest_print=chest_print)
    posed = PosedBody(sample_body(generator), pose)
    surface = cast_rays(body_solids(posed), GRID, GRID)
    return posed, paint(surface, posed.body, outfit)[0]


def is_marker(colours: np.ndarray) -> np.ndarray:
    return (colours[..., 1] == 0) & (colours[..., 0] > 0) & (colours[..., 2] > 0)


def test_a_figure_depends_on_nothing_drawn_before(figures):
    again = draw_figure(7, 3, size=(64, 64), seed=0)
    for field in dataclasses.fields(Figure):
        np.testing.assert_array_equal(
            getattr(again, field.name), getattr(figures[7][3], field.name)
        )
    assert not np.array_equal(draw_figure(7, 3, size=(64, 64), seed=1).image, figures[7][3].image)


def test_posing_alone_gives_the_keypoints_of_the_picture(figures):
    keypoints, view = pose_figure(7, 3, size=(64, 64), seed=0)
    np.testing.assert_array_equal(keypoints, figures[7][3].keypoints)
    assert view == figures[7][3].view


def test_sizes_of_one_shape_show_one_picture(figures):
    for image, small in enumerate(figures[2]):
        large = draw_figure(2, image, size=(256, 256), seed=0)
        np.testing.assert_allclose(large.keypoints[:, :2], 4 * small.keypoints[:, :2], rtol=1e-5)
        reduced = large.image.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        assert np.abs(reduced - small.image).mean() < 2


@pytest.mark.parametrize("size", [(128, 64), (256, 176), (512, 512)])
def test_other_shapes_are_filled(size):
    figure = draw_figure(0, 0, size=size, seed=0)
    assert figure.image.shape == (*size, 3)
    rows = np.flatnonzero(find_silhouette(figure.image).any(axis=1))
    assert rows[-1] - rows[0] > 0.5 * size[0]


def test_joints_and_bones_lie_on_the_figure(figures):
    bones = [(2, 3), (3, 4), (5, 6), (6, 7), (8, 9), (9, 10), (11, 12), (12, 13), (2, 5), (8, 11)]
    for figure in (figure for row in figures for figure in row):
        joints = figure.keypoints[1:14, :2]
        middles = [figure.keypoints[list(bone), :2].mean(axis=0) for bone in bones]
        for x, y in np.concatenate([joints, middles]):
            if not np.isnan(x):
                assert figure.regions[int(y), int(x)] != Region.BACKGROUND


def test_every_limb_is_drawn_round_its_bones():
    generator = np.random.default_rng(0)
    for _ in range(5):
        posed = PosedBody(sample_body(generator), sample_pose(generator))
        arms = [solid for solid in body_solids(posed) if solid.part == Part.ARM]
        rows, columns = np.nonzero(cast_rays(arms, GRID, GRID).part)
        points = np.stack([GRID[columns], GRID[rows]], axis=1)
        joints = posed.joints[:, :2]
        distances = []
        for start, end in ((2, 3), (3, 4), (5, 6), (6, 7)):
            bone = joints[end] - joints[start]
            along = np.clip((points - joints[start]) @ bone / (bone @ bone), 0, 1.55)
            distances.append(np.linalg.norm(points - joints[start] - along[:, None] * bone, axis=1))
        # Up to the thickest girth; hands reach half a forearm further.
        assert np.min(distances, axis=0).max() < 0.075


def test_missing_joints_are_outside_or_look_away(figures):
    keypoints = np.stack([figure.keypoints for row in figures for figure in row])
    found = keypoints[..., 2] == 1
    assert np.isnan(keypoints[~found][:, :2]).all()
    assert (keypoints[~found][:, 2] == 0).all()
    assert (keypoints[found][:, :2] >= 0).all()
    assert (keypoints[found][:, :2] < 64).all()
    missing = 1 - found.mean(axis=0)
    assert 0.05 < missing[[10, 13]].mean() < 0.4  # ankles, by close-ups
    assert found[:, [R_SHOULDER, L_SHOULDER, R_HIP, L_HIP]].all(axis=1).mean() > 0.95


def test_the_view_tells_left_from_right_and_shows_the_face_in_front_only(figures):
    views = set()
    for figure in (figure for row in figures for figure in row):
        views.add(figure.view)
        keypoints = figure.keypoints
        width = keypoints[L_SHOULDER, 0] - keypoints[R_SHOULDER, 0]
        if figure.view == "front":
            assert width > 0
            assert keypoints[FACE, 2].any()
        if figure.view == "back":
            assert width < 0
            assert not keypoints[[0, 14, 15], 2].all()
    assert views == {"front", "back", "side"}


def test_from_behind_all_points_of_the_face_are_missing():
    def found(turn: float) -> list[bool]:
        joints = PosedBody(sample_body(np.random.default_rng(0)), upright(turn)).joints
        return (~np.isnan(joints[FACE, 0])).tolist()

    assert found(0.0) == [True] * 5
    assert found(np.pi) == [False] * 5
    # Turned to the person's left, its right eye and ear face the viewer.
    assert found(np.pi / 2) == [True, True, False, True, False]


def test_appearance_is_the_person_and_not_the_picture(figures):
    colours = np.array([[top_colour(figure) for figure in row] for row in figures])
    within = colours.std(axis=1).mean()
    between = colours.mean(axis=1).std(axis=0).mean()
    assert within < 0.04
    assert between > 4 * within


def test_pose_tells_nothing_about_clothes():
    tops, joints = [], []
    for person in range(150):
        figure = draw_figure(person, 0, size=(32, 32), seed=1)
        tops.append(top_colour(figure))
        joints.append(figure.keypoints[[2, 3, 5, 6, 8, 11], :2].ravel())
    tops, joints = np.array(tops), np.array(joints)
    joints = np.where(np.isnan(joints), np.nanmean(joints, axis=0), joints)
    correlation = np.corrcoef(tops.T, joints.T)[:3, 3:]
    assert np.abs(correlation).max() < 0.35  # 36 chance values of deviation 0.08
    assert np.sqrt((correlation**2).mean()) < 0.13


def test_copying_the_source_fails(figures):
    overlaps = [
        overlap(find_silhouette(row[0].image), find_silhouette(figure.image))
        for row in figures
        for figure in row[1:]
    ]
    assert np.mean(overlaps) < 0.45


def test_every_joint_of_a_limb_moves(figures):
    keypoints = np.stack([figure.keypoints for row in figures for figure in row])[:, :, :2]
    relative = (keypoints - keypoints[:, 1:2])[:, [3, 4, 6, 7, 9, 10, 12, 13]]
    deviation = np.nanstd(relative, axis=0)  # of 64 pixels
    assert (deviation[:, 0] > 6).all()
    assert (deviation[:, 1] > 2.5).all()


def test_a_threshold_finds_the_silhouette(figures):
    overlaps = [
        overlap(find_silhouette(figure.image), figure.regions > 0)
        for row in figures
        for figure in row
    ]
    assert np.mean(overlaps) > 0.9
    assert np.min(overlaps) > 0.85


def test_colours_and_patterns_vary_over_their_whole_range():
    outfits = [sample_outfit(np.random.default_rng(seed)) for seed in range(300)]
    colours = np.array([outfit.top.colours[0] for outfit in outfits])
    assert len(np.unique(colours.round(6), axis=0)) == 300
    assert colours.min(axis=1).max() < 0.5  # far from the background
    strongest = colours.argmax(axis=1)
    assert np.bincount(strongest).min() > 60
    assert {outfit.top.kind for outfit in outfits} == {"plain", "stripes", "checks", "dots"}
    assert all(outfit.top.kind != outfit.bottom.kind for outfit in outfits)
    assert 0.3 < np.mean([outfit.chest_print is not None for outfit in outfits]) < 0.7


@pytest.mark.parametrize("shape", ["disk", "ring", "square", "diamond", "cross", "triangle"])
def test_a_print_is_on_the_front_only(shape):
    chest_print = ChestPrint(shape=shape, colour=MARKER, height=0.1, radius=0.06)
    assert is_marker(colours_of(upright(0.0), chest_print)[1]).sum() > 50
    assert not is_marker(colours_of(upright(np.pi), chest_print)[1]).any()


@pytest.mark.parametrize("changes", [{"turn": 0.5}, {"turn": -0.5}, {"lean": 0.5}, {"sway": 0.4}])
def test_a_print_moves_with_the_chest(changes):
    chest_print = ChestPrint(shape="disk", colour=MARKER, height=0.1, radius=0.05)
    posed, colours = colours_of(upright(**changes), chest_print)
    expected = posed.neck + 0.1 * posed.chest[DOWN] + 0.06 * posed.chest[FRONT]
    rows, columns = np.nonzero(is_marker(colours))
    assert abs(GRID[columns].mean() - expected[0]) < 0.015
    assert abs(GRID[rows].mean() - expected[1]) < 0.015


def test_a_sphere_is_seen_as_a_disk_with_its_own_coordinates():
    ball = Solid(part=Part.HEAD, centre=np.zeros(3), frame=np.eye(3), radii=(0.5, 0.5, 0.5))
    surface = cast_rays([ball], GRID, GRID)
    assert (surface.part > 0).sum() == pytest.approx(np.pi * 100**2, rel=0.01)
    x, y = np.meshgrid(GRID, GRID)
    seen = surface.part > 0
    np.testing.assert_allclose(surface.height[seen], y[seen], atol=1e-5)
    ring = np.sqrt(np.clip(0.25 - y**2, 0, None))[seen]
    np.testing.assert_allclose(np.sin(surface.angle[seen]) * ring, x[seen], atol=1e-4)


@pytest.mark.parametrize("tilt", [0.0, 0.6, 1.2])
def test_a_tube_foreshortens_and_keeps_its_heights(tilt):
    frame = np.eye(3)
    frame[DOWN] = 0, np.cos(tilt), np.sin(tilt)
    frame[FRONT] = 0, -np.sin(tilt), np.cos(tilt)
    tube = Solid(
        part=Part.LEG,
        centre=np.zeros(3),
        frame=frame,
        radii=(0.05, 0.8, 0.05),
        height=0.3,
        taper=0.5,
    )
    surface = cast_rays([tube], GRID, GRID)
    middle = surface.height[:, 200][surface.part[:, 200] > 0]
    assert middle.min() == pytest.approx(0.3, abs=0.02)
    assert middle.max() == pytest.approx(1.1, abs=0.02)
    assert len(middle) / 200 == pytest.approx(0.8 * np.cos(tilt), abs=0.06)
    # Half as wide at its end.
    widths = (surface.part > 0).sum(axis=1)[surface.part[:, 200] > 0]
    assert widths.max() == pytest.approx(20, abs=2)
    assert widths[-3] == pytest.approx(10, abs=3)


def test_the_nearer_solid_hides_the_other_whatever_their_order():
    near = Solid(part=Part.ARM, centre=np.array([0, 0, 1.0]), frame=np.eye(3), radii=(0.2,) * 3)
    far = Solid(part=Part.TORSO, centre=np.zeros(3), frame=np.eye(3), radii=(0.4,) * 3)
    first, second = cast_rays([near, far], GRID, GRID), cast_rays([far, near], GRID, GRID)
    np.testing.assert_array_equal(first.part, second.part)
    assert first.part[200, 200] == Part.ARM
    assert first.part[200, 260] == Part.TORSO
