"""CFLDPipeline: a photo of a person in another pose, as a diffusers pipeline."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Generator, Tensor
from torchvision.transforms.v2.functional import InterpolationMode, resize

from cfld.checks import check_choice, check_counts, check_scales
from cfld.codec import Codec, VaeCodec
from cfld.components import Conditioner, PixelAutoencoder
from cfld.conditioning import Conditioning
from cfld.editing import Appearance, Reference, Region, latent_masks, read_references
from cfld.guidance import GuidedConditioning, cumulative_terms, guide, guided_prediction
from cfld.model import CFLD, ConditioningParts
from cfld.pipeline_inputs import (
    Estimator,
    Picture,
    Size,
    check_noise,
    draw_poses,
    read_pictures,
    read_poses,
    read_sources,
)
from cfld.unet import LayerAttention, check_complete, install_processors, set_trained

Latents = Float[Tensor, "batch channels height width"]
Images = Float[Tensor, "batch 3 height width"]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def _sampling(
    method: Callable[Concatenate[CFLDPipeline, Arguments], Result],
) -> Callable[Concatenate[CFLDPipeline, Arguments], Result]:
    """Run a method without gradients and, even amid training, in evaluation mode.

    In training mode S leaves out layers at random, and generators would not decide the result.
    """

    @functools.wraps(method)
    def call(pipeline: CFLDPipeline, *args: Arguments.args, **options: Arguments.kwargs) -> Result:
        parts = (pipeline.conditioner, pipeline.unet)
        training = [module for part in parts for module in part.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                return method(pipeline, *args, **options)
        finally:
            for module in training:
                module.training = True

    return call


class CFLDPipeline(DiffusionPipeline):
    """Pose-guided person image synthesis (CFLD).

    `conditioner` holds S, D, A and P, `unet` N. Everything else is as in diffusers' own pipelines,
    but that only this class loads them: `DiffusionPipeline.from_pretrained` knows diffusers' own.
    """

    model_cpu_offload_seq = "conditioner->unet->vae"
    # The learnable vector is used outside of any forward, so that it can't be fetched layer-wise.
    _exclude_from_cpu_offload = ["conditioner"]  # noqa: RUF012  # the base class's declaration
    _callback_tensor_inputs = ["latents", "pred_original_sample"]  # noqa: RUF012

    def __init__(
        self,
        conditioner: Conditioner,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL | PixelAutoencoder,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        check_complete(unet, "unet")
        check_complete(vae, "vae")
        self.register_modules(conditioner=conditioner, unet=unet, vae=vae, scheduler=scheduler)
        settings = conditioner.settings
        install_processors(unet, attention=settings.attention, biases=settings.appearance.biases)
        if isinstance(vae, AutoencoderKL):
            vae.enable_slicing()
        self._interrupt = False
        self._num_timesteps = 0

    @classmethod
    def from_model(cls, model: CFLD, codec: Codec) -> CFLDPipeline:
        """A pipeline around a (trained) model and its codec; weights are shared, not copied."""
        return cls(
            conditioner=Conditioner.from_parts(model.config, ConditioningParts.of(model)),
            unet=model.unet,
            vae=codec.vae if isinstance(codec, VaeCodec) else PixelAutoencoder(codec.factor),
            scheduler=model.scheduler.from_config(model.scheduler.config),
        )

    def to_model(self) -> CFLD:
        """The model, to train or evaluate; weights are shared, not copied."""
        model = self._model()
        set_trained(self.unet, model.config.unet)
        model.set_gradient_checkpointing(model.config.gradient_checkpointing)
        return model

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to skip the remaining steps, by setting `_interrupt`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the last call, or of the one that runs."""
        return self._num_timesteps

    @_sampling
    def encode_appearance(self, image: Picture | Sequence[Picture]) -> Appearance:
        """What the model sees of photos, whatever the pose: to use several times, or to mix.

        Raises:
            ValueError: If a photo has a wrong form, or there is none.
        """
        self._check_components()
        pictures = read_pictures(image)
        if not pictures:
            raise ValueError("no image is given")
        model = self._model()
        _fetch(self.conditioner)
        source = read_sources(pictures, model.config.source_encoder.image_size)
        encoded = model.encode_source(source.to(self._execution_device))
        return Appearance(
            prompt=encoded.prompt,
            biases=encoded.appearance_biases,
            sizes=tuple(picture.shape[:2] for picture in pictures),
        )

    @_sampling
    def __call__(
        self,
        image: Picture | Sequence[Picture] | Appearance,
        pose: object,
        *,
        reference_image: Picture | Sequence[Picture] | None = None,
        mask_image: object = None,
        pose_frame: Size | Sequence[Size] | None = None,
        pose_estimator: Estimator | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        pose_guidance_scale: float = 2.0,
        appearance_guidance_scale: float = 2.0,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        latents: Latents | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw the person of `image` in the pose of `pose`.

        One image with several poses, several images with one pose each, or several images with
        one pose; the results are in the order of the longer of the two, those of
        `num_images_per_prompt` next to each other.

        With `reference_image` only the part of it that `mask_image` marks is drawn anew, in the
        appearance of `image`; elsewhere the latents are exactly its own (CFLD Sec. 4.6).

        Args:
            image: PIL images, arrays HWC or tensors CHW, uint8 or floats in [0, 1]. Resized to
                the model's square without keeping the aspect ratio, as in training. Or what
                `encode_appearance` makes of them, mixed by `cfld.editing.interpolate`.
            pose: Keypoints `[18, 3]`, a pose map `[21, h, w]`, a skeleton drawn in OpenPose's
                colours, or a photo of a person; several as a list or along a first axis. With
                `reference_image` that image's.
            reference_image: One for all results or one for each of them, in `image`'s forms.
            mask_image: White where the reference is to be drawn anew, of its size; truth values,
                uint8 or floats in [0, 1], one for all references or one for each.
            pose_frame: Height and width of the picture in whose pixels keypoints are given, one
                for all or one for each pose; without it the reference's or image's size.
            pose_estimator: Finds the person in pose photos (`cfld.pose_network.PoseEstimator`).
            height: Of the results, which are resized from the model's square; together with
                `width`. Without both: the size of each result's reference or image.
            width: See `height`.
            num_inference_steps: Denoising steps.
            pose_guidance_scale: w_pose of CFLD Eq. 7; 1 is no guidance.
            appearance_guidance_scale: w_app of CFLD Eq. 7; 1 is no guidance.
            num_images_per_prompt: Results for each pair of image and pose.
            generator: One for all results, or a list of one for each: then a result does not
                depend on what else is in the batch.
            latents: Standard normal noise to start from, one for each result.
            output_type: `pil`, `np` (NHWC in [0, 1]), `pt` (NCHW in [0, 1]) or `latent`.
            return_dict: Whether an `ImagePipelineOutput` is returned instead of a tuple.
            callback_on_step_end: Called as `(pipeline, step, timestep, tensors)`; may return
                replaced tensors.
            callback_on_step_end_tensor_inputs: Which tensors it gets: `latents`, and the
                `pred_original_sample`, the clean latents they seem to come from, which is None
                with schedulers that do not predict it.

        Raises:
            ValueError: If an argument has a wrong form, or numbers or sizes do not fit together.
            NoPersonError: If the estimator finds nobody in a pose photo.
        """
        if (height is None) != (width is None):
            raise ValueError(f"height is {height} and width is {width}: give both or neither")
        if height is not None:
            check_counts(height=height, width=width)
        check_counts(
            num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt
        )
        check_scales(
            pose_guidance_scale=pose_guidance_scale,
            appearance_guidance_scale=appearance_guidance_scale,
        )
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self._check_callback_inputs(callback_on_step_end_tensor_inputs)
        self._check_components()
        appearance = image if isinstance(image, Appearance) else self.encode_appearance(image)
        references = read_references(reference_image, mask_image)
        sizes = [each.image.shape[:2] for each in references] or list(appearance.sizes)
        poses = read_poses(pose, _as_sizes(pose_frame) or sizes, pose_estimator)
        num_rows = _count_rows(len(appearance.sizes), len(poses))
        sizes = [(height, width) if height and width else size for size in sizes]
        _check_sizes(sizes, num_rows, output_type)

        num_latents = num_rows * num_images_per_prompt
        region = self._encode_region(references, num_latents) if references else None
        pose_maps = draw_poses(
            poses * (num_rows // len(poses)), self.conditioner.settings.pose_map_size
        )
        terms = cumulative_terms(pose_guidance_scale, appearance_guidance_scale)
        guided = self._condition(appearance, pose_maps, terms, num_images_per_prompt)
        noise = self._initial_noise(num_latents, generator, latents)
        self.scheduler.set_timesteps(num_inference_steps, device=noise.device)
        latents = self._denoise(
            noise,
            guided,
            region,
            generator,
            callback_on_step_end,
            list(callback_on_step_end_tensor_inputs),
        )
        if output_type == "latent":
            images: Any = latents
        else:
            repeats = num_latents // len(sizes)
            images = self.decode_latents(
                latents, [size for size in sizes for _ in range(repeats)], output_type
            )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def decode_latents(self, latents: Latents, sizes: list[Size], output_type: str) -> Any:
        """Images of the wanted sizes, resized (bicubic, antialiased) from the model's square."""
        latents = latents / self.vae.config.scaling_factor
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        processor = VaeImageProcessor()
        if len(set(sizes)) == 1:
            return processor.postprocess(_resized(images, sizes[0]), output_type=output_type)
        return [
            processor.postprocess(_resized(row[None], size), output_type=output_type)[0]
            for row, size in zip(images, sizes, strict=True)
        ]

    def _check_callback_inputs(self, names: Sequence[str]) -> None:
        if isinstance(names, str) or set(names) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs is {names!r}; give a list of some of "
                f"{self._callback_tensor_inputs}"
            )

    def _check_components(self) -> None:
        processors = self.unet.attn_processors.values()
        others = {
            type(each).__name__ for each in processors if not isinstance(each, LayerAttention)
        }
        if others:
            raise ValueError(
                f"the UNet's attention runs by {sorted(others)}, which know nothing of CFLD Eq. 4: "
                "do not slice attention, fuse projections or set other processors; load it again"
            )

    def _model(self) -> CFLD:
        """CFLD around the components, as they are now."""
        conditioner = self.conditioner
        return CFLD(conditioner.settings, parts=conditioner.parts, unet=self.unet)

    def _condition(
        self,
        appearance: Appearance,
        pose_maps: Float[Tensor, "rows 21 pose_height pose_width"],
        terms: tuple[Any, ...],
        num_images: int,
    ) -> GuidedConditioning:
        model, device = self._model(), self._execution_device
        _fetch(self.conditioner)
        unposed = Conditioning(
            prompt=appearance.prompt, appearance_biases=appearance.biases, pose_residuals=()
        )
        conditioning = model.add_pose(unposed, pose_maps.to(device))
        if num_images > 1:
            conditioning = conditioning.map(lambda rows: rows.repeat_interleave(num_images, dim=0))
        _fetch(self.unet)
        return guide(model, conditioning.map(lambda rows: rows.to(self.unet.dtype)), terms)

    def _initial_noise(
        self,
        num_latents: int,
        generator: Generator | list[Generator] | None,
        latents: Latents | None,
    ) -> Latents:
        """Standard normal noise, in float32 whatever the model's type."""
        device = self._execution_device
        shape = (num_latents, self.unet.config.in_channels, *self.conditioner.settings.latent_size)
        check_noise(generator, latents, shape)
        if latents is None:
            latents = randn_tensor(shape, generator, device, torch.float32)
        return latents.to(device, torch.float32)

    def _encode_region(self, references: Sequence[Reference], num_latents: int) -> Region:
        """References as the modes of the VAE's posteriors, with a row for each result."""
        settings = self.conditioner.settings
        images = read_sources([each.image for each in references], settings.image_size)
        images = images.to(self._execution_device, self.vae.dtype)
        latents = self.vae.encode(images, return_dict=False)[0].mode().float()
        masks = latent_masks([each.mask for each in references], settings.latent_size)
        copies = num_latents // len(references)
        return Region(
            reference=(latents * self.vae.config.scaling_factor).repeat_interleave(copies, dim=0),
            is_edited=masks.to(latents.device).repeat_interleave(copies, dim=0),
        )

    def _denoise(
        self,
        noise: Latents,
        guided: GuidedConditioning,
        region: Region | None,
        generator: Generator | list[Generator] | None,
        callback: Callable[..., dict[str, Any]] | None,
        callback_inputs: list[str],
    ) -> Latents:
        model = self._model()
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        self._interrupt = False
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        latents = noise * self.scheduler.init_noise_sigma
        if region is not None:
            latents = region.restore(latents, noise, self.scheduler, timesteps[:1])
        for index, timestep in enumerate(self.progress_bar(timesteps)):
            if self.interrupt:
                continue
            scaled = self.scheduler.scale_model_input(latents, timestep)
            predicted = guided_prediction(model, scaled, timestep, guided)
            step = self.scheduler.step(predicted, timestep, latents, **options)
            latents = step.prev_sample
            if region is not None:
                remaining = timesteps[index + 1 :]
                latents = region.restore(latents, noise, self.scheduler, remaining[:1])
            if callback is not None:
                clean = step.get("pred_original_sample")
                known = {"latents": latents, "pred_original_sample": clean}
                tensors = {name: known[name] for name in callback_inputs}
                latents = callback(self, index, timestep, tensors).pop("latents", latents)
        return latents


