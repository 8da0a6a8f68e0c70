# SPDX-License-Identifier: Apache-2.0
"""Both layouts of CIFAR-10, and files that are not what they claim to be."""

import os
import pickle

import numpy as np
import pytest
import torch

from msdkern.cli import CommandError
from msdkern.train import cifar


def write_batches(folder, rows=5, change=lambda name, batch: batch):
    """Six small files in the layout of the original archive; returns all pixels by file."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    written = {}
    for name in (*cifar.TRAIN_FILES, "test_batch"):
        pixels = rng.integers(0, 256, (rows, 3072), dtype=np.uint8)
        batch = {b"data": pixels, b"labels": [int(n) for n in rng.integers(0, 10, rows)]}
        written[name] = batch
        with open(base / name, "wb") as file:
            pickle.dump(change(name, {**batch, b"batch_label": b"x"}), file, protocol=2)
    return written


def test_python_batches(tmp_path):
    written = write_batches(tmp_path)
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        train, test, names = cifar.load_cifar10(str(root))
        assert len(train) == 25
        assert len(test) == 5
        assert names[3] == "cat"
        # row 6 is the second of the second file; planes come first there, colours last here
        second = written["data_batch_2"]
        pixels = second[b"data"][1].reshape(3, 32, 32)
        assert np.array_equal(train.images[6].permute(2, 0, 1).numpy(), pixels)
        assert train.labels[6] == second[b"labels"][1]


def test_python_2_pickles_are_read(tmp_path):
    """The original files hold Python 2 strings; in Python 3 these opcodes are bytes."""
    path = tmp_path / "batch"
    pixels = b"\x07" * 3072
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntU\x01btR"
        b"(I1\n(I1\nI3072\ntcnumpy\ndtype\n(U\x02u1I0\nI1\ntR(I3\nU\x01|NNNI-1\nI-1\nI0\ntbI00\n"
        b"T\x00\x0c\x00\x00" + pixels + b"tb"
    )
    path.write_bytes(b"\x80\x02}(U\x04data" + array + b"U\x06labels](I3\neu.")
    images, labels = cifar.read_batch(path)
    assert images.shape == (1, 32, 32, 3)
    assert torch.all(images == 7)
    assert labels.tolist() == [3]


class Harm:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_malicious_pickle_does_nothing(tmp_path):
    target = tmp_path / "harm"
    write_batches(tmp_path, change=lambda name, batch: {**batch, b"extra": Harm(target)})
    with pytest.raises(CommandError, match=r"data_batch_1: not a CIFAR-10 batch: it asks for"):
        cifar.load_cifar10(str(tmp_path))
    assert not target.exists()
    # the same bytes do harm when they are read without care
    with open(tmp_path / "cifar-10-batches-py" / "data_batch_1", "rb") as file:
        pickle.load(file)
    assert target.exists()


@pytest.mark.parametrize(
    "text",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'__class__'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntS'b'\ntR.",
        b"cnumpy\nndarray.tofile\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__class__\x93.",
    ],
)
def test_other_callables_are_refused(tmp_path, text):
    path = tmp_path / "batch"
    path.write_bytes(text)
    with pytest.raises(CommandError, match="not a CIFAR-10 batch"):
        cifar.read_batch(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: [1, 2],
        lambda batch: {**batch, b"data": batch[b"data"].astype(np.int16)},
        lambda batch: {**batch, b"data": batch[b"data"][:, 1:]},
        lambda batch: {**batch, b"data": [1, 2]},
        lambda batch: {**batch, b"labels": batch[b"labels"][1:]},
        lambda batch: {**batch, b"labels": [10] * 5},
        lambda batch: {b"data": batch[b"data"]},
    ],
)
def test_wrong_contents(tmp_path, change):
    write_batches(tmp_path, change=lambda name, batch: change(batch))
    with pytest.raises(CommandError, match="data_batch_1: not a CIFAR-10 batch"):
        cifar.load_cifar10(str(tmp_path))


def test_damaged_and_missing_batches(tmp_path):
    write_batches(tmp_path)
    base = tmp_path / "cifar-10-batches-py"
    (base / "data_batch_4").write_bytes((base / "data_batch_4").read_bytes()[:1000])
    with pytest.raises(CommandError, match="data_batch_4: not a CIFAR-10 batch"):
        cifar.load_cifar10(str(tmp_path))
    (base / "data_batch_4").unlink()
    with pytest.raises(CommandError, match="lacks data_batch_4"):
        cifar.load_cifar10(str(tmp_path))


def test_tree(tree):
    train, test, names = cifar.load_cifar10(str(tree))
    assert names == ("ant", "bee", "cow", "dog")
    assert train.images.shape == (96, 8, 8, 3)
    assert train.labels.tolist() == sorted([0, 1, 2, 3] * 24)
    assert test.labels.bincount().tolist() == [8] * 4


def test_tree_below_a_folder_of_its_name(tree, tmp_path):
    (tmp_path / "cifar10").symlink_to(tree)
    assert len(cifar.load_cifar10(str(tmp_path))[0]) == 96


@pytest.mark.parametrize("root", ["", "nowhere"])
def test_no_images(tmp_path, root):
    with pytest.raises(CommandError, match="--root: "):
        cifar.load_cifar10(str(tmp_path / root) if root else "")


def test_trees_that_do_not_fit(tmp_path):
    from PIL import Image

    def image(part, name, number, size=(8, 8)):
        folder = tmp_path / part / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / f"{number}.png")

    image("train", "ant", 0)
    image("test", "bee", 0)
    with pytest.raises(CommandError, match="must hold the same class folders"):
        cifar.load_cifar10(str(tmp_path))
    image("train", "bee", 0)
    (tmp_path / "test" / "ant").mkdir()
    with pytest.raises(CommandError, match=r"test/ant holds no \.png or \.jpg file"):
        cifar.load_cifar10(str(tmp_path))
    image("test", "ant", 0)
    image("train", "bee", 1, size=(9, 8))
    with pytest.raises(CommandError, match=r"1\.png: every image must be 8x8 .* got 9x8"):
        cifar.load_cifar10(str(tmp_path))
    (tmp_path / "train" / "bee" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(CommandError, match=r"1\.png: cannot be read as an image"):
        cifar.load_cifar10(str(tmp_path))


def test_cache_follows_the_files(tree, tmp_path, monkeypatch):
    import shutil

    root = shutil.copytree(tree, tmp_path / "tree")
    cache = tmp_path / "cache"
    first = cifar.load_cifar10(str(root), str(cache))
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(cifar, "decode", None)  # decoding again would raise
        again = cifar.load_cifar10(str(root), str(cache))
    assert torch.equal(first[0].images, again[0].images)
    assert torch.equal(first[1].labels, again[1].labels)

    file.write_bytes(file.read_bytes()[:500])  # a damaged cache is no worse than none
    assert torch.equal(cifar.load_cifar10(str(root), str(cache))[0].images, first[0].images)

    shutil.copy(root / "train" / "ant" / "0001.png", root / "train" / "ant" / "0000.png")
    changed = cifar.load_cifar10(str(root), str(cache))
    assert torch.equal(changed[0].images[0], first[0].images[1])
    assert len(list(cache.iterdir())) == 2
    assert sorted(p.name for p in root.iterdir()) == ["test", "train"]


def test_unreadable_folder(tmp_path, monkeypatch):
    """As a user without the right to look inside; root may look anywhere, so this is played."""
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()

    def refuse(base, cache):
        raise PermissionError(13, "Permission denied", str(base / "train"))

    monkeypatch.setattr(cifar, "read_tree", refuse)
    with pytest.raises(CommandError, match=r"cannot read .*train: permission denied"):
        cifar.load_cifar10(str(tmp_path))
