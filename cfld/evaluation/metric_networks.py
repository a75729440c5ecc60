"""The networks behind LPIPS and the two FIDs, and where their published weights come from."""

from __future__ import annotations

import hashlib
import pickle
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pytorch_fid.inception import FID_WEIGHTS_URL
from pytorch_fid.inception import InceptionV3 as FidInception
from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from torchvision.models import AlexNet_Weights, Inception_V3_Weights, inception_v3

Images = Float[Tensor, "batch 3 height width"]
Features = Float[Tensor, "batch 2048"]

NETWORK_METRICS = ("lpips", "fid_paper", "fid")
FEATURE_DIM = 2048

# The URLs from which the libraries fetch; a local folder holds files of the same names.
WEIGHTS_URLS = {
    "lpips": AlexNet_Weights.IMAGENET1K_V1.url,
    "fid_paper": Inception_V3_Weights.IMAGENET1K_V1.url,
    "fid": FID_WEIGHTS_URL,
}

_INCEPTION_SIZE = (299, 299)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Lpips(nn.Module):
    """LPIPS with AlexNet (torchmetrics), of images in [0, 1]; 0 for equal images."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = LearnedPerceptualImagePatchSimilarity("alex", normalize=True)

    @torch.inference_mode()
    def forward(self, generated: Images, target: Images) -> Float[Tensor, " batch"]:
        """Return the distance of each pair."""
        distances: Tensor = self.metric.net(generated, target, normalize=True)
        return distances.flatten()


class PaperInception(nn.Module):
    """The paper's FID features: torchvision's ImageNet Inception-v3, pooled, of images in [0, 1].

    The affine map from ImageNet-normalised pixels to [-1, 1] is applied to pixels that never were
    normalised. This came down from earlier work; we repeat it, as the paper's figures rest on it.
    They are not comparable with those of the usual FID.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = inception_v3(weights=Inception_V3_Weights.IMAGENET1K_V1)
        self.net.transform_input = False
        self.net.fc = nn.Identity()
        shape = (1, 3, 1, 1)
        self.register_buffer("scale", torch.tensor(_IMAGENET_STD).view(shape) / 0.5)
        self.register_buffer("shift", (torch.tensor(_IMAGENET_MEAN).view(shape) - 0.5) / 0.5)

    @torch.inference_mode()
    def forward(self, images: Images) -> Features:
        """Return the features of a batch."""
        images = F.interpolate(images, _INCEPTION_SIZE, mode="bilinear")
        features: Tensor = self.net(images * self.scale + self.shift)
        return features


class CleanInception(nn.Module):
    """The usual FID's features: the Inception of 2015 as ported by pytorch-fid, clean-fid's resize.

    Images in [0, 1] are resized with antialiased bicubic interpolation to 299x299 without rounding
    and brought to (255 x - 128) / 128, as clean-fid does in its mode "clean".
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = FidInception(resize_input=False, normalize_input=False)

    @torch.inference_mode()
    def forward(self, images: Images) -> Features:
        """Return the features of a batch."""
        images = F.interpolate(images, _INCEPTION_SIZE, mode="bicubic", antialias=True)
        features: Tensor = self.net((images * 255 - 128) / 128)[0]
        return features.flatten(1)


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "lpips": Lpips,
    "fid_paper": PaperInception,
    "fid": CleanInception,
}


@dataclass(frozen=True, kw_only=True)
class MetricNetworks:
    """The networks that could be loaded, by metric, and why the others could not."""

    lpips: Lpips | None
    inceptions: dict[str, nn.Module]
    missing: dict[str, str]
    device: torch.device


def load_metric_networks(
    names: Collection[str] = NETWORK_METRICS,
    weights_dir: Path | None = None,
    device: torch.device | str = "cpu",
) -> MetricNetworks:
    """Load the networks of `names`; one whose weights can't be had lands in `missing` with why.

    Weights are read from `weights_dir`, which holds the published files under their own names, or
    without it found or downloaded by torch's hub.

    Raises:
        ValueError: If a name is unknown.
    """
    if unknown := sorted(set(names).difference(NETWORK_METRICS)):
        raise ValueError(f"unknown metric {unknown}; there are {list(NETWORK_METRICS)}")
    device = torch.device(device)
    loaded: dict[str, nn.Module] = {}
    missing = {}
    for name in NETWORK_METRICS:
        if name not in names:
            continue
        file = WEIGHTS_URLS[name].rpartition("/")[2]
        if weights_dir is not None and not (weights_dir / file).is_file():
            missing[name] = f"{weights_dir} holds no {file}"
            continue
        try:
            with _hub_folder(weights_dir):
                loaded[name] = _BUILDERS[name]().eval().requires_grad_(False).to(device)
        except OSError as error:  # urllib's errors are OSErrors
            missing[name] = (
                f"{file} could not be downloaded ({error}); put it into a folder and name that "
                "with --metric-weights"
            )
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:  # damaged, or another's
            missing[name] = f"{file} could not be loaded: {str(error).splitlines()[0]}"
    lpips = loaded.pop("lpips", None)
    assert lpips is None or isinstance(lpips, Lpips)
    return MetricNetworks(lpips=lpips, inceptions=loaded, missing=missing, device=device)


def network_sha256(network: nn.Module) -> str:
    """Return a hash of a network's parameters and buffers, to key what was computed with it."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _hub_folder(weights_dir: Path | None) -> Iterator[None]:
    """Let the libraries' own loading, all through torch's hub, find its files in a folder."""
    if weights_dir is None:
        yield
        return
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as hub:
        (Path(hub) / "checkpoints").symlink_to(weights_dir.resolve(), target_is_directory=True)
        torch.hub.set_dir(hub)
        try:
            yield
        finally:
            torch.hub.set_dir(before)
