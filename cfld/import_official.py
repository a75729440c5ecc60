"""Command: the authors' released checkpoints as a pipeline folder of this project."""

from __future__ import annotations

import argparse
import logging
import pickle
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cfld.codec import Codec, VaeCodec, build_codec
from cfld.command import make_parser
from cfld.config import CFLDConfig
from cfld.config_file import ConfigError, load_config
from cfld.model import CFLD, build_conditioning_parts
from cfld.official import our_name
from cfld.pipeline import CFLDPipeline

logger = logging.getLogger("cfld.import_official")  # run as a command, __name__ is another

_EXAMPLE = """\
example:
  python -m cfld.import_official --model pytorch_model.bin --unet pytorch_model_1.bin \\
      --output weights

Their files hold no VAE: it is Stable Diffusion 1.5's, from the hub or from --vae."""


class CheckpointError(ValueError):
    """Files that do not hold exactly the wanted tensors, or no VAE to go with them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _make_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("cfld").setLevel(logging.INFO)
    try:
        if Path(options.output).is_file():
            raise CheckpointError(f"{options.output}: is a file; give a folder")
        config = load_config(options.config)
        codec = load_codec(config, options.vae)
        model = import_model(config, read_tensors(options.model), read_tensors(options.unet))
    except (ConfigError, CheckpointError) as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt:
        logger.error("interrupted; nothing was written, run the same command again")
        return 1
    try:
        CFLDPipeline.from_model(model, codec).save_pretrained(options.output)
    except (OSError, KeyboardInterrupt) as error:
        logger.error("%s is not complete: %s; delete it", options.output, error or "interrupted")
        return 1
    logger.info("%s holds the pipeline", options.output)
    return 0


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Named tensors from a safetensors file or a pickle, of which nothing is executed.

    Raises:
        CheckpointError: If it cannot be read, or holds anything else or values that are not finite.
    """
    try:
        if Path(path).suffix == ".safetensors":
            tensors = load_file(path)
        else:
            is_zipped = zipfile.is_zipfile(path)  # by torch 1.6 or later
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipped)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, because it holds more than tensors and may run code: {error}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {error}") from error
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path}: holds a {type(tensors).__name__}, not named tensors")
    named = {str(name): value for name, value in tensors.items()}
    for is_right, problem in (
        (_is_dense, "entries that are no dense tensors"),
        (_is_finite, "tensors with values that are not finite"),
    ):
        wrong = [name for name, value in named.items() if not is_right(value)]
        if wrong:
            raise CheckpointError(f"{path}: {_listed(wrong, problem)}")
    return named


def import_model(
    config: CFLDConfig, conditioning: Mapping[str, Tensor], unet: Mapping[str, Tensor]
) -> CFLD:
    """CFLD with the authors' tensors of both files (`pytorch_model.bin`, `pytorch_model_1.bin`).

    Raises:
        CheckpointError: Unless every parameter is given exactly once, in its shape.
    """
    shared = sorted(conditioning.keys() & unet.keys())
    if shared:
        raise CheckpointError(f"both files hold {_listed(shared, 'tensors of the same name')}")
    # Not S, whose masks no file holds: timm computes them where the weights are.
    parts = build_conditioning_parts(config, pretrained=False)
    with init_empty_weights():
        model = CFLD(config, pretrained=False, parts=parts)
    tensors = rename_tensors(config, {**conditioning, **unet}, model.state_dict())
    model.load_state_dict(tensors, assign=True)
    return model


def rename_tensors(
    config: CFLDConfig, official: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The authors' tensors under our names, in float32; `wanted` has our names and shapes.

    Raises:
        CheckpointError: Listing what is missing, unexpected, of another shape or no weights.
    """
    renamed: dict[str, Tensor] = {}
    unexpected, misshapen, whole_numbers, filled = [], [], [], set()
    for name, tensor in official.items():
        try:
            ours = our_name(name, len(config.branch_shapes))
        except KeyError:
            unexpected.append(name)
            continue
        if ours is None:
            continue
        filled.add(ours)
        if ours not in wanted:
            unexpected.append(name)
        elif tensor.shape != wanted[ours].shape:
            misshapen.append(f"{name} {tuple(tensor.shape)}, not {tuple(wanted[ours].shape)}")
        elif not tensor.is_floating_point():
            whole_numbers.append(name)
        else:
            renamed[ours] = tensor.to(torch.float32)
    problems = {
        "tensors are missing (in our names)": list(wanted.keys() - filled),
        "tensors are not known to this configuration": unexpected,
        "tensors have another shape": misshapen,
        "tensors are no floating-point numbers": whole_numbers,
    }
    found = [_listed(names, problem) for problem, names in problems.items() if names]
    if found:
        raise CheckpointError(
            "the checkpoint does not fit the configuration; is it complete, and is --config that "
            "of its training?\n" + "\n".join(found)
        )
    return renamed


def load_codec(config: CFLDConfig, vae: str | None) -> Codec:
    """The codec, its VAE from a hub name or a folder with `vae/` in it.

    Raises:
        CheckpointError: If there is no VAE, or its latents have another size than wanted.
    """
    settings = replace(config.codec, pretrained=vae) if vae else config.codec
    if settings.kind == "vae" and not settings.pretrained:
        raise CheckpointError("the configuration names no VAE; give --vae")
    try:
        codec = build_codec(settings)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{settings.pretrained}: no VAE can be had from there ({error}); give --vae, a folder "
            "of Stable Diffusion 1.5 with vae/ in it"
        ) from error
    if isinstance(codec, VaeCodec):
        factor = 2 ** (len(codec.vae.config.block_out_channels) - 1)
        if factor != settings.factor:
            raise CheckpointError(
                f"{settings.pretrained}: one latent of its VAE is {factor} pixels wide, the "
                f"configuration has codec.factor {settings.factor}"
            )
        channels = codec.vae.config.latent_channels
        if channels != settings.latent_channels:
            raise CheckpointError(
                f"{settings.pretrained}: latents of its VAE have {channels} channels, not "
                f"{settings.latent_channels}; give Stable Diffusion 1.5's"
            )
    return codec


def _listed(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}:" + "".join(f"\n  {name}" for name in sorted(names))


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _make_parser() -> argparse.ArgumentParser:
    parser = make_parser("cfld.import_official", __doc__, _EXAMPLE)
    parser.add_argument("--model", required=True, metavar="FILE", help="S, D, A and P")
    parser.add_argument("--unet", required=True, metavar="FILE", help="N")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the pipeline goes")
    parser.add_argument(
        "--config", default="paper", metavar="NAME|FILE", help="sizes other than the paper's"
    )
    parser.add_argument("--vae", metavar="NAME|DIR", help="default: Stable Diffusion 1.5's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
