import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate as interpolate_pixels

from cfld.codec import build_codec
from cfld.editing import (
    Appearance,
    interpolate,
    latent_masks,
    lerp,
    poses_between,
    read_masks,
    read_references,
    slerp,
)
from cfld.pipeline import CFLDPipeline
from cfld.pipeline_inputs import FramedPose, read_sources
from cfld.schedulers import compatible_schedulers
from preprocessing.figures import draw_figure

STYLE, OTHER = (draw_figure(person, 0, size=(48, 32), seed=0) for person in (0, 1))
REFERENCE = draw_figure(2, 0, size=(64, 40), seed=0)
NUM_STEPS = 3
HALF = np.zeros((64, 40), bool)
HALF[:32] = True
WEIGHTS = [0.0, 0.25, 0.5, 0.75, 1.0]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def generate(pipeline, image=STYLE.image, pose=REFERENCE.keypoints, **options):
    options = {"num_inference_steps": NUM_STEPS, "output_type": "latent"} | options
    return pipeline(image, pose, **({"generator": generator()} | options)).images


def transfer(pipeline, mask, **options):
    options = {"reference_image": REFERENCE.image, "mask_image": mask} | options
    return generate(pipeline, **options)


def plain(pipeline, **options):
    return generate(pipeline, pose_frame=(64, 40), **options)


def reference_latents(pipeline):
    image = read_sources([REFERENCE.image], pipeline.conditioner.settings.image_size)
    with torch.no_grad():
        return pipeline.vae.encode(image).latent_dist.mode() * pipeline.vae.config.scaling_factor


@pytest.fixture(scope="module")
def make_pipeline(micro, build):
    def make(codec):
        config = micro[codec]
        model = build(config, stirred=True)
        pipeline = CFLDPipeline.from_model(model, build_codec(config.codec, pretrained=False))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="module", params=["pixels", "vae"])
def pipeline(request, make_pipeline):
    return make_pipeline(request.param)


@pytest.fixture(scope="module")
def pixels(make_pipeline):
    return make_pipeline("pixels")


# Style transfer


def test_outside_the_mask_the_latents_are_the_reference(pipeline):
    latents = transfer(pipeline, HALF)
    known = reference_latents(pipeline)
    assert latents.shape[-2:] == (8, 8)
    torch.testing.assert_close(latents[..., 4:, :], known[..., 4:, :], rtol=0, atol=0)
    assert (latents[..., :4, :] - known[..., :4, :]).abs().mean() > 0.1


def test_a_whole_mask_is_plain_generation(pipeline):
    everything = transfer(pipeline, np.ones((64, 40), bool))
    torch.testing.assert_close(everything, plain(pipeline), rtol=0, atol=0)


