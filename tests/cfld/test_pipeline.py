import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.callbacks import PipelineCallback
from PIL import Image
from safetensors.torch import load_file, save_file

from cfld.codec import build_codec
from cfld.images import resize_image
from cfld.objective import TrainingBatch, draw_rows
from cfld.pipeline import CFLDPipeline
from cfld.pipeline_inputs import FramedPose, draw_poses, read_poses, read_sources
from cfld.pose import draw_skeleton
from cfld.schedulers import compatible_schedulers
from cfld.unet import is_up_cross_attention
from preprocessing.figures import draw_figure

FIRST, SECOND, THIRD = (draw_figure(0, image, size=(48, 32), seed=0) for image in range(3))
NUM_STEPS = 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def generate(pipeline, image=FIRST.image, pose=SECOND.keypoints, **options):
    options = {"num_inference_steps": NUM_STEPS, "output_type": "np"} | options
    return pipeline(image, pose, **({"generator": generator()} | options)).images


def difference(first, second):
    return np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64)).max()


@pytest.fixture(scope="module", params=["pixels", "vae"])
def pipeline(request, micro, build):
    config = micro[request.param]
    model = build(config, stirred=True)
    pipeline = CFLDPipeline.from_model(model, build_codec(config.codec, pretrained=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pixels(micro, build):
    config = micro["pixels"]
    pipeline = CFLDPipeline.from_model(build(config, stirred=True), build_codec(config.codec))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(folder, **options):
    pipeline = CFLDPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# diffusers' tests/pipelines/test_pipelines_common.py, with its tolerances


def test_saved_and_loaded_it_generates_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    assert difference(generate(pipeline), generate(load(tmp_path))) < 5e-4
    components = json.loads((tmp_path / "model_index.json").read_text())
    assert components["_class_name"] == "CFLDPipeline"
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"conditioner", "scheduler", "unet", "vae"}
    files = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}
    UNet2DConditionModel.from_pretrained(tmp_path / "unet")  # a plain one of diffusers


@pytest.mark.parametrize(
    ("component", "name", "message"),
    [
        ("conditioner", "learnable_vector", "1 missing keys, such as learnable_vector"),
        ("unet", "conv_in.bias", "unet: 1 weights are missing, such as conv_in.bias"),
        ("vae", "decoder.conv_in.bias", "vae: 1 weights are missing, such as decoder.conv"),
    ],
)
def test_weights_that_lack_a_tensor_are_refused(micro, build, tmp_path, component, name, message):
    config = micro["vae"]
    codec = build_codec(config.codec, pretrained=False)
    CFLDPipeline.from_model(build(config), codec).save_pretrained(tmp_path)
    file = tmp_path / component / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_loading_places_components_and_leaves_the_random_state(pixels, weights):
    state = torch.random.get_rng_state()
    placed = load(weights, device_map="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert difference(generate(placed), generate(pixels)) < 5e-4


def test_half_precision_survives_saving(pixels, tmp_path):
    pixels.save_pretrained(tmp_path)
    half = load(tmp_path, torch_dtype=torch.bfloat16)
    assert {half.unet.dtype, half.conditioner.dtype, half.vae.dtype} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "half", variant="bf16")
    assert list((tmp_path / "half").glob("unet/*.bf16.safetensors"))
    again = load(tmp_path / "half", variant="bf16", torch_dtype=torch.bfloat16)
    assert difference(generate(half), generate(again)) < 1e-2
    assert difference(generate(half), generate(pixels)) < 5e-2


def test_a_batch_equals_single_calls(pipeline):
    images, poses = [FIRST.image, SECOND.image], [SECOND.keypoints, THIRD.keypoints]
    batch = generate(pipeline, images, poses, generator=[generator(1), generator(2)])
    for row, (image, pose, seed) in enumerate(zip(images, poses, (1, 2), strict=True)):
        single = generate(pipeline, image, pose, generator=generator(seed))
        assert difference(batch[row], single[0]) < 1e-4


