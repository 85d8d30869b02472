"""Several documents in one row: what keeps them apart in attention, positions and the experts' balance."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of packed rows [B, T].

    number    int64 [B, T], distinct over the whole batch; padding has its row's own last number
    position  int64 [B, T], from 0 at each document's start
    count     an upper bound of the numbers
    branch    int64 [B, T], of documents that go on in several ways: which one, 0 in the beginning that all of them read
    """

    number: Tensor
    position: Tensor
    count: int
    branch: Tensor | None = None

    @classmethod
    def of(cls, index: Tensor, most: int) -> Self:
        """From `index` [B, T], a document's number in its own row (ascending, -1 at padding); a row has <= `most`."""
        rows, length = index.shape
        column = torch.arange(length, device=index.device).expand(rows, -1)
        begins = torch.ones_like(index, dtype=torch.bool)
        begins[:, 1:] = index[:, 1:] != index[:, :-1]
        start = torch.where(begins, column, 0).cummax(dim=1).values
        row = torch.arange(rows, device=index.device)[:, None] * (most + 1)
        return cls(row + torch.where(index < 0, most, index), column - start, rows * (most + 1))

    @cached_property
    def together(self) -> Tensor:
        """Which tokens may be read together with one: bool [B, T, T], those of its document, of its own branch and the
        common beginning. Padding belongs together, so that no row is empty."""
        same = self.number[:, :, None] == self.number[:, None, :]
        if self.branch is None:
            return same
        read = self.branch[:, None, :]
        return same & ((self.branch[:, :, None] == read) | (read == 0))

    @cached_property
    def causal(self) -> Tensor:
        """Which earlier tokens of its own document a token may read, itself included: bool [B, T, T]."""
        return self.together.tril()
