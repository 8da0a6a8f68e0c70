# SPDX-License-Identifier: Apache-2.0
"""The digits of conftest.py by other people's trainers in two processes; no test by itself.

``two_processes.py FOLDER`` under torchrun: process 0 writes the losses of every step and the
weights they lead to into FOLDER, one file per trainer.
"""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

HERE = Path(__file__).parent


def load(path: Path, name: str):
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def huggingface(problem, folder):
    """Two batches of eight rows in each process make a step; their valid rows differ."""
    import transformers

    from msdkern.integrations import huggingface

    args = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, num_train_epochs=1,
        max_grad_norm=0.0, logging_steps=1, logging_nan_inf_filter=False,
        lr_scheduler_type="constant", average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    criterion, network = problem.criterion(), frozen(problem)
    trainer = problem.trainer(
        huggingface.MultiExitModel(network), args,
        optimizers=(problem.optimizer(network.parameters()), None),
        compute_loss_func=huggingface.compute_loss_func(criterion),
    )  # fmt: skip
    trainer.train()
    return [r["loss"] for r in trainer.state.log_history if "loss" in r], network


def accelerated(problem, folder):
    """The plain loop; the valid rows of both processes divide, and DDP's mean is undone."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    criterion, network = problem.criterion(), frozen(problem)
    model, optimizer, loader = accelerator.prepare(
        network, problem.optimizer(network.parameters()), DataLoader(problem.dataset, 16)
    )
    losses = []
    for images, labels in loader:
        valid = accelerator.reduce((labels >= 0).sum())
        loss = criterion(model(images), labels, normalizer=valid)
        optimizer.zero_grad()
        accelerator.backward(loss * accelerator.num_processes)
        optimizer.step()
        losses.append(float(accelerator.reduce(loss.detach())))
    return losses, network


def lightning(problem, folder):
    """Lightning takes the mean over processes, which have equally many valid rows here."""
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from msdkern.integrations.lightning import MultiExitModule

    losses = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            losses.append(float(trainer.strategy.reduce(outputs["loss"])))

    problem.labels = problem.whole
    network = frozen(problem)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Record()], default_root_dir=folder,
        use_distributed_sampler=False,  # it would shuffle
    )  # fmt: skip
    sampler = DistributedSampler(problem.dataset, shuffle=False)
    loader = DataLoader(problem.dataset, 16, sampler=sampler)
    trainer.fit(MultiExitModule(network, problem.criterion(), problem.optimizer), loader)
    return losses, network


def frozen(problem):
    """A network whose batch normalisation does not see how the rows are spread."""
    network = problem.network().eval()
    network.train = lambda mode=True: network
    return network


TRAINERS = {"huggingface": huggingface, "accelerate": accelerated, "lightning": lightning}


def main(folder: Path) -> None:
    load(HERE.parent / "conftest.py", "operators")  # of torchvision, which transformers imports
    digits = load(HERE / "conftest.py", "digits")
    dist.init_process_group("gloo")
    for name, train in TRAINERS.items():
        problem = digits.make_problem()
        problem.whole = problem.labels.clone()
        problem.labels.view(-1, 32)[:, 3:16] = -100  # most of them in one batch
        losses, network = train(problem, folder)
        if dist.get_rank() == 0:
            torch.save({"losses": losses, "weights": network.state_dict()}, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
