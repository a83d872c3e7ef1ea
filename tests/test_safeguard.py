import pytest
import torch
from torch import nn
from torchmetrics import CatMetric, MeanMetric

from lightning_stableaa import MiniBatchLoss
from lightning_stableaa.safeguard import loss_value, undo_side_effects

CPU = torch.device("cpu")


def test_a_loss_is_a_detached_float64_scalar_with_gradients_enabled() -> None:
    x = torch.ones(3, requires_grad=True)

    def loss() -> torch.Tensor:
        (slope,) = torch.autograd.grad((x**2).sum(), x, create_graph=True)  # as a PINN does
        return slope.sum().reshape(1)

    with torch.no_grad():
        value = loss_value(loss, CPU)
    assert (value.item(), value.dtype, value.shape) == (6.0, torch.float64, ())
    assert not value.requires_grad
    assert x.grad is None


def test_no_loss_is_nan() -> None:
    assert loss_value(lambda: None, CPU).isnan()  # type: ignore[arg-type,return-value]


def test_a_loss_that_is_not_reduced_is_refused() -> None:
    with pytest.raises(ValueError, match=r"single number, got shape \(2,\); reduce it with"):
        loss_value(lambda: torch.zeros(2), CPU)


@pytest.mark.parametrize("loss", [{"loss": torch.zeros(())}, "0.5"])
def test_what_is_no_number_is_refused(loss: object) -> None:
    with pytest.raises(ValueError, match=f"single number, got a {type(loss).__name__}: give it"):
        loss_value(lambda: loss, CPU)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("trained", [0.5, torch.tensor([0.5], requires_grad=True)])
def test_the_loss_of_training_is_a_number_of_any_kind(trained: torch.Tensor | float) -> None:
    known = MiniBatchLoss(lambda: torch.zeros(()), trained).training_loss
    assert repr(known) == "tensor(0.5000)", "one number, without a graph"
    with pytest.raises(ValueError, match=r"single number, got shape \(2,\)"):
        _ = MiniBatchLoss(lambda: torch.zeros(()), torch.zeros(2)).training_loss


def test_buffers_and_metrics_are_restored_also_after_an_error() -> None:
    norm, mean, values = nn.BatchNorm1d(2), MeanMetric(), CatMetric()
    module = nn.ModuleList([norm, mean, values])
    mean.update(1.0)
    values.update(torch.tensor([1.0]))
    buffers = [buffer.clone() for buffer in module.buffers()]

    def train_and_fail() -> None:
        with undo_side_effects(module):
            norm(torch.randn(8, 2))
            mean(5.0)
            values(torch.tensor([7.0]))
            assert not torch.equal(next(module.buffers()), buffers[0])
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        train_and_fail()
    for buffer, before in zip(module.buffers(), buffers, strict=True):
        assert torch.equal(buffer, before)
    assert (mean.compute().item(), mean.update_count) == (1.0, 1)
    assert (values.compute().tolist(), values.update_count) == (1.0, 1)


@pytest.mark.parametrize("error", [RuntimeError("can't allocate memory"), MemoryError()])
def test_a_loss_without_room_is_nan_unless_others_wait_within_it(error: Exception) -> None:
    def loss() -> torch.Tensor:
        raise error

    assert loss_value(loss, CPU).isnan()
    with pytest.raises(RuntimeError, match="ran out of memory within a forward pass in which"):
        loss_value(loss, CPU, collective=True)


def test_a_cached_metric_value_is_not_the_candidates() -> None:
    metric = MeanMetric()
    module = nn.ModuleDict({"mean": metric})
    metric.update(1.0)
    with undo_side_effects(module):
        metric.update(3.0)
        assert metric.compute().item() == 2.0
    assert metric.compute().item() == 1.0
