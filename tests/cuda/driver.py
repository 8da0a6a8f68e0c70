# SPDX-License-Identifier: Apache-2.0
"""Drives a sanitized build of `_cuda` with exactly sized buffers, in a process without PyTorch.

    python driver.py FOLDER [bad call]

The calls and the truth are those of tests/native/numpy_driver.py.
"""

import os
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [sys.argv[1], str(Path(__file__).resolve().parents[1] / "native")]
import _cuda  # noqa: E402
import numpy_driver as native  # noqa: E402

WORKSPACE = np.zeros(_cuda.workspace(0, 32, 32), np.uint8)


class OnDevice:
    """`_cuda` as numpy_driver knows `_cpu`: a number of threads where a place is asked for."""

    place = (0, 0, WORKSPACE.ctypes.data, [])

    def loss(self, form, dtype, threads, *rest):
        return _cuda.loss(form, dtype, self.place, *rest)

    def softmax(self, backward, dtype, threads, *rest):
        return _cuda.softmax(backward, dtype, self.place, *rest)

    def statistics(self, dtype, threads, *rest):
        return _cuda.statistics(dtype, self.place, *rest)

    def scale(self, dtype, threads, *rest):
        return _cuda.scale(dtype, self.place, *rest)

    def gate(self, step, dtype, threads, *rest):
        return _cuda.gate(step, dtype, self.place, *rest)

    def copy_rows(self, scatter, threads, *rest):
        return _cuda.copy_rows(scatter, self.place, *rest)

    def isas(self):
        return ["cuda"]

    def use_isa(self, name):
        pass


# dtype, exits, teachers, rows, classes, pairs, divergence, options: every home and every team, and
# in each the sweeps that differ.
CALLS = [
    ("float32", 5, 0, 5, 32, "mutual", "forward_kl", {"gap": 0}),
    ("float32", 4, 0, 3, 96, "deeper", "forward_kl", {"gap": 0}),
    ("float32", 3, 0, 2, 1000, "next", "forward_kl", {"gap": 0, "t": 1.5}),
    ("bfloat16", 3, 0, 3, 64, "last", "forward_kl", {"gap": 0, "t": 3.0}),
    ("bfloat16", 2, 0, 2, 1000, "mutual", "forward_kl", {"gap": 0}),
    ("float32", 4, 2, 3, 33, "dense", "forward_kl", {"smoothing": 0.1}),
    ("float32", 3, 1, 3, 70, "dense", "jsd", {"detach": False, "matrix": True}),
    ("float32", 3, 0, 2, 1001, "mutual", "reverse_kl", {"target": "probabilities"}),
    ("float32", 3, 0, 2, 300, "mutual", "forward_kl", {"masked": True}),
    ("float32", 3, 0, 1, 9001, "mutual", "forward_kl", {"t": 2.5}),
    ("float32", 2, 0, 1, 9002, "mutual", "soft_ce", {"detach": False}),
    ("bfloat16", 4, 0, 7, 2056, "mutual", "forward_kl", {"gap": 0, "t": 3.0}),
    ("float32", 6, 0, 7, 1028, "deeper", "forward_kl", {"smoothing": 0.1}),
    ("float32", 3, 1, 2, 2052, "dense", "forward_kl", {"gap": 0, "t": 2.0}),
    ("float32", 5, 0, 2, 200, "deeper", "reverse_kl", {"detach": False}),
    ("bfloat16", 4, 0, 9, 2051, "mutual", "forward_kl", {"gap": 0, "t": 3.0}),
    ("bfloat16", 5, 0, 11, 13, "dense", "forward_kl", {"gap": 0, "smoothing": 0.1}),
    ("float32", 9, 0, 3, 251, "last", "forward_kl", {"gap": 0}),
]


# What fits nowhere on a device with little shared memory, where all of these need more than one
# chunk per thread: every named pair, masked classes, rows that do not begin on 16 bytes, a maximum
# that comes late.
STREAMED = [
    ("float32", 5, 0, 2, 7000, "mutual", "forward_kl", {"gap": 0, "t": 3.0}),
    ("float32", 3, 0, 2, 7001, "deeper", "forward_kl", {"gap": 1, "t": 2.5}),
    ("bfloat16", 4, 0, 2, 14000, "next", "forward_kl", {"gap": 0, "t": 1.0}),
    ("bfloat16", 8, 0, 1, 9000, "last", "forward_kl", {"gap": 0, "t": 4.0}),
    ("float32", 2, 0, 1, 7000, "mutual", "forward_kl", {"masked": True}),
    ("float32", 3, 0, 1, 7000, "dense", "reverse_kl", {}),
    ("bfloat16", 3, 0, 3, 14001, "mutual", "forward_kl", {"gap": 0, "t": 3.0}),
]


# exits, rows, classes of the gates: every way to own a row; two pieces of one; several blocks of
# the grid, and a second launch.
GATES = [
    (3, 5, 10), (2, 5, 67), (2, 3, 300), (2, 2, 4099), (2, 2, 16000), (1, 2, 33001), (1, 2500, 9),
    (1, 4100, 1),
]  # fmt: skip


def check_exits_of_rows_that_left(module):
    """The second exit has no memory at all."""
    z, rows = np.zeros(5 * 9, np.float32), 5
    index, prediction, score = (np.zeros(rows, t) for t in (np.int64, np.int64, np.float32))
    outputs = [o.ctypes.data for o in (prediction, score, index)]
    none = (0, 0, 0)
    assert module.gate(
        False, 0, 1, 0, rows, rows, 9, [z.ctypes.data, 0], [9, 9], [1.0], [-np.inf], *none, outputs
    ) == 0  # fmt: skip
    assert (index == 0).all()


def main():
    module = OnDevice()
    for *call, options in STREAMED if "SIMT_SHARED" in os.environ else CALLS:
        native.check(module, native.Call(*call, **options), threads=1)
    for dtype in ("float32", "bfloat16"):
        for exits, rows, classes in ((2, 3, 8), (3, 3, 67), (1, 1, 17001)):
            native.check_softmax(module, dtype, exits, rows, classes, log=classes == 67)
            native.check_statistics(module, dtype, exits, rows, classes)
    for number, shape in enumerate(GATES):
        dtype = ("float32", "bfloat16")[number % 2]
        for measure in (0, 1, 2, 5) if shape[1] * shape[2] < 2000 else (number % 3,):
            native.check_gate(module, dtype, *shape, measure)
    check_exits_of_rows_that_left(module)
    native.check_copy(module, 7, [1, 4, 8, 33, 0, 40000])
    native.check_scale(module, "float32", (3, 4097))
    print("calls", len(CALLS))


if __name__ == "__main__":
    np.seterr(invalid="ignore", divide="ignore")  # what masks leave out is computed all the same
    if len(sys.argv) > 2:
        native.lie(OnDevice(), sys.argv[2])
    else:
        main()
