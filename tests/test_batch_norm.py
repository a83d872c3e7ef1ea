import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn

from lightning_stableaa.batch_norm import recalibrate_batch_norm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 16),
        nn.BatchNorm1d(16, momentum=0.1),
        nn.ReLU(),
        nn.Linear(16, 3),
        nn.BatchNorm1d(3, momentum=0.3, affine=False),
    )


def batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, generator=generator) * (k + 1) for k in range(count)]


def test_statistics_are_those_of_update_bn():
    ours, theirs = network(), network()
    assert recalibrate_batch_norm(ours, batches(), ours) == 2
    update_bn([(batch,) for batch in batches()], theirs)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    assert ours[1].num_batches_tracked == 4


def test_one_layer_gets_the_mean_over_the_batches():
    layer = nn.BatchNorm1d(4)
    recalibrate_batch_norm(layer, batches(), layer)
    means = torch.stack([batch.mean(dim=0) for batch in batches()])
    variances = torch.stack([batch.var(dim=0) for batch in batches()])
    assert layer.running_mean is not None
    assert layer.running_var is not None
    # a running average of four numbers in single precision, against their sum
    assert torch.allclose(layer.running_mean, means.mean(dim=0), rtol=1e-5, atol=1e-6)
    assert torch.allclose(layer.running_var, variances.mean(dim=0), rtol=1e-5)


def test_modes_momenta_weights_and_random_state_are_left_alone():
    inner = network()
    module = nn.Sequential(inner, nn.Dropout(0.5)).eval()
    inner[2].train()  # a mixed state must come back mixed
    weights = [p.clone() for p in module.parameters()]
    before = torch.get_rng_state()
    recalibrate_batch_norm(module, batches(), module)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in module.modules()] == [m is inner[2] for m in module.modules()]
    assert [inner[i].momentum for i in (1, 4)] == [0.1, 0.3]
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), weights, strict=True))
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_failing_forward_pass_changes_nothing(fails_at):
    module = network().eval()
    module(batches()[0])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    seen = []

    def forward(batch):
        if len(seen) == fails_at:
            raise RuntimeError("out of memory")
        seen.append(batch)
        return module(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        recalibrate_batch_norm(module, batches(), forward)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [module[i].momentum for i in (1, 4)] == [0.1, 0.3]
    assert not any(child.training for child in module.modules())


def test_a_layer_that_is_not_reached_keeps_its_statistics():
    module = network()
    module(batches()[0] + 1.0)
    first, last = module[1], module[4]
    before = {name: value.clone() for name, value in last.named_buffers()}
    recalibrate_batch_norm(module, batches(), module[:3])
    assert first.num_batches_tracked == 4
    assert all(torch.equal(value, before[name]) for name, value in last.named_buffers())
    assert before["num_batches_tracked"] == 1


def test_no_batches_are_refused():
    module = network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="batches is empty"):
        recalibrate_batch_norm(module, [], module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_networks_without_running_statistics_see_no_batch():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    assert recalibrate_batch_norm(module, iter([]), module) == 0


def test_validation_right_after_a_large_jump_improves():
    """Twenty times the last step: the weights are good, the statistics belong to the old ones."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 4, generator=generator) + 2
    labels = (inputs[:, 0] > inputs[:, 1]).long()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    previous = []
    for _ in range(5):
        previous = [p.detach().clone() for p in module.parameters()]
        optimizer.zero_grad()
        cross_entropy(module(inputs), labels).backward()
        optimizer.step()
    with torch.no_grad():
        for p, q in zip(module.parameters(), previous, strict=True):
            p.add_(p - q, alpha=20)

    def loss() -> float:
        with torch.no_grad():
            return cross_entropy(module(inputs), labels).item()

    module.eval()
    stale = loss()
    recalibrate_batch_norm(module, inputs.split(128), module)
    fresh = loss()
    # measured: 0.85 and 0.13
    assert fresh < 0.25 * stale
    module.train()  # statistics of the batch itself, which are never stale
    assert fresh == pytest.approx(loss(), abs=0.01)
