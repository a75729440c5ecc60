"""OpenPose networks: RGB images to heatmaps and affinity fields, in PyTorch or ONNX."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import numpy as np
import onnxruntime
import torch
from einops import rearrange
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cfld.pose_decoder import NUM_AFFINITIES, NUM_HEATMAPS

HUB_FILENAME = "body_pose_model.pth"
_REMEDY = f"give OpenPose's {HUB_FILENAME} or an ONNX network (--pose-network FILE.onnx)"
_TRIAL_SIZE = (64, 96)


class PoseNetworkError(ValueError):
    """A pose network that cannot be had or is none; the message says what to give instead."""


class OpenPoseNetwork:
    """controlnet-aux's body network with the published weights, in PyTorch."""

    def __init__(self, network: str, device: str) -> None:
        """Load weights from a file or from a hub repository; `auto` takes a GPU if there is one.

        Raises:
            PoseNetworkError: If the weights cannot be had or are those of something else.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.place = f"{device}, {'fp16' if self.device.type == 'cuda' else 'fp32'}"
        self._model = _load_weights(_weights_file(network)).to(self.device).eval()

    @torch.no_grad()
    def __call__(
        self, canvases: UInt8[np.ndarray, "batch height width 3"]
    ) -> tuple[Float[Tensor, "batch 19 h w"], Float[Tensor, "batch 38 h w"]]:
        """Heatmaps and affinity fields of RGB images."""
        pixels = torch.from_numpy(canvases).to(self.device).flip(-1)  # the network knows BGR
        pixels = rearrange(pixels, "b h w c -> b c h w").float() / 256 - 0.5
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            affinities, heatmaps = self._model(pixels)
        if not (affinities.isfinite().all() and heatmaps.isfinite().all()):  # beyond fp16's range
            affinities, heatmaps = self._model(pixels)
        return heatmaps, affinities


@dataclass(frozen=True, kw_only=True)
class OnnxInput:
    """What an ONNX network is given: `scale` · x + `offset` for x in 0..255, channels in order."""

    colour_order: Literal["bgr", "rgb"] = "bgr"
    scale: float = 1.0
    offset: float = 0.0


class OnnxNetwork:
    """Any network in ONNX with OpenPose's 57 output channels, together or as 19 and 38."""

    place = "cpu, onnxruntime"

    def __init__(self, path: str, onnx_input: OnnxInput, num_threads: int) -> None:
        """Load the file and try it on a small grey image, so that a wrong one fails here.

        Raises:
            PoseNetworkError: If it is no ONNX file or does not have OpenPose's input and outputs.
        """
        if not Path(path).is_file():
            raise PoseNetworkError(f"{path}: no such file; {_REMEDY}")
        self._input = onnx_input
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            heatmaps, _ = self(np.full((2, *_TRIAL_SIZE, 3), 128, dtype=np.uint8))
        except Exception as error:  # onnxruntime's exceptions have no base of their own
            raise PoseNetworkError(f"{path}: {error}; {_REMEDY}") from error
        self.stride = _TRIAL_SIZE[0] // heatmaps.shape[2]

    def __call__(
        self, canvases: UInt8[np.ndarray, "batch height width 3"]
    ) -> tuple[Float[Tensor, "batch 19 h w"], Float[Tensor, "batch 38 h w"]]:
        """Heatmaps and affinity fields of RGB images."""
        if self._input.colour_order == "bgr":
            canvases = canvases[..., ::-1]
        pixels = np.ascontiguousarray(rearrange(canvases, "b h w c -> b c h w"), dtype=np.float32)
        pixels = np.float32(self._input.scale) * pixels + np.float32(self._input.offset)
        outputs = self._session.run(None, {self._session.get_inputs()[0].name: pixels})
        by_channels = {output.shape[1]: torch.from_numpy(output) for output in outputs}
        if NUM_HEATMAPS + NUM_AFFINITIES in by_channels:
            both = by_channels[NUM_HEATMAPS + NUM_AFFINITIES]
            return both[:, :NUM_HEATMAPS], both[:, NUM_HEATMAPS:]
        if {NUM_HEATMAPS, NUM_AFFINITIES} <= by_channels.keys():
            return by_channels[NUM_HEATMAPS], by_channels[NUM_AFFINITIES]
        raise ValueError(
            f"its outputs have {sorted(by_channels)} channels, OpenPose's have "
            f"{NUM_HEATMAPS + NUM_AFFINITIES}, or {NUM_HEATMAPS} and {NUM_AFFINITIES}"
        )


def _weights_file(network: str) -> str:
    if Path(network).is_file():
        return network
    if network.endswith((".pth", ".pt")):
        raise PoseNetworkError(f"{network}: no such file; {_REMEDY}")
    try:
        return hf_hub_download(network, HUB_FILENAME)
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise PoseNetworkError(
            f"{network}: {HUB_FILENAME} cannot be had from the hub ({error}); {_REMEDY}"
        ) from error


def _load_weights(path: str) -> nn.Module:
    """Load the published weights, whose names lack the name of the block: `conv1_1.weight`."""
    model = _open_pose_module()
    try:
        published = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(
            {name: published[name.partition(".")[2]] for name in model.state_dict()}
        )
    except (UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise PoseNetworkError(
            f"{path}: no weights of OpenPose's body network ({error})"
        ) from error
    return model


def _open_pose_module() -> nn.Module:
    """controlnet-aux's body network, unfilled.

    Only the file that defines it is executed: importing the package takes 9 s, replaces entries of
    timm's registry and sets KMP_DUPLICATE_LIB_OK.
    """
    package = importlib.util.find_spec("controlnet_aux")
    assert package is not None, "controlnet-aux is a dependency"
    assert package.origin is not None
    path = Path(package.origin).parent / "open_pose" / "model.py"
    spec = importlib.util.spec_from_file_location("controlnet_aux_open_pose_model", path)
    assert spec is not None, path
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.bodypose_model()
