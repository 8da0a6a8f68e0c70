# SPDX-License-Identifier: Apache-2.0
"""Staged models whose logits do not depend on the rows beside them, to the last bit."""

import torch
from torch import nn

from tests.cases import generator


class Lookup(nn.Module):
    """Stage k answers row x with row x of a table; features travel in a nest of tensors."""

    def __init__(self, table, k, nested):
        super().__init__()
        self.register_buffer("table", table)
        self.k, self.nested, self.seen = k, nested, []

    def forward(self, features, logits):
        x = features["rows"][0] if isinstance(features, dict) else features
        self.seen.append(len(x))
        assert all(len(z) == len(x) for z in logits), "logits travel with their rows"
        for j, z in enumerate(logits):
            torch.testing.assert_close(z, self.others[j][x], rtol=0, atol=0, equal_nan=True)
        image = torch.zeros(len(x), 2, 3, 3).to(memory_format=torch.channels_last)
        state = {"rows": (x, x.float()[:, None]), "image": [image], "level": self.k}
        return (state if self.nested else x), [*logits, self.table[x]]


class Table(nn.Module):
    """K stages over a table of logits [K, rows, C]."""

    def __init__(self, tables, nested=False):
        super().__init__()
        self.stages = nn.ModuleList(Lookup(t, k, nested) for k, t in enumerate(tables))
        for stage in self.stages:
            stage.others = list(tables)

    @property
    def seen(self):
        return [stage.seen for stage in self.stages]


def tables(exits, rows, classes, seed, scale=2.0):
    return scale * torch.randn(exits, rows, classes, generator=generator(seed))