@apply_forward_hook
def _fetch(component: torch.nn.Module) -> None:
    """Move an offloaded component to its device, as a call of its forward would."""
    del component


def _resized(images: Images, size: Size) -> Float[Tensor, "batch 3 {size[0]} {size[1]}"]:
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return resize(images, list(size), InterpolationMode.BICUBIC, antialias=True)


def _as_sizes(pose_frame: Size | Sequence[Size] | None) -> list[Size]:
    if pose_frame is None:
        return []
    return [(int(height), int(width)) for height, width in np.reshape(pose_frame, (-1, 2))]


def _count_rows(num_images: int, num_poses: int) -> int:
    if not num_images or not num_poses:
        raise ValueError(f"{num_images} images and {num_poses} poses: give at least one of each")
    if num_images != num_poses and 1 not in (num_images, num_poses):
        raise ValueError(
            f"{num_images} images and {num_poses} poses: give as many poses as images, or one "
            "image, or one pose"
        )
    return max(num_images, num_poses)


def _check_sizes(sizes: Sequence[Size], num_rows: int, output_type: str) -> None:
    if len(sizes) not in (1, num_rows):
        raise ValueError(f"{len(sizes)} reference images for {num_rows} results: give one or each")
    if output_type in ("np", "pt") and len(set(sizes)) > 1:
        raise ValueError(
            f"images of {sorted(set(sizes))} do not fit one array: give height and width"
        )
