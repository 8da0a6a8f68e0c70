# SPDX-License-Identifier: Apache-2.0
"""Lightning's Trainer: the plain loop's losses, and every exit's terms in its log."""

import pytest
import torch
from torch.utils.data import DataLoader

lightning = pytest.importorskip("lightning.pytorch")


@pytest.mark.parametrize("beta", [0.0, 0.01])
def test_step_by_step(problem, plain, same, tmp_path, beta):
    from msdkern.integrations.lightning import MultiExitModule

    records = []

    class Record(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            records.append(dict(trainer.callback_metrics))

    options = {"beta_begin": beta, "beta_end": 0.0}
    network, criterion = problem.network(), problem.criterion(**options)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Record()],
        default_root_dir=tmp_path,
    )  # fmt: skip
    loader = DataLoader(problem.dataset, 32)
    trainer.fit(MultiExitModule(network, criterion, problem.optimizer), loader, loader)
    losses = [record["train/loss"].item() for record in records]
    same(
        (losses, network.state_dict()), plain(problem, problem.criterion(**options), schedule=True)
    )
    terms = ((0.7, "cross_entropy"), (1.0, "divergence"))
    parts = sum(a * records[-1][f"train/{name}_{k}"] for a, name in terms for k in (1, 2, 3))
    assert beta or float(parts) == pytest.approx(losses[-1], rel=1e-5)
    assert {f"val/cross_entropy_{k}" for k in (1, 2, 3)} < trainer.callback_metrics.keys()
    assert torch.isfinite(trainer.callback_metrics["val/loss"])
