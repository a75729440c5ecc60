import numpy as np
import pytest

from cfld.body_regions import REGIONS, RegionError, draw_regions
from cfld.pose import JOINT_NAMES
from preprocessing.figures import draw_figure
from preprocessing.figures.clothes import Region

SIZE = (96, 64)
FIGURES = [draw_figure(person, person % 8, size=SIZE, seed=1) for person in range(8)]


def without(keypoints, *joints):
    changed = keypoints.copy()
    changed[[JOINT_NAMES.index(joint) for joint in joints]] = (np.nan, np.nan, 0)
    return changed


@pytest.mark.parametrize(
    ("regions", "shown"),
    [(["torso", "arms"], Region.TOP), (["legs", "torso"], Region.BOTTOM), (["head"], Region.HAIR)],
)
def test_regions_cover_clothes_and_hair_of_drawn_persons_and_little_else(regions, shown):
    masks = [draw_regions(figure.keypoints, SIZE, SIZE, regions) for figure in FIGURES]
    covered = [
        mask[figure.regions == shown].mean()
        for mask, figure in zip(masks, FIGURES, strict=True)
        if (figure.regions == shown).any()
    ]
    assert np.mean(covered) > 0.8
    on_body = [
        (mask & (figure.regions != Region.BACKGROUND)).sum() / mask.sum()
        for mask, figure in zip(masks, FIGURES, strict=True)
    ]
    assert np.mean(on_body) > 0.5


def test_regions_together_are_their_union():
    keypoints = FIGURES[0].keypoints
    single = [draw_regions(keypoints, SIZE, SIZE, [region]) for region in REGIONS]
    np.testing.assert_array_equal(
        draw_regions(keypoints, SIZE, SIZE, REGIONS), np.any(single, axis=0)
    )


def test_a_mask_scales_with_the_person():
    keypoints = FIGURES[0].keypoints
    small = draw_regions(keypoints, SIZE, SIZE, ["torso"])
    large = draw_regions(keypoints, SIZE, (192, 128), ["torso"])
    twice = small.repeat(2, axis=0).repeat(2, axis=1)
    assert (large != twice).sum() < 0.15 * twice.sum()
    doubled = keypoints * np.float32([2, 2, 1])
    np.testing.assert_array_equal(draw_regions(doubled, (192, 128), (192, 128), ["torso"]), large)


def test_the_head_seen_from_behind_is_above_the_neck():
    keypoints = FIGURES[0].keypoints
    hidden = without(keypoints, "nose", "right_eye", "left_eye", "right_ear", "left_ear")
    front = draw_regions(keypoints, SIZE, SIZE, ["head"])
    behind = draw_regions(hidden, SIZE, SIZE, ["head"])
    assert (front & behind).sum() > 0.4 * (front | behind).sum()


def test_the_torso_goes_on_where_no_hips_are_seen():
    keypoints = FIGURES[0].keypoints
    whole = draw_regions(keypoints, SIZE, SIZE, ["torso"])
    cropped = draw_regions(without(keypoints, "right_hip", "left_hip"), SIZE, SIZE, ["torso"])
    assert (whole & cropped).sum() > 0.5 * (whole | cropped).sum()


def test_one_limb_is_enough():
    keypoints = without(FIGURES[0].keypoints, "left_shoulder", "left_elbow", "left_wrist")
    both = draw_regions(FIGURES[0].keypoints, SIZE, SIZE, ["arms"])
    one = draw_regions(keypoints, SIZE, SIZE, ["arms"])
    assert 0 < one.sum() < both.sum()


def test_what_cannot_be_drawn_is_an_error():
    keypoints = FIGURES[0].keypoints
    with pytest.raises(RegionError, match="'tail' is unknown; choose among head, torso, arms"):
        draw_regions(keypoints, SIZE, SIZE, ["head", "tail"])
    nothing = without(keypoints, *JOINT_NAMES)
    for region in REGIONS:
        with pytest.raises(RegionError, match=f"too few joints for the {region}; give a mask"):
            draw_regions(nothing, SIZE, SIZE, [region])
