"""controlnet-aux's own OpenPose decoder, run on given heatmaps and affinity fields.

The library ties its decoder to its network and to an input height of 184 px. Here a stub takes the
place of the network, and its resizing leaves the image alone, so that the maps of any network and
size can be decoded by the library's unchanged code.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import torch


def load_open_pose() -> types.ModuleType:
    """Import only `controlnet_aux.open_pose`: the whole takes 9 s and changes timm's registry."""
    if "open_pose_reference" not in sys.modules:
        spec = importlib.util.find_spec("controlnet_aux")
        package = types.ModuleType("open_pose_reference")
        package.__path__ = [str(Path(spec.origin).parent / "open_pose")]
        sys.modules["open_pose_reference"] = package
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # scipy.ndimage.filters
            importlib.import_module(
                "open_pose_reference.util"
            )  # before body: they import each other
            importlib.import_module("open_pose_reference.body")
    return sys.modules["open_pose_reference"]


class ControlnetAuxDecoder:
    """Calls `Body.__call__` with the network's outputs given."""

    def __init__(self) -> None:
        open_pose = load_open_pose()
        self._util = open_pose.util
        self._body = object.__new__(open_pose.body.Body)
        self._enlarge = self._util.smart_resize_k

    def __call__(self, heatmaps: np.ndarray, affinities: np.ndarray, stride: int = 8) -> np.ndarray:
        """People `[n, 18, 3]` of one image's `[19, h, w]` and `[38, h, w]`, missing as NaN."""
        self._body.model = _Outputs(
            torch.from_numpy(affinities[None]), torch.from_numpy(heatmaps[None])
        )
        image = np.zeros(
            (heatmaps.shape[1] * stride, heatmaps.shape[2] * stride, 3), dtype=np.uint8
        )
        self._util.smart_resize_k = self._resize
        try:
            candidates, people = self._body(image)
        finally:
            self._util.smart_resize_k = self._enlarge
        keypoints = np.full((len(people), 18, 3), (np.nan, np.nan, 0), dtype=np.float32)
        for row, person in enumerate(people[:, :18].astype(int)):
            keypoints[row, person >= 0] = candidates[person[person >= 0], :3]
        return keypoints

    def _resize(self, x: np.ndarray, fx: float, fy: float) -> np.ndarray:
        return x if x.shape[2:] == (3,) else self._enlarge(x, fx, fy)


class _Outputs(torch.nn.Module):
    def __init__(self, *outputs: torch.Tensor) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))  # the library asks for its device
        self.outputs = outputs

    def forward(self, _image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.outputs