def test_several_poses_of_one_source_equal_single_calls(pixels):
    poses = [SECOND.keypoints, THIRD.keypoints, FIRST.keypoints]
    generators = [generator(seed) for seed in range(3)]
    several = generate(pixels, pose=poses, generator=generators)
    for row, pose in enumerate(poses):
        single = generate(pixels, pose=pose, generator=generator(row))
        assert difference(several[row], single[0]) < 1e-4


def test_one_pose_serves_several_sources(pixels):
    images = [FIRST.image, THIRD.image]
    both = generate(pixels, images, generator=[generator(), generator()])
    for row, image in enumerate(images):
        assert difference(both[row], generate(pixels, image)[0]) < 1e-4


def test_results_of_one_pair_lie_next_to_each_other(pixels):
    poses = [SECOND.keypoints, THIRD.keypoints]
    generators = [generator(seed) for seed in range(4)]
    four = generate(pixels, pose=poses, num_images_per_prompt=2, generator=generators)
    assert len(four) == 4
    last = generate(pixels, pose=THIRD.keypoints, generator=generator(3))
    assert difference(four[3], last[0]) < 1e-4


def test_output_types_agree(pipeline):
    as_np = generate(pipeline)
    as_pt = generate(pipeline, output_type="pt")
    as_pil = generate(pipeline, output_type="pil")
    assert as_np.shape == (1, 48, 32, 3)
    assert as_pt.shape == (1, 3, 48, 32)
    assert difference(as_np, as_pt.permute(0, 2, 3, 1)) < 1e-4
    assert difference(as_np, np.asarray(as_pil[0])[None] / 255) <= 0.5 / 255 + 1e-4
    assert 0 <= as_np.min() < as_np.max() <= 1


def test_latents_go_in_and_come_out(pixels):
    settings = pixels.conditioner.settings
    shape = (1, settings.codec.latent_channels, *settings.latent_size)
    noise = torch.randn(shape, generator=generator())
    ddim = DDIMScheduler.from_config(pixels.scheduler.config)
    swapped = CFLDPipeline(**pixels.components | {"scheduler": ddim})
    swapped.set_progress_bar_config(disable=True)
    given = generate(swapped, latents=noise, output_type="latent")
    assert given.shape == shape
    assert difference(given, generate(swapped, output_type="latent")) == 0
    assert (noise == torch.randn(shape, generator=generator())).all()


