"""A saved engine: what is written, by which versions and on which ranks it can be read."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from lightning_stableaa.distributed import Communicator
from lightning_stableaa.dtensors import division
from lightning_stableaa.options import Options
from lightning_stableaa.points import PointStore
from lightning_stableaa.sharding import cut, gather
from lightning_stableaa.smoother import Smoother

log = logging.getLogger(__name__)

STATE_VERSION = 2

_DIVISION = "division of the weights among processes"

WHOLE = "whole"  # vectors are complete, whatever the number of ranks was

NOTHING: dict[str, Any] = {
    "shard": None,
    "fingerprint": None,
    "points": None,
    "smoother": None,
    "evaluation": None,
    "disturbed": False,
    "recent_losses": None,
    "look_ahead": None,
}


def checked(state: dict[str, Any]) -> dict[str, Any]:
    """The state without vectors that an earlier version stored otherwise, and a warning then.

    Raises:
        ValueError: the state was written by a newer version of this package.
    """
    if state["version"] > STATE_VERSION:
        raise ValueError(
            f"the accelerator state has version {state['version']}, this package reads up to "
            f"{STATE_VERSION}: update lightning-stableaa, or drop the state"
        )
    if state["version"] < STATE_VERSION:
        log.warning(
            "the Anderson history of the checkpoint was dropped and starts anew: "
            "it was stored by an earlier version of lightning-stableaa"
        )
        return state | NOTHING
    return state


def save(
    points: PointStore, smoother: Smoother | None, options: Options, *, evaluation: bool
) -> dict[str, Any]:
    """This rank's vectors on the CPU; those of a replicated history are all there are.

    Args:
        points: the history.
        smoother: statistics of the open window; ``None`` where nothing is smoothed.
        options: those of the engine.
        evaluation: whether ``points.candidate`` is an accepted one for evaluation.
    """
    length = points.length if points.split else points.weights.length
    return {
        "shard": _shard(points),
        "fingerprint": _fingerprint(points, options),
        "points": points.state_dict(),
        "smoother": None if smoother is None else smoother.state_dict(),
        "evaluation": points.candidate[:length].to("cpu", copy=True) if evaluation else None,
    }


def make_whole(saved: dict[str, Any], points: PointStore) -> dict[str, Any]:
    """The vectors of all ranks, on the first one; a collective call if they are sharded."""
    if saved["points"] is None or saved["shard"] == WHOLE:
        return saved
    whole = gather(
        {name: saved[name] for name in _vectors(points)},
        length=points.whole_length,
        communicator=points.communicator if points.sharded else Communicator.alone(),
        device=points.weights.device,
    )
    if points.split:
        fingerprint = saved["fingerprint"]
        checksum = torch.tensor(fingerprint["set of weights"], device=points.weights.device)
        parts = [int(one) for one in points.communicator.to_first(checksum)]
        whole["fingerprint"] = fingerprint | {"set of weights": parts}
    return saved | whole | {"shard": WHOLE}


def load(
    saved: dict[str, Any], points: PointStore, smoother: Smoother | None, options: Options
) -> list[str]:
    """Fill ``points`` and ``smoother``, on all ranks or on none.

    Returns:
        What stands against it; empty where the vectors were loaded. A collective call.
    """
    communicator = points.communicator
    different = ["state on another rank"]
    with communicator.in_step():
        different = _differences(saved, points, options)
    if communicator.any(bool(different), points.weights.device):
        return different or ["state on another rank"]
    with communicator.in_step():
        _fill(points, smoother, saved)
    return []


def _differences(saved: dict[str, Any], points: PointStore, options: Options) -> list[str]:
    expected, found = _fingerprint(points, options), saved["fingerprint"] or {}
    if points.split and saved["shard"] == WHOLE and found.get(_DIVISION) == expected[_DIVISION]:
        parts = found["set of weights"]
        found = found | {"set of weights": parts[points.communicator.rank]}
    different = [name for name in expected if found.get(name) != expected[name]]
    if saved["shard"] not in (WHOLE, _shard(points)):
        different.append("rank or number of ranks")
    return different


def _fill(points: PointStore, smoother: Smoother | None, saved: dict[str, Any]) -> None:
    vectors = {name: saved[name] for name in _vectors(points)}
    if saved["shard"] == WHOLE:
        vectors = cut(
            vectors,
            start=points.whole_start,
            length=points.length,
            communicator=points.communicator if points.sharded else None,
        )
    points.load_state_dict(vectors["points"])
    if smoother is not None:
        smoother.load_state_dict(vectors["smoother"])
    candidate = vectors.get("evaluation", saved["evaluation"])
    if candidate is not None:
        points.candidate[: len(candidate)].copy_(candidate)


def _vectors(points: PointStore) -> list[str]:
    """Of what this rank may hold but a part; a candidate that was gathered is whole."""
    return ["points", "smoother", "evaluation"] if points.split else ["points", "smoother"]


def _fingerprint(points: PointStore, options: Options) -> dict[str, Any]:
    """What must be equal for a stored history to be continued."""
    smoothing = options.smoothing
    return {
        "parameter layout": points.weights.signature(),
        "set of weights": points.weights.checksum(),
        _DIVISION: division(points.parameters, points.communicator),
        "history_depth": options.history_depth,
        "store_every_n_steps": options.store_every_n_steps,
        "optimizer_state": options.optimizer_state == "mix",
        "smoothing": None if smoothing is None else dataclasses.asdict(smoothing),
    }


def _shard(points: PointStore) -> list[int]:
    """Which slice of the vectors this rank holds: rank, and number of ranks."""
    communicator = points.communicator
    return [communicator.rank, communicator.world_size] if points.sharded else [0, 1]
