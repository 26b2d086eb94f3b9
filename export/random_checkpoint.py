"""Small checkpoints of random weights in the published format: something to build and run where the real ones are not.

Nothing is learned: the videos are noise in colour.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from engines.errors import OutputError
from export.demo.cascade import NETWORKS, make_network, save_network, save_rest
from export.modules.vae import VAEDecoder


def random_checkpoint(out: Path, seed: int = 0) -> None:
    """Write the checkpoint folders base, interpolation, if2, sr1 and sr2 below `out`, which must not exist."""
    if out.exists():
        raise OutputError(f"{out} exists. Choose a new folder for --out.")
    torch.manual_seed(seed)
    for name in NETWORKS:
        module = _initialised(make_network(name))
        if name == "vae":
            _raise_contrast(VAEDecoder(module), module.decoder.conv_out)
        save_network(out, name, module)
    save_rest(out)


def _initialised(module: Any) -> Any:
    """Default weights; matrices and filters rounded to 11 levels, which pack to a quarter and are exact in float16."""
    for value in module.eval().requires_grad_(False).parameters():
        if value.ndim > 1 and value.any():
            step = (value.std() * 0.6).half().float()
            value.copy_((value / step).round().clamp(-5, 5) * step)
    return module


def _raise_contrast(decoder: nn.Module, last: nn.Conv2d) -> None:
    """Scale the last layer so that pictures spread over [-1, 1]; untrained ones are all but grey."""
    with torch.no_grad():
        spread = decoder(torch.randn(1, 4, 16, 16)).std()
        last.weight *= 0.5 / spread
        last.bias.zero_()
