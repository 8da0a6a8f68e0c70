# SPDX-License-Identifier: Apache-2.0
"""Early exits in programs that know no msdkern: torch.export, AOTInductor and ONNX.

Two recipes. Per-row compaction (`CompactingExport`) takes any batch: rows that stay are gathered
by `nonzero` and `index_select`, answers go back by `index_copy`. `BatchOneExport` is for a static
batch of one row and branches by `torch.cond`; with a dynamic batch, `torch.cond` refuses one row.

Ops of msdkern are replaced by their formulas, because a fresh process does not have them.
Thresholds and temperatures are buffers: they can be changed in the exported program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from msdkern import executors, reference
from msdkern.calibrate.files import Thresholds
from msdkern.executors import eager
from msdkern.infer.answers import Answers
from msdkern.infer.gates import Gates, Inference, run_stage, stages_of
from msdkern.ops import checks
from msdkern.ops.gate import GateStep, gate_step


class _Export(nn.Module):
    """Stages, thresholds and temperatures as a module to be traced."""

    def __init__(
        self,
        model: nn.Module,
        thresholds: Thresholds | float | Sequence[float] | Tensor,
        measure: str = "confidence",
        *,
        temperature: float | Sequence[float] | Tensor = 1.0,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        stages = stages_of(op, model)
        gates = Gates(op, len(stages), thresholds, measure, temperature, None)
        self.stages, self.measure = nn.ModuleList(stages), gates.measure
        parameter = next(model.parameters(), torch.empty(0))
        for name in ("thresholds", "temperature"):
            values = torch.tensor(getattr(gates, name), device=parameter.device)
            self.register_buffer(name, values)

    thresholds: Tensor
    temperature: Tensor

    def step(self, k: int, z: Tensor, memory: Sequence[Tensor]) -> GateStep:
        return gate_step(
            z,
            self.thresholds[k],
            self.measure,
            temperature=self.temperature[k],
            previous=tuple(memory) or None,
        )

    def fired(self, k: int, score: Tensor) -> Tensor:
        limit = self.thresholds[k].to(score.dtype)
        return reference.fires(score, limit, self.measure)


class CompactingExport(_Export):
    """Exit, prediction and score [N] of any number of rows but 0, computing only those that stay.

    Arguments as of `msdkern.infer.AdaptiveRunner`; ``measure="score"`` cannot be exported. A copy
    of the first row travels behind the rows in flight and is answered nowhere: so no stage meets an
    empty batch, whose size a program would have to ask for before every convolution.
    """

    def forward(self, x: Any) -> tuple[Tensor, ...]:
        leaf = pytree.tree_leaves(x)[0]
        count = leaf.shape[0]
        rows = torch.arange(count, device=leaf.device)
        answers: tuple[Tensor, ...] = ()
        state: Any = (x, [], ())
        for k, stage in enumerate(self.stages):
            features, logits, memory = state
            features, logits = run_stage("CompactingExport", stage, k, features, logits)
            step = self.step(k, logits[-1], memory)
            values = (torch.full_like(rows, k), step.prediction, step.score)
            if k == 0:
                answers = tuple(torch.cat([v, v[:1]]) for v in values)
            else:
                pairs = zip(answers, values, strict=True)
                answers = tuple(a.index_copy(0, rows, v) for a, v in pairs)
            if k == len(self.stages) - 1:
                break
            stays = ~self.fired(k, step.score)
            beside = torch.zeros_like(rows[:1])
            if k == 0:
                rows = torch.cat([rows, beside + count])
                keep = torch.cat([stays.nonzero()[:, 0], beside])
                chosen = torch.cat([stays, beside == 0]).nonzero()[:, 0]
            else:
                keep = chosen = torch.cat([stays[:-1], beside == 0]).nonzero()[:, 0]
            torch._check(keep.shape[0] >= 1)
            memory = (step.prediction, step.score) if self.measure == "patience" else ()
            state = _select((features, logits, memory), keep)
            rows = rows.index_select(0, chosen)
        return tuple(a[:count] for a in answers)


class BatchOneExport(_Export):
    """Exit, prediction and score [1] of a static batch of one row, for the least latency.

    Arguments as of `CompactingExport`.
    """

    def forward(self, x: Any) -> tuple[Tensor, ...]:
        return self._from(0, x, [], ())

    def _from(self, k: int, features: Any, logits: list[Tensor], memory: Sequence[Tensor]) -> Any:
        features, logits = run_stage("BatchOneExport", self.stages[k], k, features, logits)
        step = self.step(k, logits[-1], memory)
        answer = (torch.full_like(step.prediction, k), step.prediction, step.score)
        if k == len(self.stages) - 1:
            return answer
        kept = (step.prediction, step.score) if self.measure == "patience" else ()
        leaves, spec = pytree.tree_flatten((features, logits, kept))

        # Tensors are passed as operands, and what a branch returns is its own.
        def leave(*operands: Tensor) -> tuple[Tensor, ...]:
            return tuple(t.clone() for t in operands[:3])

        def go_on(*operands: Tensor) -> tuple[Tensor, ...]:
            found = self._from(k + 1, *pytree.tree_unflatten(list(operands[3:]), spec))
            return tuple(t.clone() for t in found)

        fired = self.fired(k, step.score)[0]
        return torch.cond(fired, leave, go_on, (*answer, *leaves))


def _select(state: Any, keep: Tensor) -> Any:
    return pytree.tree_map(lambda t: t.index_select(0, keep) if isinstance(t, Tensor) else t, state)


# Programs -------------------------------------------------------------------------------------


def _without_executor(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments[:-1])


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Every op that a staged model may contain, by its formulas."""
    ops = torch.ops.msdkern
    table = torch.export.default_decompositions()
    table[ops.gate_step.default] = _without_executor(eager.unchecked_gate_step)
    table[ops.exit_gate.default] = _without_executor(eager.unchecked_exit_gate)
    table[ops.exit_statistics.default] = _without_executor(eager.exit_statistics)
    return table


