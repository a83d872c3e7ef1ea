"""Running statistics of batch normalisation after the weights have jumped.

An extrapolation moves the weights and leaves ``running_mean`` and ``running_var`` where the
optimizer's path had brought them, so evaluation mode no longer describes the network. A few forward
passes on training batches mend that.
"""

from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_stableaa.random_state import RandomState

Batch = TypeVar("Batch")


def batch_norm_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that keep running statistics, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    }


@torch.no_grad()
def recalibrate_batch_norm(
    module: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Batch], object],
    *,
    trained: Collection[nn.Module] | None = None,
) -> int:
    """Replaces running statistics by the plain average over ``batches``.

    The module computes as it is trained meanwhile; its modes, the momentum of each layer and the
    random state are as before when the function returns or raises, and the old statistics come
    back when it raises. It costs one forward pass a batch. Every rank of a distributed run
    averages its own batches, with ``SyncBatchNorm`` those of all.

    Args:
        module: network with layers of ``BatchNorm*d`` or ``SyncBatchNorm``.
        batches: training batches, on the device of the module.
        forward: runs the network on one batch; what it returns is not used.
        trained: those of its modules that are in training mode when it is trained; ``None`` is all
            of them. Layers that are kept in evaluation mode keep their statistics as well.

    Returns:
        The number of layers that may be; without any, ``batches`` is not touched. One that
        ``forward`` does not reach keeps its statistics.

    Raises:
        ValueError: ``batches`` is empty.

    Source: as torch.optim.swa_utils.update_bn (Izmailov et al. 2018, Averaging Weights Leads to
    Wider Optima and Better Generalization, section 3.2).
    """
    if trained is None:
        trained = set(module.modules())
    layers = [one for one in batch_norm_layers(module).values() if one in trained]
    if not layers:
        return 0
    modes = [(child, child.training) for child in module.modules()]
    momenta = [layer.momentum for layer in layers]
    before = [{k: v.clone() for k, v in layer.named_buffers()} for layer in layers]
    # dropout and mixup draw random numbers, which would shift those of the training that goes on
    random = RandomState(next(module.parameters(), torch.empty(0)).device)
    try:
        for child, _ in modes:
            child.training = child in trained
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # torch's way to ask for a cumulative average
        count = 0
        for batch in batches:
            forward(batch)
            count += 1
        if count == 0:
            raise ValueError("batches is empty; running statistics need at least one batch")
        for layer, statistics in zip(layers, before, strict=True):
            if layer.num_batches_tracked == 0:
                _put_back(layer, statistics)
    except BaseException:
        for layer, statistics in zip(layers, before, strict=True):
            _put_back(layer, statistics)
        raise
    finally:
        random.restore()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for child, mode in modes:
            child.training = mode
    return len(layers)


def _put_back(layer: _BatchNorm, statistics: dict[str, torch.Tensor]) -> None:
    for name, buffer in layer.named_buffers():
        buffer.copy_(statistics[name])