def test_no_mask_is_the_reconstructed_reference(pipeline):
    nothing = np.zeros((64, 40), bool)
    known = reference_latents(pipeline)
    torch.testing.assert_close(transfer(pipeline, nothing), known, rtol=0, atol=0)
    picture = transfer(pipeline, nothing, output_type="np")[0]
    with torch.no_grad():
        decoded = pipeline.vae.decode(known / pipeline.vae.config.scaling_factor).sample
        resized = interpolate_pixels(decoded, (64, 40), mode="bicubic", antialias=True)
    expected = (resized[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
    np.testing.assert_allclose(picture, expected, atol=1e-5)


def test_at_each_step_the_rest_is_the_reference_noised_to_its_timestep(pixels):
    seen = []

    def record(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    noise = torch.randn(1, 48, 8, 8, generator=generator(5))
    transfer(pixels, HALF, latents=noise, callback_on_step_end=record)
    known = reference_latents(pixels)
    for latents, timestep in zip(seen[:-1], pixels.scheduler.timesteps[1:], strict=True):
        noised = pixels.scheduler.add_noise(known, noise, timestep[None])
        torch.testing.assert_close(latents[..., 4:, :], noised[..., 4:, :])


@pytest.mark.parametrize("name", ["ddim", "eulerdiscrete"])
def test_transfer_with_other_schedulers(pixels, name):
    scheduler = compatible_schedulers(pixels.scheduler)[name].from_config(
        pixels.scheduler.config, prediction_type="epsilon", rescale_betas_zero_snr=False
    )
    swapped = CFLDPipeline(**pixels.components | {"scheduler": scheduler})
    swapped.set_progress_bar_config(disable=True)
    latents = transfer(swapped, HALF)
    known = reference_latents(swapped)
    torch.testing.assert_close(latents[..., 4:, :], known[..., 4:, :], rtol=0, atol=0)
    everything = transfer(swapped, np.ones((64, 40), bool))
    torch.testing.assert_close(everything, plain(swapped), rtol=0, atol=0)


def test_transfer_with_offload_hooks(pixels, tmp_path):
    pixels.save_pretrained(tmp_path)
    offloaded = CFLDPipeline.from_pretrained(tmp_path)
    offloaded.set_progress_bar_config(disable=True)
    offloaded.enable_model_cpu_offload(device="cpu")  # all of a GPU's hooks, without the moving
    appearance = offloaded.encode_appearance(STYLE.image)
    for _ in range(2):
        latents = transfer(offloaded, HALF, image=appearance)
        torch.testing.assert_close(latents, transfer(pixels, HALF), rtol=1e-4, atol=1e-4)


def test_several_styles_of_one_reference_equal_single_calls(pixels):
    styles = [STYLE.image, OTHER.image]
    both = transfer(pixels, HALF, image=styles, generator=[generator(), generator()])
    for row, style in enumerate(styles):
        torch.testing.assert_close(
            both[row], transfer(pixels, HALF, image=style)[0], rtol=1e-4, atol=1e-4
        )


def test_several_references_keep_their_places(pixels):
    references = [REFERENCE.image, np.ascontiguousarray(REFERENCE.image[:, ::-1])]
    latents = transfer(
        pixels,
        HALF,
        image=[STYLE.image, OTHER.image],
        reference_image=references,
        num_images_per_prompt=2,
        generator=None,
    )
    for row, image in enumerate((references[0], references[0], references[1], references[1])):
        known = pixels.vae.encode(read_sources([image], (32, 32))).latent_dist.mode()
        torch.testing.assert_close(latents[row, :, 4:], known[0, :, 4:], rtol=0, atol=0)


def test_results_have_the_references_size(pixels):
    assert transfer(pixels, HALF, output_type="np").shape == (1, 64, 40, 3)
    wanted = transfer(pixels, HALF, output_type="np", height=50, width=20)
    assert wanted.shape == (1, 50, 20, 3)


def test_unfit_references_are_refused(pixels):
    for options, message in (
        ({"mask": None}, "reference_image and mask_image together"),
        ({"reference_image": None}, "reference_image and mask_image together"),
        ({"mask": HALF[:-1]}, r"mask of \(63, 40\) .* does not fit its reference of"),
        ({"reference_image": [REFERENCE.image] * 2}, "2 reference images for 1 results"),
    ):
        with pytest.raises(ValueError, match=message):
            transfer(pixels, **{"mask": HALF} | options)


def test_masks_come_in_many_forms():
    grey = np.where(HALF, 200, 20).astype(np.uint8)
    forms = [HALF, grey, torch.from_numpy(HALF), grey / 255, Image.fromarray(grey), HALF[None]]
    for mask in forms:
        (read,) = read_masks(mask)
        np.testing.assert_array_equal(read, HALF)
    assert len(read_masks([HALF, np.stack([HALF, HALF])])) == 3
    picture = np.zeros((64, 40, 3), np.uint8)
    assert len(read_references([picture] * 2, HALF)) == 2


def test_unfit_masks_are_refused():
    for mask, message in (
        ("mask.png", "not str"),
        (HALF[None, None], r"not \(1, 1, 64, 40\)"),
        (HALF.astype(np.int64), "mask of int64"),
        (np.full((4, 4), 2.0), "values from 2.0 to 2.0"),
        (np.full((4, 4), np.nan), "values from nan"),
    ):
        with pytest.raises(ValueError, match=message):
            read_masks(mask)
    picture = np.zeros((64, 40, 3), np.uint8)
    with pytest.raises(ValueError, match="2 masks for 3 references"):
        read_references([picture] * 3, [HALF] * 2)


def test_a_latent_is_edited_if_the_mask_covers_half_of_it():
    mask = np.zeros((8, 8), bool)
    mask[0, 0:2] = True  # half of the first
    mask[4, 4] = True  # a quarter of another
    (latents,) = latent_masks([mask], (4, 4))
    assert latents.nonzero().tolist() == [[0, 0, 0]]


# Interpolation


@pytest.fixture(scope="module")
def appearances(pixels):
    return [pixels.encode_appearance(figure.image) for figure in (STYLE, OTHER)]


def mixed(appearances, prompt, biases, method="linear"):
    return interpolate(*appearances, prompt_weights=prompt, bias_weights=biases, method=method)


def test_an_encoded_appearance_replaces_its_photo(pixels, appearances):
    torch.testing.assert_close(
        generate(pixels, appearances[0], pose_frame=(64, 40)), plain(pixels), rtol=0, atol=0
    )
    assert appearances[0].sizes == ((48, 32),)


@pytest.mark.parametrize("method", ["linear", "spherical"])
def test_the_ends_are_the_two_sources_own_results(pixels, appearances, method):
    for weight, figure in ((0.0, STYLE), (1.0, OTHER)):
        own = plain(pixels, image=figure.image)
        mix = mixed(appearances, [weight], [weight], method)
        result = generate(pixels, mix, pose_frame=(64, 40))
        torch.testing.assert_close(result, own, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["linear", "spherical"])
def test_appearance_moves_steadily_from_one_source_to_the_other(appearances, method):
    first, second = appearances
    mix = mixed(appearances, WEIGHTS, WEIGHTS, method)
    for ours, theirs, rows in zip(
        (first.prompt, *first.biases),
        (second.prompt, *second.biases),
        (mix.prompt, *mix.biases),
        strict=True,
    ):
        from_first = (rows - ours).flatten(1).norm(dim=1)
        from_second = (rows - theirs).flatten(1).norm(dim=1)
        assert (from_first.diff() > 0).all()
        assert (from_second.diff() < 0).all()


@pytest.mark.parametrize("method", ["linear", "spherical"])
def test_results_move_steadily_from_one_source_to_the_other(pixels, appearances, method):
    frames = generate(
        pixels,
        mixed(appearances, WEIGHTS, WEIGHTS, method),
        pose_frame=(64, 40),
        generator=[generator() for _ in WEIGHTS],
    )
    from_first = (frames - frames[0]).flatten(1).norm(dim=1)
    from_second = (frames - frames[-1]).flatten(1).norm(dim=1)
    assert (from_first.diff() > 0).all()
    assert (from_second.diff() < 0).all()


def test_prompt_and_biases_are_mixed_separately(appearances):
    first, second = appearances
    prompt_only = mixed(appearances, [1.0], [0.0])
    assert torch.equal(prompt_only.prompt, second.prompt)
    assert all(map(torch.equal, prompt_only.biases, first.biases))
    biases_only = mixed(appearances, [0.0], [1.0])
    assert torch.equal(biases_only.prompt, first.prompt)
    assert all(map(torch.equal, biases_only.biases, second.biases))


def test_slerp_keeps_the_length_and_goes_evenly_round():
    first, second = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    weights = torch.tensor(WEIGHTS).view(-1, 1, 1)
    angles = np.pi / 2 * np.array(WEIGHTS)
    expected = 2 * torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], -1)).float()
    ends = (tokens.expand(5, 1, 2) for tokens in (first, second))
    torch.testing.assert_close(slerp(*ends, weights)[:, 0], expected)


