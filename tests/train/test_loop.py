# SPDX-License-Identifier: Apache-2.0
"""The training loop: the same bits twice, the right gradients, and what it tells."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from msdkern.cli import CommandError
from msdkern.train import TrainConfig, checkpoint, data, fit
from msdkern.train.evaluate import evaluate, evaluate_checkpoint
from msdkern.train.log import Meter, read_log
from msdkern.train.loop import train_step
from msdkern.train.run import Run, cpu_threads, learning_rate


def model_of(config):
    return checkpoint.load(Path(config.out) / "last.pt")["model"]


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_same_seed_same_bits_other_seed_other_weights(config):
    base = config(epochs=1)
    runs = [replace(base, seed=s, out=f"{base.out}{k}") for k, s in enumerate((0, 0, 1))]
    for run in runs:
        fit(run)
    assert equal(model_of(runs[0]), model_of(runs[1]))
    assert not equal(model_of(runs[0]), model_of(runs[2]))


def test_it_learns(config):
    report = fit(config(epochs=4, lr=0.05))
    assert all(row["accuracy"] > 0.6 for row in report["exits"])  # chance is 0.25
    assert [row["exit"] for row in report["exits"]] == [1, 2, 3]
    assert report["rows"] == 32


class Plain(nn.Module):
    """Two exits without batch statistics: rows do not see each other."""

    exits = 2

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(192, 32), nn.Linear(32, 32)
        self.answers = nn.ModuleList([nn.Linear(32, 4), nn.Linear(32, 4)])

    def forward(self, x, features=False):
        one = self.first(x.flatten(1)).tanh()
        two = self.second(one).tanh()
        logits = [answer(h) for answer, h in zip(self.answers, (one, two), strict=True)]
        return (logits, [one, two]) if features else logits


def build_plain(*_):
    torch.manual_seed(0)
    return Plain()


@pytest.mark.parametrize("loss", ["ce", "msd", "dks", "byot"])
@pytest.mark.parametrize("ignored", [0, 5])
def test_accumulated_batches_make_one_large_batch(config, monkeypatch, loss, ignored):
    """Also when the rows that count are spread unevenly over the batches."""

    monkeypatch.setattr("msdkern.train.run.build_model", build_plain)
    options = {"beta_begin": 0.01, "beta_end": 0.005} if loss == "msd" else {}
    c = config(loss=loss, batch_size=64, channels_last=False, **options)
    dataset = data.load(c)
    large, small = Run(c, dataset), Run(replace(c, batch_size=16, accumulate=4), dataset)
    images, labels = next(large.batches.epoch(0))
    labels = labels.clone()
    labels[:ignored] = -100
    train_step(large, [(images, labels)])
    train_step(small, list(zip(images.split(16), labels.split(16), strict=True)))
    start = build_plain().state_dict()
    for name, value in large.model.state_dict().items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(small.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    assert small.epoch_meter.read()["accuracy"] == large.epoch_meter.read()["accuracy"]


def test_summed_losses_accumulate_as_sums(config, monkeypatch):
    monkeypatch.setattr("msdkern.train.run.build_model", build_plain)
    c = config(loss="ce", batch_size=64, loss_option=("reduction=sum",), lr=0.001)
    dataset = data.load(c)
    large, small = Run(c, dataset), Run(replace(c, batch_size=16, accumulate=4), dataset)
    images, labels = next(large.batches.epoch(0))
    train_step(large, [(images, labels)])
    train_step(small, list(zip(images.split(16), labels.split(16), strict=True)))
    for name, value in large.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_bfloat16_trains(config):
    report = fit(config(epochs=1, amp=True))
    state = model_of(config())
    assert all(value.dtype != torch.bfloat16 for value in state.values())
    assert all(0 < row["confidence"] <= 1 for row in report["exits"])


def test_compiled_steps_match_plain_ones(config, monkeypatch):
    monkeypatch.setattr("msdkern.train.run.build_model", build_plain)
    c = config(batch_size=32, channels_last=False)
    dataset = data.load(c)
    plain, compiled = Run(c, dataset), Run(replace(c, compile=True), dataset)
    batch = next(plain.batches.epoch(0))
    for run in (plain, compiled):
        run.model.train()
        train_step(run, [batch])
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(
            compiled.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name
        )
    assert compiled.state(0)["model"].keys() == plain.state(0)["model"].keys()


def test_learning_rate_rises_and_falls():
    config = TrainConfig(lr=0.4, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[9] == rates[10] == pytest.approx(0.4)
    assert rates[55] == pytest.approx(0.2)
    assert 0 < rates[99] < 0.001
    assert learning_rate(TrainConfig(schedule="constant", lr=0.4, warmup=0.0), 99, 100) == 0.4
    steps = TrainConfig(schedule="multistep", lr=0.4, warmup=0.0)
    rates = [learning_rate(steps, step, 100) for step in (0, 49, 50, 74, 75, 99)]
    assert rates == pytest.approx([0.4, 0.4, 0.04, 0.04, 0.004, 0.004])


def test_only_matrices_decay(config):
    run = Run(config(weight_decay=0.125), data.load(config()))
    decayed, kept = run.optimizer.param_groups
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in kept["params"]} == {1}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.125, 0.0)


def test_log_tells_every_interval_and_epoch(config):
    heard = []
    c = config(log_every=4)
    report = fit(c, log=lambda record, step: heard.append((record, step)))
    records = read_log(Path(c.out) / "log.jsonl")
    assert [record for record, _ in heard] == records
    assert [(r["kind"], r["epoch"], r["step"]) for r in records] == [
        ("steps", 1, 4),
        ("epoch", 1, 6),
        ("steps", 2, 8),
        ("steps", 2, 12),
        ("epoch", 2, 12),
    ]
    assert [step for _, step in heard] == [4, 6, 8, 12, 12]
    assert records[-1]["held_out"]["accuracy"] == [row["accuracy"] for row in report["exits"]]
    assert report == json.loads((Path(c.out) / "result.json").read_text())


def test_meter_weighs_rows():
    meter = Meter(2, torch.device("cpu"))
    meter.add(torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor([0.5, 0.25]), 2)
    meter.add(torch.tensor(4.0), torch.tensor([6, 0]), torch.tensor([2.0, 1.0]), 6)
    assert meter.read() == {
        "loss": (2 + 24) / 8,
        "accuracy": [7 / 8, 2 / 8],
        "cross_entropy": [13 / 8, 6.5 / 8],
    }


def test_evaluation_is_that_of_the_definition(config):
    c = config()
    run = Run(c, data.load(c))
    got = evaluate(run.model, run.dataset, c, run.device)
    images = run.batches.normalise(run.dataset.held_out.images)
    labels = run.dataset.held_out.labels
    with torch.no_grad():
        logits = run.model(images)
    for row, z in zip(got["exits"], logits, strict=True):
        p = z.double().softmax(1)
        assert row["accuracy"] == (z.argmax(1) == labels).double().mean()
        assert row["cross_entropy"] == pytest.approx(
            float(nn.functional.cross_entropy(z.double(), labels)), rel=1e-5
        )
        assert row["confidence"] == pytest.approx(float(p.amax(1).mean()), rel=1e-5)


def test_evaluate_repeats_the_last_report_exactly(config):
    c = config(epochs=1)
    report = fit(c)
    again = evaluate_checkpoint(Path(report["checkpoint"]), {})
    assert again["exits"] == report["exits"]


def test_exploded_loss_stops_with_a_sentence(config):
    c = config(lr=1e6, loss="ce", warmup=0.0, checkpoint_every=1)
    with pytest.raises(
        CommandError, match=r"the loss is (nan|inf) at step \d+: try a smaller --lr"
    ):
        fit(c)
    state = checkpoint.load_newest(Path(c.out), print)
    assert state is None or all(torch.isfinite(value).all() for value in state["meters"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet9"}, "--model: create: name must be one of resnet8"),
        ({"loss": "mds"}, "--loss: create: name must be one of ce"),
        ({"loss": "ce", "alpha": 0.3}, "--loss: create: ce takes"),
        ({"loss": "kd"}, "--loss: kd learns from the logits of another network"),
        ({"loss": "msd", "alpha": 3.0}, "--loss: MSDLoss: alpha must be between 0 and 1; got 3.0"),
        ({"exits": 4}, "--exits: resnet8 has at most 3; got 4"),
        ({"device": "abacus"}, "--device: 'abacus' cannot be used"),
        ({"executor": "abacus"}, "--executor: must be one of auto, eager"),
    ],
)
def test_mistakes_are_named(config, changes, message):
    with pytest.raises(CommandError) as error:
        fit(config(**changes))
    assert str(error.value).startswith(message)


def test_fewer_exits_are_the_deepest(config):
    c = config(exits=2)
    run = Run(c, data.load(c))
    assert run.model.exits == 2
    whole = Run(config(), run.dataset)
    costs = [evaluate(r.model, r.dataset, c, r.device)["exits"] for r in (run, whole)]
    branch_of_first = costs[1][0]["madds"]
    assert costs[0][-1]["madds"] < costs[1][-1]["madds"]
    assert costs[0][-1]["madds"] > costs[1][-1]["madds"] - branch_of_first


@pytest.mark.parametrize("model", ["msdnet_tiny", "ranet_tiny"])
def test_multi_scale_networks_train(config, model):
    """Their features are tuples; width and exits are options of theirs too."""
    report = fit(config(model=model, epochs=6, lr=0.05, width=6, exits=2))
    assert [row["exit"] for row in report["exits"]] == [1, 2]
    assert all(row["accuracy"] > 0.6 for row in report["exits"])  # chance is 0.25
    costs = [row["madds"] for row in report["exits"]]
    assert costs == sorted(costs)


def test_threads_are_those_asked_for_and_given_back(config):
    before = torch.get_num_threads()
    dataset = data.load(config())
    for threads, expected in ((3, 3), (0, 1)):  # the images are small: one
        with cpu_threads(config(threads=threads), dataset):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == before
