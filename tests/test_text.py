"""Text encoders in half precision: sums beyond its range, and how they are computed where the CPU is slow in it."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from export import parity
from export.demo import cascade
from export.modules.text import T5FeedForward

pytestmark = pytest.mark.torch


def test_sums_beyond_float16_come_out_whole() -> None:
    layer = T5FeedForward(8, 4096)
    for linear, weight in ((layer.wi_0, 1.0), (layer.wi_1, 1.0), (layer.wo, 0.5)):
        torch.nn.init.constant_(linear.weight, weight)
    x = torch.ones(1, 2, 8)
    with torch.no_grad():
        exact = layer(x)
        assert exact.min() > torch.finfo(torch.float16).max
        torch.testing.assert_close(layer.half()(x.half()), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("network", ["t5", "clip"])
def test_large_weights_are_converted_while_their_layer_runs(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all of the published size are, and none of the small ones."""
    torch.manual_seed(0)
    encoder = cascade.make_network(network).half().eval()
    ids = (torch.arange(7)[None], *((torch.ones(1, 7, dtype=torch.int64),) if network == "t5" else ()))
    with torch.no_grad():
        exact = copy.deepcopy(encoder).float()(*ids)
        monkeypatch.setattr(parity, "_SMALL", 0)
        before = dict(encoder.named_parameters())
        with parity._computing_in_float32(encoder):
            torch.testing.assert_close(encoder(*ids).float(), exact)
            after = dict(encoder.named_parameters())
            assert all(after[name] is parameter for name, parameter in before.items()), "one at a time"
