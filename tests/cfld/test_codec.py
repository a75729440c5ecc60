import pytest
import torch

from cfld.codec import CodecConfig, build_codec

VAE = CodecConfig(channels=(8, 8), factor=2, layers_per_block=1, num_groups=4, pretrained=None)


def images(count=2, size=16):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, size, size, generator=generator) * 2 - 1


def test_pixels_come_back_exactly():
    codec = build_codec(CodecConfig(kind="pixels", factor=4, pretrained=None))
    levels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    latents = codec.encode(levels / 127.5 - 1)
    assert latents.shape == (1, 48, 4, 4)
    decoded = ((codec.decode(latents) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(decoded, levels)


@pytest.mark.parametrize(
    "config", [VAE, CodecConfig(kind="pixels", factor=4, pretrained=None)], ids=["vae", "pixels"]
)
def test_stored_moments_give_the_same_latents(config):
    codec = build_codec(config)
    direct = codec.encode(images(), torch.Generator().manual_seed(3))
    stored = codec.moments(images())
    assert stored.shape[1] == 2 * config.latent_channels == 2 * direct.shape[1]
    torch.testing.assert_close(codec.sample(stored, torch.Generator().manual_seed(3)), direct)
    half = codec.sample(stored.to(torch.float16), torch.Generator().manual_seed(3))
    torch.testing.assert_close(half.float(), direct, atol=2e-3, rtol=2e-3)


def test_each_image_can_have_its_generator():
    codec = build_codec(VAE)
    together = codec.encode(images(), [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    alone = codec.encode(images()[1:], [torch.Generator().manual_seed(2)])
    torch.testing.assert_close(together[1:], alone, atol=1e-6, rtol=1e-5)


def test_vae_is_frozen_scaled_and_decodes():
    codec = build_codec(VAE)
    assert not any(parameter.requires_grad for parameter in codec.parameters())
    moments = torch.cat([torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), -30.0)], dim=1)
    latents = codec.sample(moments, torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents, torch.full((1, 4, 8, 8), 0.18215), atol=1e-5, rtol=0)
    expected = codec.vae.decode(latents / 0.18215).sample
    torch.testing.assert_close(codec.decode(latents), expected)


def test_vae_loads_from_a_local_folder(tmp_path):
    saved = build_codec(VAE)
    saved.vae.save_pretrained(tmp_path / "vae")
    loaded = build_codec(
        CodecConfig(channels=(8, 8), factor=2, num_groups=4, pretrained=str(tmp_path))
    )
    for found, expected in zip(loaded.parameters(), saved.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"codec\.kind is 'jpeg'; choose one of"):
        CodecConfig(kind="jpeg")
    with pytest.raises(ValueError, match=r"codec\.factor 4 does not fit 4 levels.*set it to 8"):
        CodecConfig(factor=4)