def export_program(module: nn.Module, x: Any) -> torch.export.ExportedProgram:
    """The module as a program of PyTorch's own operators, with a dynamic number of rows.

    Args:
        module: a `CompactingExport`, or a `BatchOneExport`, whose batch is static.
        x: an example; of two rows or more for a `CompactingExport`.

    Raises: ValueError with one sentence, also where an op of msdkern is left in the program.
    """
    op = "export_program"
    single = isinstance(module, BatchOneExport)
    if not isinstance(module, _Export):
        checks.fail(
            op, "module must be a CompactingExport or a BatchOneExport", type(module).__name__
        )
    rows = pytree.tree_leaves(x)[0].shape[0]
    if single and rows != 1:
        checks.fail(op, "the example of a BatchOneExport must have one row", rows)
    if not single and rows < 2:
        checks.fail(op, "the example of a CompactingExport must have at least two rows", rows)
    dynamic = pytree.tree_map(lambda t: {0: torch.export.Dim.DYNAMIC}, x)
    shapes = None if single else (dynamic,)
    with Inference(module, [])(), executors.executor("eager"):
        program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False)
        program = program.run_decompositions(_decompositions())
    left = {node for graph in _graphs(program.graph_module) for node in _ours(graph)}
    if left:
        checks.fail(op, "the program must not need msdkern", ", ".join(sorted(left)))
    return program


def _graphs(module: torch.fx.GraphModule) -> list[torch.fx.GraphModule]:
    return [m for m in module.modules() if isinstance(m, torch.fx.GraphModule)]


def _ours(graph: torch.fx.GraphModule) -> list[str]:
    targets = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return [name for name in targets if "msdkern" in name]


def export_aot(program: torch.export.ExportedProgram, path: str | Path) -> Path:
    """Compiles the program into a package (``.pt2``) that runs without Python: AOTInductor.

    ``torch._inductor.aoti_load_package(path)(x)`` runs it. Needs a C++ compiler.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"export_aot: path must end in .pt2; got {str(path)!r}")
    # With its choice of layouts, the compiler of PyTorch 2.13 gets convolutions wrong whose number
    # of rows is known at run time only: all rows behind the first exit.
    options = {"layout_optimization": False}
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=options
    )
    return path


def export_onnx(program: torch.export.ExportedProgram, path: str | Path) -> Path:
    """Writes the program as ONNX, for onnxruntime say. Needs the packages onnx and onnxscript.

    Inputs are named ``x`` (``x_0``, ... for several), outputs ``exit_index``, ``prediction``,
    ``score``.

    Raises: ImportError with one sentence.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"export_onnx: needs onnx and onnxscript; {error}") from None
    made = torch.onnx.export(
        program, dynamo=True, verbose=False, output_names=list(Answers._fields)
    )
    if made is None:
        raise RuntimeError("export_onnx: PyTorch's exporter returned nothing")
    made.save(str(path))
    return Path(path)
