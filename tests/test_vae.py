"""The autoencoder against the published class (diffusers' AutoencoderKL): names of parameters and outputs."""

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from export.modules.vae import Autoencoder, VAEDecoder, VAEEncoder

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(("channels", "layers", "groups"), [([16, 32, 32], 1, 8), ([32, 32, 64, 64], 2, 32)])
def test_names_and_outputs_are_those_of_the_published_autoencoder(
    channels: list[int], layers: int, groups: int
) -> None:
    diffusers = pytest.importorskip("diffusers", reason="compares with the dev extra")
    config = {
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "latent_channels": 4,
    }
    torch.manual_seed(0)
    published = diffusers.AutoencoderKL.from_config(config).eval()
    ours = Autoencoder(config)
    ours.load_state_dict(published.state_dict())  # strict: no name missing, none left over
    image = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        mean, logvar = VAEEncoder(ours)(image)
        posterior = published.encode(image).latent_dist
        torch.testing.assert_close(mean, posterior.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(logvar, posterior.logvar, rtol=0, atol=1e-5)
        torch.testing.assert_close(VAEDecoder(ours)(mean), published.decode(mean).sample, rtol=0, atol=5e-5)


def test_an_autoencoder_without_attention_is_refused() -> None:
    config = {"block_out_channels": [32], "mid_block_add_attention": False}
    with pytest.raises(ValueError, match="mid_block_add_attention is False; supported: True"):
        Autoencoder(config)
