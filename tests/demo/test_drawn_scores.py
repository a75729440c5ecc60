import numpy as np
import pytest
from skimage.metrics import structural_similarity

from demo.drawn_scores import score_pictures
from preprocessing.figures import draw_figure
from preprocessing.figures.clothes import BACKGROUND, Region

CLOTHES = (Region.TOP, Region.BOTTOM)


@pytest.fixture(scope="module")
def drawn():
    figures = [draw_figure(person, 0, size=(64, 64), seed=5) for person in range(4)]
    return np.stack([each.image for each in figures]), np.stack([each.regions for each in figures])


def test_the_target_itself_is_perfect(drawn):
    targets, regions = drawn
    scores = score_pictures(targets, targets, regions)
    np.testing.assert_array_equal(scores.clothes_error, 0)
    np.testing.assert_allclose(scores.ssim, 1)
    assert (scores.silhouette_iou > 0.9).all()  # light hair may pass for background


def test_only_the_colour_of_clothes_counts(drawn):
    targets, regions = drawn
    is_clothes = np.isin(regions, CLOTHES)
    shifted = np.where(is_clothes[..., None], targets ^ 0x20, targets)  # by 32, up or down
    np.testing.assert_allclose(
        score_pictures(shifted, targets, regions).clothes_error, 32 / 255, rtol=1e-12
    )
    elsewhere = np.where(is_clothes[..., None], targets, targets ^ 0x20)
    np.testing.assert_array_equal(score_pictures(elsewhere, targets, regions).clothes_error, 0)


def test_an_empty_picture_has_no_silhouette(drawn):
    targets, regions = drawn
    empty = np.full_like(targets, BACKGROUND)
    np.testing.assert_array_equal(score_pictures(empty, targets, regions).silhouette_iou, 0)


def test_half_a_figure_is_half_the_silhouette(drawn):
    targets, regions = drawn
    solid = np.where(regions[..., None] > 0, 60, BACKGROUND).astype(np.uint8).repeat(3, axis=3)
    left = solid.copy()
    left[:, :, 32:] = BACKGROUND
    scores = score_pictures(left, targets, regions)
    share = (regions > 0)[:, :, :32].sum(axis=(1, 2)) / (regions > 0).sum(axis=(1, 2))
    np.testing.assert_allclose(scores.silhouette_iou, share)


def test_ssim_is_the_usual_one(drawn):
    targets, regions = drawn
    scores = score_pictures(targets[::-1].copy(), targets, regions)
    expected = [
        structural_similarity(
            one, other, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
        for one, other in zip(targets[::-1], targets, strict=True)
    ]  # fmt: skip
    np.testing.assert_allclose(scores.ssim, expected, atol=1e-5)
