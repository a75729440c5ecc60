"""Peaks by blocks against the same maps enlarged and smoothed as a whole."""

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from cfld.heatmap_peaks import find_peaks, sample_enlarged

STRIDE, SIGMA_PX, MIN_PEAK = 8, 3.0, 0.1


def enlarge(heatmap: np.ndarray) -> np.ndarray:
    height, width = heatmap.shape
    size = (STRIDE * width, STRIDE * height)
    return cv2.resize(heatmap, size, interpolation=cv2.INTER_LANCZOS4)


def peaks_of_whole(heatmap: np.ndarray) -> set[tuple[int, int]]:
    smooth = gaussian_filter(enlarge(heatmap).astype(np.float64), SIGMA_PX)
    padded = np.pad(smooth, 1)
    centre = padded[1:-1, 1:-1]
    is_peak = centre > MIN_PEAK
    for neighbour in (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]):
        is_peak &= centre > neighbour
    return set(zip(*(axis.tolist() for axis in is_peak.nonzero()), strict=True))


def find(maps: np.ndarray):
    return find_peaks(torch.from_numpy(maps), stride=STRIDE, sigma_px=SIGMA_PX, min_peak=MIN_PEAK)


@pytest.mark.parametrize("size", [(46, 34), (23, 40), (9, 8), (3, 20)])
def test_equals_the_whole_map_on_noise(size):
    maps = np.random.default_rng(0).uniform(-0.3, 1, (3, *size)).astype(np.float32)
    peaks = find(maps)
    for index, heatmap in enumerate(maps):
        of_map = peaks.which == index
        found = {tuple(pixel) for pixel in peaks.pixels[of_map].tolist()}
        assert found == peaks_of_whole(heatmap)
        rows, columns = peaks.pixels[of_map].numpy().T
        np.testing.assert_allclose(peaks.scores[of_map], enlarge(heatmap)[rows, columns], atol=1e-5)


def test_ordered_by_map_row_column():
    maps = np.random.default_rng(1).uniform(0, 1, (4, 20, 20)).astype(np.float32)
    peaks = find(maps)
    key = (peaks.which * 1000 + peaks.pixels[:, 0]) * 1000 + peaks.pixels[:, 1]
    assert (key.diff() > 0).all()


@pytest.mark.parametrize("centre", [(60.3, 80.7), (64.0, 91.5), (100.49, 40.9)])
def test_refined_to_a_tenth_of_a_pixel(centre):
    y, x = (STRIDE * np.arange(20) + (STRIDE - 1) / 2 for _ in range(2))
    squared = (y[:, None] - centre[0]) ** 2 + (x[None] - centre[1]) ** 2
    peaks = find(np.exp(-squared / (2 * 10**2)).astype(np.float32)[None])
    np.testing.assert_allclose(peaks.points, [centre[::-1]], atol=0.1)


@pytest.mark.parametrize("cell", [(0, 0), (0, 19), (14, 0), (14, 19), (0, 7)])
def test_peak_at_the_border_is_found_and_stays_inside(cell):
    heatmap = np.zeros((1, 15, 20), dtype=np.float32)
    heatmap[0][cell] = 1
    (point,) = find(heatmap).points.tolist()
    assert 0 <= point[0] <= 20 * STRIDE - 1
    assert 0 <= point[1] <= 15 * STRIDE - 1
    assert np.linalg.norm(np.array(point[::-1]) - STRIDE * np.array(cell) - 3.5) < STRIDE


def test_flat_maps_have_no_peaks():
    assert len(find(np.zeros((2, 10, 10), dtype=np.float32)).scores) == 0


def test_sampling_equals_the_enlarged_map():
    generator = np.random.default_rng(2)
    maps = generator.normal(size=(3, 12, 5)).astype(np.float32)
    which = generator.integers(3, size=200)
    pixels = generator.integers((12 * STRIDE, 5 * STRIDE), size=(200, 2))
    values = sample_enlarged(
        *(torch.from_numpy(array) for array in (maps, which, pixels)), stride=STRIDE
    )
    whole = np.stack([enlarge(heatmap) for heatmap in maps])
    np.testing.assert_allclose(values, whole[which, pixels[:, 0], pixels[:, 1]], atol=1e-5)
