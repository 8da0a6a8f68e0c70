# SPDX-License-Identifier: Apache-2.0
"""Several losses over several seeds, and the share of a step that a loss takes."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from msdkern.cli import CommandError, main
from msdkern.train import compare, data, profile
from msdkern.train.run import Run


@pytest.fixture
def arguments(tree, tmp_path):
    words = f"compare --data cifar10 --root {tree} --out {tmp_path / 'all'} --epochs 1"
    return [*words.split(), "--batch-size", "32", "--lr", "0.02", "--threads", "1", "--quiet"]


def test_compare_trains_tabulates_and_resumes(arguments, tmp_path, capsys):
    words = [*arguments, "--losses", "ce,msd:alpha=0.5", "--seeds", "0,3", "--json"]
    assert main(words) == 0
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    folder = tmp_path / "all"
    runs = ["ce-seed0", "ce-seed3", "msd-alpha-0.5-seed0", "msd-alpha-0.5-seed3"]
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == runs
    results = [json.loads((folder / run / "result.json").read_text()) for run in runs]
    second = summary["losses"]["msd:alpha=0.5"][1]["accuracy"]
    values = [result["exits"][1]["accuracy"] for result in results[2:]]
    assert second["values"] == values
    assert second["mean"] == pytest.approx(statistics.mean(values))
    assert second["spread"] == pytest.approx(statistics.stdev(values))
    assert json.loads((folder / "compare.json").read_text()) == summary
    assert (folder / "compare.md").read_text() + out.splitlines()[-1] == out.rstrip("\n")
    assert (folder / "compare.png").stat().st_size > 10000
    options = json.loads((folder / runs[2] / "config.json").read_text())
    assert (options["loss"], options["loss_option"], options["seed"]) == ("msd", ["alpha=0.5"], 0)

    # a run that is lost is trained again, the others are left alone
    times = {run: (folder / run / "last.pt").stat().st_mtime_ns for run in runs}
    for file in (folder / runs[1]).iterdir():
        file.unlink()
    assert main(words) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["losses"] == summary["losses"]
    changed = [r for r in runs if (folder / r / "last.pt").stat().st_mtime_ns != times[r]]
    assert changed == runs[1:2]


def test_compare_refuses_runs_of_another_config(arguments, capsys):
    words = [*arguments, "--losses", "ce", "--seeds", "0"]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--lr", "0.3"]) == 1
    error = capsys.readouterr().err
    assert "--lr is 0.02 in the run that is there; got 0.3" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--losses", "ce,ce"], "--losses: must name losses, none of them twice"),
        (["--losses", ","], "--losses: must name losses"),
        (["--seeds", "0,x"], "--seeds: must be numbers"),
        (["--seeds", "1,1"], "--seeds: must be numbers such as 0,1,2, none twice"),
        (["--losses", "ce,msd:alpha"], "--loss-option: must be NAME=VALUE"),
        (["--losses", "ce,mds"], "--loss: create: name must be one of"),
        (["--losses", "ce,kd"], "--loss: kd learns from the logits of another network"),
    ],
)
def test_mistakes_are_found_before_any_training(arguments, tmp_path, capsys, words, message):
    assert main([*arguments, *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "all").exists()


def test_markdown():
    def row(exit, mean, spread):
        fact = {"mean": mean, "spread": spread, "values": []}
        names = ("accuracy", "cross_entropy", "confidence")
        return {"exit": exit, "madds": 1000 * exit, **dict.fromkeys(names, fact)}

    text = compare.markdown(
        {"seeds": [0, 1], "losses": {"ce": [row(1, 0.5, 0.01)], "msd": [row(1, 0.75, 0.0)]}}
    )
    assert text.splitlines()[:6] == [
        "Held-out accuracy in %, over 2 seeds, mean ± standard deviation;"
        " multiply-adds in brackets:",
        "",
        "| loss | exit 1 (1 k) |",
        "|------|--------------|",
        "| ce   | 50.00 ± 1.00 |",
        "| msd  | 75.00 ± 0.00 |",
    ]
    assert "| msd  | 0.7500 ± 0.0000 |" in text
    assert compare.mean_and_spread([0.5]) == {"mean": 0.5, "spread": None, "values": [0.5]}


@pytest.mark.parametrize("loss", ["ce", "msd", "byot", "dks", "ztw_all", "phuong_lampert"])
def test_plain_form_is_the_same_loss(config, loss):
    """What msdkern is timed against computes the same value and the same gradients."""
    run = Run(config(loss=loss), data.load(config()))
    generator = torch.Generator().manual_seed(0)
    logits = [2 * torch.randn(6, 4, generator=generator) for _ in range(3)]
    labels = torch.tensor([0, 3, 1, 2, 2, 0])
    grads = []
    for form in (
        profile.fused_loss(run.criterion),
        profile.plain_loss(run.criterion, 3, loss),
    ):
        leaves = [z.clone().requires_grad_() for z in logits]
        value = form(leaves, labels)
        grads.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_profile_reports_shares(config, monkeypatch):
    monkeypatch.setattr(profile, "ROUNDS", 2)
    monkeypatch.setattr(torch, "compile", lambda function: function)  # compiling is not the point
    shares = profile.profile_loss(config())
    assert shares["loss"].keys() == {"msdkern", "eager", "compiled"}
    for name, seconds in shares["loss"].items():
        assert shares["share"][name] == pytest.approx(seconds / (seconds + shares["network"]))
    text = profile.profile_table(shares).splitlines()
    assert len(text) == 4
    assert not Path(config().out).exists()


def test_profile_refuses_what_it_cannot_write_plainly(config):
    with pytest.raises(CommandError, match="has no plain PyTorch form of --loss exit_ensemble"):
        profile.profile_loss(config(loss="exit_ensemble"))
