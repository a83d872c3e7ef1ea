"""A saved accelerator: what is written, and on which ranks it can be read."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from lightning_stableaa.core.smoothing import MovingAverage
from lightning_stableaa.distributed.communicator import Communicator
from lightning_stableaa.distributed.dtensor import sharding_spec
from lightning_stableaa.distributed.sharding import gather_state, shard_state
from lightning_stableaa.model.iterates import IterateStore
from lightning_stableaa.options import Options

STATE_VERSION = 3

FULL = "full"  # vectors are complete, whatever the number of ranks was

EMPTY: dict[str, Any] = {"shard": None, "fingerprint": None, "iterates": None, "average": None}

_SHARDING = "sharding of the weights"
_VECTORS = ("iterates", "average")


def check_version(state: dict[str, Any]) -> None:
    """Refuse a state of another version, or of something else.

    Raises:
        ValueError: names both.
    """
    if "version" not in state:
        raise ValueError("the state has no version: it is none of an AndersonAccelerator")
    if state["version"] != STATE_VERSION:
        raise ValueError(
            f"the accelerator state has version {state['version']}, this package reads version "
            f"{STATE_VERSION}: install the version of lightning-stableaa that wrote it, or drop "
            "the state"
        )


def save(iterates: IterateStore, average: MovingAverage | None, options: Options) -> dict[str, Any]:
    """This rank's vectors on the CPU; those of a replicated history are all there are."""
    return {
        "shard": _shard(iterates),
        "fingerprint": _fingerprint(iterates, options),
        "iterates": iterates.state_dict(),
        "average": None if average is None else average.state_dict(),
    }


def gather_full(saved: dict[str, Any], iterates: IterateStore) -> dict[str, Any]:
    """The vectors of all ranks, on the first one; a collective call if they are sharded."""
    holders, device = _holders(iterates), iterates.weights.device
    full = gather_state(
        {name: saved[name] for name in _VECTORS},
        length=iterates.full_length,
        communicator=holders,
        device=device,
    )
    if iterates.sharded_weights:
        fingerprint = saved["fingerprint"]
        checksum = torch.tensor(fingerprint["weights"], device=device)
        parts = [int(one) for one in holders.gather_to_first(checksum)]
        full["fingerprint"] = fingerprint | {"weights": parts}
    return saved | full | {"shard": FULL}


def load(
    saved: dict[str, Any],
    iterates: IterateStore,
    average: MovingAverage | None,
    options: Options,
) -> list[str]:
    """Fill ``iterates`` and ``average``, on all ranks or on none; a collective call.

    Returns:
        What does not match; empty where the vectors were loaded.
    """
    communicator = iterates.communicator
    expected, found = _fingerprint(iterates, options), saved["fingerprint"]
    full = saved["shard"] == FULL
    if iterates.sharded_weights and full and found[_SHARDING] == expected[_SHARDING]:
        found = found | {"weights": found["weights"][communicator.rank]}
    different = [name for name in expected if found.get(name) != expected[name]]
    if not full and saved["shard"] != _shard(iterates):
        different.append("rank or number of ranks")
    if communicator.any(bool(different), iterates.weights.device):
        return different or ["state on another rank"]
    vectors = {name: saved[name] for name in _VECTORS}
    if full:
        vectors = shard_state(
            vectors,
            start=iterates.full_start,
            length=iterates.length,
            communicator=_holders(iterates),
        )
    iterates.load_state_dict(vectors["iterates"])
    if average is not None:
        average.load_state_dict(vectors["average"])
    return []


def _fingerprint(iterates: IterateStore, options: Options) -> dict[str, Any]:
    """What must be equal for a stored history to be continued."""
    smoothing = options.smoothing
    return {
        "parameter layout": iterates.weights.signature(),
        "weights": iterates.weights.checksum(),
        _SHARDING: sharding_spec(iterates.parameters, iterates.communicator),
        "history_depth": options.history_depth,
        "store_every_n_steps": options.store_every_n_steps,
        "smoothing": None if smoothing is None else dataclasses.asdict(smoothing),
    }


def _holders(iterates: IterateStore) -> Communicator:
    """The ranks that hold shards of the vectors; a single process where each holds all."""
    return iterates.communicator if iterates.sharded else Communicator.single_process()


def _shard(iterates: IterateStore) -> list[int]:
    """Which shard of the vectors this rank holds: rank, and number of ranks."""
    holders = _holders(iterates)
    return [holders.rank, holders.world_size]