def test_slerp_of_parallel_tokens_is_a_line():
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    others = torch.tensor([[[3.0, 0.0], [-3.0, 0.0], [0.0, 0.0]]])
    half = torch.full((1, 1, 1), 0.5)
    torch.testing.assert_close(slerp(tokens, others, half), lerp(tokens, others, half))


def test_half_precision_appearances_meet_their_ends(appearances):
    halved = [
        Appearance(
            prompt=each.prompt.half(), biases=tuple(b.half() for b in each.biases), sizes=each.sizes
        )
        for each in appearances
    ]
    mix = mixed(halved, [0.0, 1.0], [0.0, 1.0], "spherical")
    assert mix.prompt.dtype == torch.float16
    assert torch.equal(mix.prompt, torch.cat([each.prompt for each in halved]))


def test_unfit_mixtures_are_refused(pixels, appearances):
    for arguments, message in (
        (([0.5], [0.5], "cubic"), "method is 'cubic'; choose one of"),
        (([0.5], [0.5, 1.0]), "1 prompt_weights and 2 bias_weights"),
        (([1.5], [0.5]), r"must lie in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            mixed(appearances, *arguments)
    both = pixels.encode_appearance([STYLE.image, OTHER.image])
    with pytest.raises(ValueError, match="an appearance of 2 photos"):
        mixed([both, appearances[0]], [0.5], [0.5])
    with pytest.raises(ValueError, match="no image is given"):
        pixels.encode_appearance([])


# Walks


def test_poses_between_lie_on_straight_lines():
    start, end = np.full((18, 3), 10, np.float32), np.full((18, 3), 60, np.float32)
    start[:, 2] = end[:, 2] = 1
    start[3], end[5] = (np.nan, np.nan, 0), (np.nan, np.nan, 0)
    between = poses_between(FramedPose(start, (50, 40)), FramedPose(end, (100, 80)), 3)
    assert [pose.frame for pose in between] == [(50, 40)] * 3
    for pose, expected in zip(between, (15, 20, 25), strict=True):
        assert np.isnan(pose.keypoints[[3, 5], :2]).all()
        kept = np.delete(pose.keypoints, [3, 5], axis=0)
        np.testing.assert_allclose(kept[:, :2], expected)
        np.testing.assert_allclose(kept[:, 2], 1)


def test_poses_without_a_common_joint_have_nothing_between():
    start, end = np.full((18, 3), np.nan, np.float32), np.full((18, 3), np.nan, np.float32)
    start[0], end[1] = (5, 5, 1), (5, 5, 1)
    with pytest.raises(ValueError, match="no joint in common"):
        poses_between(FramedPose(start, (9, 9)), FramedPose(end, (9, 9)), 1)
