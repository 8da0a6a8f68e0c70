# SPDX-License-Identifier: Apache-2.0
"""Inputs for the tests of the ops: logits of every kind and layout, and hypothesis strategies."""

from __future__ import annotations

import hypothesis
import torch
from hypothesis import strategies as st

from tests.oracle import Problem

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CLASSES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 257)
KINDS = ("random", "confident", "near", "masked", "masked_some", "minus_1e4")
LAYOUTS = ("contiguous", "transposed", "expanded", "slice", "columns", "stacked")
PAIRS = (None, "mutual", "last", "deeper", "next", "matrix", "rows")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "soft_ce")

property_test = hypothesis.settings(
    deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # a case is small as it is
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def make_logits(kind, shape, dtype, seed=0):
    """K tensors [N, C] of one kind; every row keeps a class that is not masked."""
    exits, rows, classes = shape
    g = generator(seed)
    z = 2.0 * torch.randn(exits, rows, classes, generator=g, dtype=torch.float64)
    if kind == "near":
        z = z[:1] + 2e-3 * z
    if kind == "confident" and rows:
        best = torch.randint(classes, (exits, rows, 1), generator=g)
        z = z.scatter_add(-1, best, torch.full_like(z[..., :1], 25.0))
    if kind.startswith("m"):
        hidden = torch.rand(z.shape, generator=g) < 0.3
        hidden = hidden[:1].expand_as(hidden) if kind == "masked" else hidden
        if kind == "masked_some":
            hidden = hidden & (torch.arange(exits) % 2 == 0)[:, None, None]
        hidden = hidden.clone()
        hidden[..., classes // 2] = False
        z = z.masked_fill(hidden, -1e4 if kind == "minus_1e4" else -torch.inf)
    return [x.to(dtype) for x in z.unbind(0)]


def lay_out(z, layout):
    """The same values as another kind of view, each exit by itself."""
    rows, classes = z.shape
    if layout == "transposed":
        return z.t().contiguous().t()
    if layout == "slice":  # rows further apart than they are long
        wide = z.new_full((rows, classes + 3), 77.0)
        wide[:, 1 : classes + 1] = z
        return wide[:, 1 : classes + 1]
    if layout == "columns":  # every second column
        wide = z.new_full((rows, 2 * classes), 77.0)
        wide[:, ::2] = z
        return wide[:, ::2]
    if layout == "expanded":  # one row, stride 0
        return z[:1].contiguous().expand(rows, classes) if rows else z
    return z.contiguous()


class Case:
    """A problem, and its logits as the caller holds them (a list, or one [K, N, C])."""

    def __init__(self, chosen, shape, problem, given):
        self.chosen, self.shape = chosen, shape
        self.problem: Problem = problem
        self.given, self.upstream = given, chosen["upstream"]

    def __repr__(self):
        return f"make_case({self.chosen}, {self.shape})"


def random_options(g, shape, dtype, chosen):
    """Keyword arguments from the drawn choices."""
    exits, rows, classes = shape
    real = torch.float64 if dtype == torch.float64 else torch.float32
    positive = lambda *size: torch.rand(*size, generator=g, dtype=real) + 0.25  # noqa: E731
    options = {k: v for k, v in chosen.items() if k in PASSED_ON}
    teachers = chosen["teachers"] if chosen["pairs"] in ("matrix", "rows") else 0
    if teachers:
        kind = "masked" if chosen["kind"] == "masked" else "random"
        options["teacher_logits"] = make_logits(
            kind, (teachers, rows, classes), dtype, chosen["seed"] if kind == "masked" else 7
        )
    if chosen["pairs"] == "matrix":
        options["pair_weight"] = positive(exits, exits + teachers)
    elif chosen["pairs"] == "rows":
        weight = positive(exits, exits + teachers, rows)
        options["pair_weight"] = weight.masked_fill(weight < 0.5, 0.0)
    else:
        options["pair_weight"] = chosen["pairs"]
    if chosen["target"] == "index":
        label = torch.randint(classes, (rows,), generator=g)
        ignored = torch.rand(rows, generator=g) < chosen["ignored"]
        options["target"] = label.masked_fill(ignored, chosen["ignore_index"])
    elif chosen["target"] == "probabilities":
        options["target"] = positive(rows, classes).softmax(-1)
    if chosen["exit_weight"]:
        options["exit_weight"] = positive(*((exits, rows)[: chosen["exit_weight"]]))
    if chosen["class_weight"]:
        options["class_weight"] = positive(classes)
    return options


PASSED_ON = (
    "pair_scale", "temperature", "temperature_squared", "divergence", "beta", "detach_teacher",
    "ignore_index", "label_smoothing", "reduction", "normalizer", "pair_divergence",
)  # fmt: skip

CHOICES = {
    "kind": st.sampled_from(KINDS),
    "layout": st.sampled_from(LAYOUTS),
    "pairs": st.sampled_from(PAIRS),
    "teachers": st.sampled_from((0, 0, 1, 3)),
    "target": st.sampled_from(("index", "index", "probabilities", None)),
    "ignored": st.sampled_from((0.0, 0.3, 1.0)),
    "exit_weight": st.sampled_from((0, 1, 2)),
    "class_weight": st.booleans(),
    "pair_scale": st.sampled_from((1.0, 0.3)),
    "temperature": st.sampled_from((1.0, 2.0, 3.0, 4.0, 0.5, 2.7)),
    "temperature_squared": st.booleans(),
    "divergence": st.sampled_from(("forward_kl", *DIVERGENCES)),
    "beta": st.sampled_from((0.5, 0.2, 0.0, 1.0)),
    "detach_teacher": st.booleans(),
    "ignore_index": st.sampled_from((-100, -1)),
    "label_smoothing": st.sampled_from((0.0, 0.1)),
    "reduction": st.sampled_from(("mean", "sum")),
    "normalizer": st.sampled_from((None, None, 3.5)),
    "pair_divergence": st.booleans(),
    "seed": st.integers(0, 1 << 20),
    "dtype": st.sampled_from(DTYPES),
    "upstream": st.sampled_from((1.0, -0.75, 3.0)),
}


@st.composite
def cases(draw):
    """Any shape, any layout, any option."""
    chosen = {name: draw(strategy) for name, strategy in CHOICES.items()}
    exits = draw(st.sampled_from((1, 2, 3, 4, 5, 7, 32)))
    shape = (exits, draw(st.integers(0, 5)), draw(st.sampled_from(CLASSES)))
    return make_case(chosen, shape)


def make_case(chosen, shape):
    dtype = chosen["dtype"]
    z = make_logits(chosen["kind"], shape, dtype, chosen["seed"])
    options = random_options(generator(chosen["seed"]), shape, dtype, chosen)
    if chosen["layout"] == "stacked":
        given = torch.stack(z)
        return Case(chosen, shape, Problem(list(given.unbind(0)), options), given)
    given = [lay_out(x, chosen["layout"]) for x in z]
    return Case(chosen, shape, Problem(given, options), given)


def leaves(given):
    """The caller's logits as leaves that require grad, layout and values kept."""
    as_leaf = lambda x: x.detach().requires_grad_()  # noqa: E731
    return as_leaf(given) if isinstance(given, torch.Tensor) else [as_leaf(x) for x in given]


def per_exit(value):
    """Gradients (or logits) as a list of K, whether given as one [K, N, C] or as K tensors."""
    return list(value.unbind(0)) if isinstance(value, torch.Tensor) else list(value)