def test_callback_sees_and_changes_every_step(pixels):
    seen = []

    def zero_at_the_end(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        if step == NUM_STEPS - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    latents = generate(pixels, callback_on_step_end=zero_at_the_end, output_type="latent")
    assert seen == list(enumerate(pixels.scheduler.timesteps.tolist()))
    assert (latents == 0).all()


def test_callback_sees_what_the_latents_seem_to_come_from(pixels):
    seen = []

    def record(pipe, step, timestep, tensors):
        seen.append(tensors)
        return {}

    names = ["latents", "pred_original_sample"]
    options = {"callback_on_step_end": record, "callback_on_step_end_tensor_inputs": names}
    latents = generate(pixels, output_type="latent", **options)
    assert difference(latents, generate(pixels, output_type="latent")) == 0
    assert difference(seen[0]["latents"], seen[0]["pred_original_sample"]) > 0.1
    assert difference(seen[-1]["pred_original_sample"], latents) < 1e-5
    solver = compatible_schedulers(pixels.scheduler)["unipcmultistep"]
    scheduler = solver.from_config(pixels.scheduler.config)
    swapped = CFLDPipeline(**pixels.components | {"scheduler": scheduler})
    swapped.set_progress_bar_config(disable=True)
    generate(swapped, **options)
    assert seen[-1]["pred_original_sample"] is None


def test_diffusers_own_callbacks_get_what_they_ask_for(pixels):
    seen = []

    class Record(PipelineCallback):
        tensor_inputs = ("pred_original_sample",)

        def callback_fn(self, pipeline, *arguments):
            seen.append((pipeline.num_timesteps, list(arguments[-1])))
            return arguments[-1]

    generate(pixels, callback_on_step_end=Record(cutoff_step_ratio=1.0))
    assert seen == NUM_STEPS * [(NUM_STEPS, ["pred_original_sample"])]


def test_callback_can_interrupt(pixels):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True
        return tensors

    generate(pixels, callback_on_step_end=stop)
    assert steps == [0]
    assert difference(generate(pixels), generate(pixels)) == 0  # the next call runs to the end


def test_tuple_on_request(pixels):
    options = {"num_inference_steps": 1, "output_type": "np", "return_dict": False}
    (images,) = pixels(FIRST.image, SECOND.keypoints, **options)
    assert images.shape == (1, 48, 32, 3)


@pytest.mark.gpu
def test_half_precision_and_offload_on_a_gpu(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    full = generate(load(tmp_path).to("cuda"))
    half = generate(load(tmp_path, torch_dtype=torch.float16).to("cuda"))
    assert difference(full, half) < 5e-2
    offloaded = load(tmp_path)
    offloaded.enable_model_cpu_offload()
    for _ in range(2):
        assert difference(full, generate(offloaded)) < 2e-4
    assert {offloaded.unet.device.type, offloaded.conditioner.device.type} == {"cpu"}
    sequential = load(tmp_path)
    sequential.enable_sequential_cpu_offload()
    assert difference(full, generate(sequential)) < 2e-4


def test_offload_hooks_fit_the_calls(pixels, tmp_path):
    pixels.save_pretrained(tmp_path)
    offloaded = load(tmp_path)
    offloaded.enable_model_cpu_offload(device="cpu")  # all of a GPU's hooks, without the moving
    assert difference(generate(pixels), generate(offloaded)) < 2e-4


# the method


def test_sampling_equals_a_plain_formulation(pipeline, tmp_path):
    """CFLD Eq. 4 by hooks on an untouched UNet of diffusers, Eq. 7 by three separate calls."""
    pipeline.save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    model = pipeline.to_model()
    pose = read_poses(SECOND.keypoints, [(48, 32)])
    source = read_sources([FIRST.image], model.config.source_encoder.image_size)
    biases = []
    layers = [layer for name, layer in unet.named_modules() if is_up_cross_attention(name)]
    for index, layer in enumerate(layers):
        layer.to_q.register_forward_hook(
            lambda _, __, query, index=index: query + biases[index] if biases else query
        )

    def predict(latents, timestep, prompt, pose_residuals, appearance_biases):
        biases[:] = appearance_biases
        residuals = [residual.clone() for residual in pose_residuals] or None
        return unet(
            latents, timestep, prompt, down_intrablock_additional_residuals=residuals
        ).sample

    with torch.no_grad():
        known = model.condition(source, draw_poses(pose, model.config.pose_map_size))
        nothing = model.learnable_vector
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(NUM_STEPS)
        random = generator()
        shape = (1, unet.config.in_channels, *model.config.latent_size)
        latents = torch.randn(shape, generator=random)
        for timestep in scheduler.timesteps:
            unguided = predict(latents, timestep, nothing, (), ())
            posed = predict(latents, timestep, nothing, known.pose_residuals, ())
            full = predict(
                latents, timestep, known.prompt, known.pose_residuals, known.appearance_biases
            )
            predicted = unguided + 1.7 * (posed - unguided) + 2.3 * (full - posed)
            latents = scheduler.step(predicted, timestep, latents, generator=random).prev_sample
    scales = {"pose_guidance_scale": 1.7, "appearance_guidance_scale": 2.3}
    ours = generate(pipeline, output_type="latent", **scales)
    assert latents.std() > 0.05
    torch.testing.assert_close(ours, latents, atol=1e-5, rtol=1e-5)
    unbiased = generate(pipeline, output_type="latent", pose_guidance_scale=1.7)
    assert difference(unbiased, latents) > 1e-3


def test_conditioning_is_computed_once(pixels):
    calls = {"source_encoder": [], "pose_adapter": [], "keys": [], "unet": []}

    def count(name):
        return lambda _, inputs: calls[name].append(len(inputs[0]))

    keys = pixels.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.to_k
    conditioner = pixels.conditioner
    hooks = [
        conditioner.source_encoder.register_forward_pre_hook(count("source_encoder")),
        conditioner.pose_adapter.register_forward_pre_hook(count("pose_adapter")),
        keys.register_forward_pre_hook(count("keys")),
        pixels.unet.register_forward_pre_hook(count("unet")),
    ]
    poses = [FIRST.keypoints, SECOND.keypoints, THIRD.keypoints]
    generate(pixels, pose=poses, pose_guidance_scale=1.5)
    for hook in hooks:
        hook.remove()
    assert calls["source_encoder"] == [1]
    assert calls["pose_adapter"] == [3]
    assert calls["keys"] == [9]
    assert calls["unet"] == NUM_STEPS * [9]


@pytest.mark.parametrize(
    ("scales", "num_rows"), [((1.0, 1.0), 1), ((1.0, 2.0), 2), ((2.0, 1.0), 3), ((2.0, 2.0), 2)]
)
def test_each_term_of_the_guidance_is_one_row(pixels, scales, num_rows):
    rows = []
    hook = pixels.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    generate(pixels, pose_guidance_scale=scales[0], appearance_guidance_scale=scales[1])
    hook.remove()
    assert rows == NUM_STEPS * [num_rows]


def test_inputs_are_left_alone(pixels):
    image, keypoints = FIRST.image.copy(), SECOND.keypoints.copy()
    before = dict(pixels.scheduler.config)
    generate(pixels, image, keypoints)
    np.testing.assert_array_equal(image, FIRST.image)
    np.testing.assert_array_equal(keypoints, SECOND.keypoints)
    assert dict(pixels.scheduler.config) == before


@pytest.mark.parametrize(
    "name", ["ddim", "eulerdiscrete", "dpmsolvermultistep", "lcm", "unipcmultistep"]
)
def test_schedulers_by_name(pixels, name):
    scheduler = compatible_schedulers(pixels.scheduler)[name].from_config(pixels.scheduler.config)
    swapped = CFLDPipeline(**pixels.components | {"scheduler": scheduler})
    swapped.set_progress_bar_config(disable=True)
    images = generate(swapped)
    assert np.isfinite(images).all()
    assert difference(images, generate(swapped)) == 0


def test_a_model_amid_training_samples_as_in_evaluation_mode(micro, build):
    encoder = replace(micro["pixels"].source_encoder, drop_path=0.9)
    model = build(replace(micro["pixels"], source_encoder=encoder))
    pipeline = CFLDPipeline.from_model(model, build_codec(micro["pixels"].codec))
    expected = generate(pipeline, FIRST.image)
    modes = [module.training for module in model.train().modules()]
    assert difference(generate(pipeline, FIRST.image), expected) == 0
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    "change",
    [
        lambda pipeline: pipeline.enable_attention_slicing(),
        lambda pipeline: pipeline.unet.fuse_qkv_projections(),
    ],
)
def test_attention_of_another_kind_is_refused(micro, build, change):
    pipeline = CFLDPipeline.from_model(build(micro["pixels"]), build_codec(micro["pixels"].codec))
    change(pipeline)
    with pytest.raises(ValueError, match="do not slice attention, fuse projections"):
        generate(pipeline)


def test_sampling_leaves_gradient_checkpointing_alone(micro, build):
    model = build(micro["pixels"])
    model.set_gradient_checkpointing(["unet", "appearance"])
    pipeline = CFLDPipeline.from_model(model, build_codec(micro["pixels"].codec))
    generate(pipeline, num_inference_steps=1)
    assert model.unet.is_gradient_checkpointing
    assert model.appearance.recompute


def test_model_to_pipeline_and_back(micro, build):
    config = micro["pixels"]
    model = build(config)
    pipeline = CFLDPipeline.from_model(model, build_codec(config.codec))
    again = pipeline.to_model()
    assert again.config == config
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(before[name] is after[name] for name in before)
    assert before.keys() == after.keys()
    assert pipeline.scheduler is not model.scheduler


def test_results_have_the_photos_size_or_the_wanted_one(pixels):
    images = [Image.fromarray(FIRST.image).resize(size) for size in ((40, 60), (30, 50))]
    options = {"pose_frame": (48, 32), "output_type": "pil", "generator": None}
    assert [image.size for image in generate(pixels, images, **options)] == [(40, 60), (30, 50)]
    wanted = generate(pixels, images, height=70, width=20, **options)
    assert [image.size for image in wanted] == [(20, 70), (20, 70)]


def test_images_of_several_sizes_take_one_drawing(pixels):
    drawing = draw_skeleton(np.floor(SECOND.keypoints), (48, 32), (192, 128))
    images = generate(pixels, [FIRST.image, FIRST.image[:40]], drawing, output_type="pil")
    assert [image.size for image in images] == [(32, 48), (32, 40)]


def test_a_pose_frame_scales_keypoints(pixels):
    keypoints = SECOND.keypoints * np.float32([4, 4, 1])
    assert (
        difference(generate(pixels, pose=keypoints, pose_frame=(192, 128)), generate(pixels)) == 0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 64}, "give both or neither"),
        ({"height": 0, "width": 5}, "height is 0; give a whole number"),
        ({"num_inference_steps": -1}, "num_inference_steps is -1; give a whole number"),
        ({"pose_guidance_scale": float("nan")}, "pose_guidance_scale is nan; give a finite"),
        ({"appearance_guidance_scale": float("inf")}, "appearance_guidance_scale is inf"),
        ({"output_type": "jpg"}, "choose one of"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"is \['noise'\]; give a list of"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "is 'latents'; give a list of"),
        ({"pose": [SECOND.keypoints] * 3, "image": [FIRST.image] * 2}, "2 images and 3 poses"),
        ({"pose": []}, "1 images and 0 poses"),
        ({"generator": [generator()] * 2}, "2 generators for 1 results"),
        ({"latents": torch.zeros(1, 1, 8, 8)}, r"latents are \(1, 1, 8, 8\), expected a tensor of"),
        (
            {"image": [FIRST.image, FIRST.image[:40]], "pose_frame": (48, 32)},
            "do not fit one array: give height and width",
        ),
    ],
)
def test_wrong_arguments_are_refused(pixels, options, message):
    with pytest.raises(ValueError, match=message):
        generate(pixels, **options)


