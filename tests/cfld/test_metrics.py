"""Scores against scikit-image with the protocol's arguments, FID against independent formulas."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cfld import metrics
from cfld.evaluation.frechet import FeatureStatistics, FeatureStream, frechet_distance
from cfld.evaluation.metric_networks import load_metric_networks, network_sha256

GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}

# The protocol's calls (models/metrics.py of the authors' repository), on one image in float64.
REFERENCES = {
    "psnr": lambda x, y: peak_signal_noise_ratio(y, x, data_range=1),
    "ssim_paper": lambda x, y: structural_similarity(
        y, x, data_range=1, win_size=51, channel_axis=0
    ),
    "ssim_256": lambda x, y: structural_similarity(
        y * 255, x * 255, channel_axis=0, data_range=(x * 255).max() - (x * 255).min(), **GAUSSIAN
    ),
    "ssim": lambda x, y: structural_similarity(y, x, channel_axis=0, data_range=1, **GAUSSIAN),
}


def smooth_images(num_images: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((num_images, 3, 9, 7), generator=generator)
    images = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    noise = 0.05 * torch.randn(images.shape, generator=generator)
    return ((images + noise).clamp(0, 1) * 255).floor() / 255


@pytest.mark.parametrize("name", metrics.PAIR_METRICS)
@pytest.mark.parametrize("size", [(256, 176), (128, 64), (51, 51)])
@pytest.mark.parametrize("contrast", [1.0, 0.04])
def test_equals_scikit_image(name: str, size: tuple[int, int], contrast: float) -> None:
    generated = smooth_images(3, size, 0) * contrast + (1 - contrast) * 0.8
    target = 0.7 * generated + 0.3 * (smooth_images(3, size, 1) * contrast + (1 - contrast) * 0.8)
    expected = [
        REFERENCES[name](x, y)
        for x, y in zip(generated.double().numpy(), target.double().numpy(), strict=True)
    ]
    values = metrics.pair_metrics(generated, target, [name])
    assert values[name].numpy() == pytest.approx(expected, abs=1e-6)


def test_a_device_computes_what_the_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    generated, target = smooth_images(3, (96, 80), 0), smooth_images(3, (96, 80), 1)
    on_cpu = metrics.pair_metrics(generated, target)
    batched = metrics._scores(generated, target, metrics.PAIR_METRICS, metrics._ON_DEVICE)
    for name in metrics.PAIR_METRICS:
        assert batched[name].numpy() == pytest.approx(on_cpu[name].numpy(), abs=1e-6)


@pytest.mark.gpu
def test_cuda_equals_the_cpu() -> None:
    generated, target = smooth_images(3, (256, 176), 0), smooth_images(3, (256, 176), 1)
    on_cpu = metrics.pair_metrics(generated, target)
    on_cuda = metrics.pair_metrics(generated.cuda(), target.cuda())
    for name, values in on_cuda.items():
        assert values.cpu().numpy() == pytest.approx(on_cpu[name].numpy(), abs=1e-6)


def test_equal_images() -> None:
    images = smooth_images(2, (64, 64), 0)
    values = metrics.pair_metrics(images, images)
    assert values.pop("psnr").tolist() == [np.inf, np.inf]
    for each in values.values():
        assert each.tolist() == [1.0, 1.0]


def test_a_value_does_not_depend_on_the_rest_of_the_batch() -> None:
    generated, target = smooth_images(4, (64, 64), 0), smooth_images(4, (64, 64), 1)
    together = metrics.pair_metrics(generated, target)
    alone = metrics.pair_metrics(generated[2:3], target[2:3])
    assert all(alone[name][0] == together[name][2] for name in alone)


def test_ssim_256_of_a_single_colour_is_undefined() -> None:
    flat = torch.full((1, 3, 64, 64), 0.5)
    assert metrics.pair_metrics(flat, smooth_images(1, (64, 64), 0))["ssim_256"].isnan().all()


def test_smaller_than_the_window() -> None:
    images = torch.zeros(1, 3, 50, 64)
    with pytest.raises(ValueError, match=r"ssim_paper has a window of 51 pixels.* 50x64"):
        metrics.pair_metrics(images, images)
    with pytest.raises(ValueError, match="ssim has a window of 11"):
        metrics.pair_metrics(images[..., :10, :], images[..., :10, :], ["ssim"])


def test_unknown_metric() -> None:
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"unknown metric \['mse'\]"):
        metrics.pair_metrics(images, images, ["mse"])
    with pytest.raises(ValueError, match=r"unknown metric \['kid'\]"):
        load_metric_networks(["kid"])


def features(num_images: int, dim: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(dim, dim))
    return generator.normal(size=(num_images, dim)) @ mixing + generator.normal(size=dim)


def test_fid_equals_the_usual_formula() -> None:
    """The formula of the original FID code, with scipy's matrix square root."""
    first, second = features(300, 40, 0), features(200, 40, 1)
    covariances = [np.cov(each, rowvar=False) for each in (first, second)]
    delta = first.mean(0) - second.mean(0)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = delta @ delta + np.trace(covariances[0] + covariances[1] - 2 * root)
    result = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    assert result == pytest.approx(expected, rel=1e-6)


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics(count=11, mean=mean, scatter=covariance * 10)


