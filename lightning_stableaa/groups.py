"""Ranks in groups, each of which puts together another vector of which every rank has a slice."""

from __future__ import annotations

import functools
from bisect import bisect_right

import torch
from torch import Tensor

from lightning_stableaa.distributed import Communicator


class RankGroups:
    """All ranks in L groups, as equal as can be.

    Of consecutive ranks, so that few nodes belong to two groups: what a group gathers passes
    through the network once for every node of it, not once for every rank.

    Args:
        communicator: all ranks, at least L.
        count: L, groups.
    """

    def __init__(self, communicator: Communicator, count: int) -> None:
        self._communicator = communicator
        ranks = communicator.world_size
        self._starts = [ranks * group // count for group in range(count + 1)]
        self.own = bisect_right(self._starts, communicator.rank) - 1  # index of this rank's group
        self.share = self._size(self.own) / ranks  # of all ranks, that are in this group

    def gather(self, slices: Tensor, whole: Tensor, device: torch.device) -> None:
        """Complete ``whole`` with the vector of this rank's group, one of L.

        First every rank of a group is sent the slices that make up an equal part of the vector,
        about L n/P elements; then the group gathers its parts.

        Args:
            slices: (L, n/P), this rank's equal slice of every vector.
            whole: (n + P,) or longer; the vector, and after it what pads the parts.
            device: where the process group communicates.
        """
        length, rank = slices.shape[1], self._communicator.rank
        total = length * self._communicator.world_size
        sent: dict[int, Tensor] = {}
        low = rank * length
        for group, row in enumerate(slices):
            width = self._width(group, total)
            for member in range(low // width, -(-(low + length) // width)):
                start, end = max(low, member * width), min(low + length, (member + 1) * width)
                sent[self._starts[group] + member] = row[start - low : end - low]
        width = self._width(self.own, total)
        low = (rank - self._starts[self.own]) * width
        high = min(low + width, total)
        received = {
            peer: whole[max(low, peer * length) : min(high, (peer + 1) * length)]
            for peer in range(low // length, -(-high // length))
        }
        self._communicator.exchange(sent, received, device)
        self._together.gather(whole[: self._size(self.own) * width], device)

    def _size(self, group: int) -> int:
        return self._starts[group + 1] - self._starts[group]

    def _width(self, group: int, total: int) -> int:
        """Elements of a part; the last overhangs."""
        return -(-total // self._size(group))

    @functools.cached_property
    def _together(self) -> Communicator:
        return self._communicator.among(range(self._starts[self.own], self._starts[self.own + 1]))
