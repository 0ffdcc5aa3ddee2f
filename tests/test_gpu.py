"""The same step on a GPU; `make test-gpu`."""

import pytest
import torch

from c2r.config import TrainConfig
from c2r.neighbors import nearest_neighbors
from c2r.train.run import Run
from test_methods import METHODS, TREE, configured

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", list(METHODS))
def test_a_gpu_trains_as_a_cpu_does(method: str) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        train = TrainConfig(tokens=2560, batch=256, precision="float32", lr=1e-3)
        run = Run(configured(method, c2r={"strength": 0.3}), train, TREE.d_in, device=device)
        generator, scale = torch.Generator().manual_seed(0), TREE.scale()
        measured = [run.step((TREE.sample(256, generator).x_BD / scale).to(device))["loss"].item() for _ in range(10)]
        losses[device] = measured
        assert run.export().W_dec.device.type == device
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


def test_neighbours_on_a_gpu() -> None:
    decoder = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(nearest_neighbors(decoder.cuda()).cosine.cpu(), nearest_neighbors(decoder).cosine)