def test_fid_of_known_gaussians() -> None:
    """For commuting covariances FID is |m1 - m2|² + sum (s1 - s2)², s the standard deviations."""
    rotation = np.linalg.qr(features(8, 8, 2))[0]
    deviations_1, deviations_2 = np.arange(1.0, 9.0), np.linspace(3.0, 0.0, 8)
    first = gaussian(np.zeros(8), rotation @ np.diag(deviations_1**2) @ rotation.T)
    second = gaussian(np.full(8, 0.5), rotation @ np.diag(deviations_2**2) @ rotation.T)
    expected = 8 * 0.25 + ((deviations_1 - deviations_2) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_images", [2, 5, 300])
def test_fid_of_equal_sets_is_zero_even_for_few_images(num_images: int) -> None:
    statistics = FeatureStatistics.of(features(num_images, 64, 3))
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-9)


def test_fid_of_few_images_equals_the_closed_form() -> None:
    """Two images span a line: then the root of the product has the one value s1 s2 |cos|."""
    first, second = features(2, 64, 4), features(2, 64, 5)
    spread_1, spread_2 = first[0] - first[1], second[0] - second[1]
    delta = first.mean(0) - second.mean(0)
    expected = delta @ delta + (spread_1 @ spread_1 + spread_2 @ spread_2) / 2
    expected -= abs(spread_1 @ spread_2)
    result = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    assert result == pytest.approx(expected, rel=1e-9)


def test_streamed_statistics_equal_those_of_all() -> None:
    values = features(1300, 12, 6) + 1e4
    stream = FeatureStream(12)
    for batch in np.array_split(values, 37):
        stream.add(batch)
    statistics = stream.statistics()
    assert statistics.count == 1300
    assert statistics.mean == pytest.approx(values.mean(0), rel=1e-12)
    assert statistics.covariance == pytest.approx(np.cov(values, rowvar=False), rel=1e-9)


def test_merged_parts_equal_the_whole() -> None:
    values = features(100, 6, 7)
    merged = FeatureStatistics.of(values[:30]).merge(FeatureStatistics.of(values[30:]))
    whole = FeatureStatistics.of(values)
    assert merged.count == whole.count
    assert merged.covariance == pytest.approx(whole.covariance, rel=1e-12)


def test_fid_of_one_image() -> None:
    one, two = FeatureStatistics.of(features(1, 4, 8)), FeatureStatistics.of(features(2, 4, 8))
    with pytest.raises(ValueError, match="at least 2 images on either side, here there is 1"):
        frechet_distance(one, two)


def test_networks_from_a_folder(metric_weights: Path) -> None:
    networks = load_metric_networks(weights_dir=metric_weights)
    assert networks.missing == {}
    assert networks.lpips is not None
    images = smooth_images(2, (128, 64), 0)
    assert networks.lpips(images, images).tolist() == [0.0, 0.0]
    assert (networks.lpips(images, 1 - images) > 0).all()
    for inception in networks.inceptions.values():
        computed = inception(images)
        assert computed.shape == (2, 2048)
        assert computed.std() > 1e-3
    hashes = {network_sha256(each) for each in networks.inceptions.values()}
    assert len(hashes) == 2


def test_paper_inception_equals_the_authors_order_of_layers(metric_weights: Path) -> None:
    """Its layers in a row, as the authors string them, after the affine map of raw pixels."""
    inception = load_metric_networks(["fid_paper"], metric_weights).inceptions["fid_paper"]
    net, images = inception.net, smooth_images(1, (128, 64), 0)
    layers = [
        net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3, torch.nn.MaxPool2d(3, 2),
        net.Conv2d_3b_1x1, net.Conv2d_4a_3x3, torch.nn.MaxPool2d(3, 2), net.Mixed_5b, net.Mixed_5c,
        net.Mixed_5d, net.Mixed_6a, net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e,
        net.Mixed_7a, net.Mixed_7b, net.Mixed_7c, torch.nn.AdaptiveAvgPool2d(1),
    ]  # fmt: skip
    x = torch.nn.functional.interpolate(images, (299, 299), mode="bilinear")
    affine = ((0.229, 0.485), (0.224, 0.456), (0.225, 0.406))
    x = torch.stack([x[:, i] * (s / 0.5) + (m - 0.5) / 0.5 for i, (s, m) in enumerate(affine)], 1)
    with torch.inference_mode():
        for layer in layers:
            x = layer(x)
    assert inception(images).numpy() == pytest.approx(x.flatten(1).numpy(), rel=1e-3, abs=1e-4)


def test_clean_inception_resizes_as_clean_fid(metric_weights: Path) -> None:
    """clean-fid resizes each channel with Pillow, bicubic, in floating point."""
    inception = load_metric_networks(["fid"], metric_weights).inceptions["fid"]
    seen = []
    inception.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = smooth_images(1, (128, 64), 0)
    inception(images)
    channels = [
        np.asarray(Image.fromarray(channel).resize((299, 299), Image.Resampling.BICUBIC))
        for channel in (images[0] * 255).numpy()
    ]
    assert seen[0][0].numpy() == pytest.approx((np.stack(channels) - 128) / 128, abs=1e-4)


def test_weights_that_cannot_be_had(
    tmp_path: Path, metric_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = load_metric_networks(weights_dir=tmp_path)
    assert networks.lpips is None
    assert networks.inceptions == {}
    assert "holds no alexnet-owt-7be5be79.pth" in networks.missing["lpips"]
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(b"half a file")
    damaged = load_metric_networks(["lpips"], tmp_path)
    assert "alexnet-owt-7be5be79.pth could not be loaded" in damaged.missing["lpips"]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr("torch.hub._hub_dir", None)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    offline = load_metric_networks(["fid"])
    assert "could not be downloaded" in offline.missing["fid"]
    assert "--metric-weights" in offline.missing["fid"]