@pytest.mark.slow
def test_a_model_that_knows_one_pair_reproduces_it(micro, build, tmp_path):
    """From training through saving to the picture: channel order, ranges, poses and sizes."""
    config = replace(micro["pixels"], unet=replace(micro["pixels"].unet, is_frozen=False))
    model, codec = build(config).train(), build_codec(config.codec)
    figures = [FIRST, SECOND]
    poses = [FramedPose(figure.keypoints, (48, 32)) for figure in figures]
    images = read_sources([figure.image for figure in figures], config.image_size)
    source, pose_maps = images[:1], draw_poses(poses, config.pose_map_size)
    rows = {"source": source, "pose_maps": pose_maps, "latents": codec.encode(images)}
    rows = {name: tensor.repeat_interleave(4, dim=0) for name, tensor in rows.items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=400)
    random = generator()
    for _ in range(400):
        draws = draw_rows([random] * 4, rows["latents"].shape[1:])
        optimizer.zero_grad()
        model(TrainingBatch(**rows, draws=draws)).mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
    CFLDPipeline.from_model(model.eval(), codec).save_pretrained(tmp_path)
    options = {"num_inference_steps": 10, "height": 32, "width": 32, "pose_guidance_scale": 1.0}
    options |= {"appearance_guidance_scale": 1.0, "output_type": "pil"}
    found = generate(load(tmp_path), pose=[figure.keypoints for figure in figures], **options)
    targets = [resize_image(figure.image, (32, 32)).astype(float) for figure in figures]
    assert np.abs(targets[0] - targets[1]).mean() > 36
    for image, target in zip(found, targets, strict=True):
        assert np.abs(np.asarray(image) - target).mean() < 12
