# SPDX-License-Identifier: Apache-2.0
"""Drives a build of the native module with exactly sized numpy buffers, in a process of its own.

    python numpy_driver.py FOLDER [bad call]

FOLDER holds the module. Results are compared with the formulas in float64. A sanitizer, where the
module has one, ends the process; so must a bad call, which lies about the size of a buffer.
"""

import itertools
import sys

import numpy as np

DTYPES = ("float32", "float16", "bfloat16", "float64")  # in the order of the codes
TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2, "float64": 1e-11}
PAIRS = ("none", "mutual", "last", "deeper", "next", "dense")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "soft_ce")
SCALAR, ROWS, ROWS_BACKWARD = 0, 1, 2
random = np.random.default_rng(0)


def encode(x, dtype):
    """float64 values as a fresh exactly sized buffer of a storage dtype."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        return ((bits + 0x8000) >> 16).astype(np.uint16)
    return np.array(x, dtype=dtype)


def decode(x, dtype):
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def real_of(dtype):
    return np.float64 if dtype == "float64" else np.float32


def strided(x, dtype, gap):
    """Rows `gap` elements further apart than they are long; the buffer ends with the last row."""
    rows, classes = x.shape
    flat = encode(
        np.full(max(0, (rows - 1) * (classes + gap) + classes) if rows else 0, 7.0), dtype
    )
    for n in range(rows):
        flat[n * (classes + gap) :][:classes] = encode(x[n], dtype)
    return flat, classes + gap


def log_softmax(z):
    gap = z - z.max(-1, keepdims=True)
    return gap - np.log(np.exp(gap).sum(-1, keepdims=True))


def weigh(p, x):
    return np.where(p == 0, 0.0, p * np.where(p == 0, 0.0, x))


def divergence(name, li, lj, beta):
    """D, dD/dl_i and dD/dl_j (up to multiples of q) for one pair, each [N, C] before summing."""
    qi, qj = np.exp(li), np.exp(lj)
    if name == "forward_kl":
        return weigh(qj, lj - li), -qj, weigh(qj, lj - li)
    if name == "reverse_kl":
        return weigh(qi, li - lj), weigh(qi, li - lj), -qi
    if name == "soft_ce":
        return -weigh(qj, li), -qj, -weigh(qj, li)
    lm = np.log(np.maximum(beta * qj + (1 - beta) * qi, 1e-300))
    teacher, student = beta * weigh(qj, lj - lm), (1 - beta) * weigh(qi, li - lm)
    return teacher + student, student, teacher


def named_weights(name, exits, width):
    w = np.zeros((exits, width))
    for i, j in itertools.product(range(exits), range(exits)):
        w[i, j] = {
            "none": 0.0,
            "mutual": (i != j) / max(1, exits - 1),
            "last": float(i < j == exits - 1),
            "deeper": (j > i) / max(1, exits - 1 - i),
            "next": float(j == i + 1),
        }[name]
    return w


class Call:
    """Arguments, buffers and expected results of one call of the loss family."""

    def __init__(self, dtype, exits, teachers, rows, classes, pairs, name, **options):
        self.dtype, self.exits, self.rows, self.classes = dtype, exits, rows, classes
        self.pairs, self.name, self.real = pairs, name, real_of(dtype)
        o = self.options = {
            "t": 2.0, "squared": True, "detach": True, "beta": 0.3, "smoothing": 0.0, "mean": True,
            "normalizer": 0.0, "scale": 0.7, "target": "label", "class_weight": False,
            "exit_weight": 0, "pair_rows": False, "matrix": False, "gap": 1, "masked": False,
            "ignored": True,
        } | options  # fmt: skip
        width = exits + teachers
        z = random.normal(size=(width, rows, classes)) * 2.0
        if o["masked"] and classes > 1:
            z[:, :, 0] = -np.inf
        stored = [strided(x, dtype, o["gap"] * (k % 2)) for k, x in enumerate(z)]
        self.buffers, self.strides = [b for b, _ in stored], [s for _, s in stored]
        self.z = np.stack([decode(encode(x, dtype), dtype) for x in z])
        self.label = random.integers(int(o["masked"] and classes > 1), classes, rows)
        if rows > 1:
            self.label[0], self.label[-1] = classes - 1, int(o["masked"] and classes > 1)
        if rows > 2 and o["ignored"]:
            self.label[1] = -100
        self.target = self.real(random.dirichlet(np.ones(classes), rows))
        if o["masked"] and classes > 1:
            self.target[:, 0] = 0.0
        positive = lambda *shape: self.real(random.uniform(0.2, 1.0, shape))  # noqa: E731
        self.class_weight = positive(classes) if o["class_weight"] else None
        shape = {0: None, 1: (exits,), 2: (exits, rows)}[o["exit_weight"]]
        self.exit_weight = positive(*shape) if shape else None
        self.weight = None
        if pairs == "dense":
            self.weight = positive(exits, width, *([rows] if o["pair_rows"] else []))
        self.upstream = [self.real(random.normal(size=(exits, rows))) for _ in range(2)]

    def arguments(self, form, outputs, gradients, threads=1, **lies):
        o, address = self.options, lambda a: 0 if a is None else a.ctypes.data
        labelled = o["target"] == "label"
        self.held = [np.array(self.label), self.target.copy()]
        rows = lies.get("rows", self.rows)
        return (
            form, DTYPES.index(self.dtype), threads, self.exits, rows,
            lies.get("classes", self.classes),
            [b.ctypes.data for b in self.buffers], self.strides,
            [address(g) for g in gradients],
            address(self.held[0]) if labelled else 0,
            address(self.held[1]) if o["target"] == "probabilities" else 0,
            address(self.exit_weight), o["exit_weight"] == 2, PAIRS.index(self.pairs),
            address(self.weight), o["pair_rows"], o["scale"], o["t"], o["squared"],
            DIVERGENCES.index(self.name), o["beta"], o["detach"], address(self.class_weight),
            -100, o["smoothing"], o["mean"], o["normalizer"], [address(x) for x in outputs],
        )  # fmt: skip

    def expected(self, backward=None):
        """ce [K, N], divergence parts [K, N], D [K, K + E, N] and dL/dz [K, N, C]."""
        o, K, N, C = self.options, self.exits, self.rows, self.classes
        width = len(self.z)
        valid = np.ones(N, bool)
        mass = np.zeros((N, C))
        weight = np.ones(C) if self.class_weight is None else self.class_weight.astype(float)
        if o["target"] == "label":
            valid = self.label != -100
            mass[np.arange(N)[valid], self.label[valid]] = 1.0
        elif o["target"] == "probabilities":
            mass = self.target.astype(float)
        if o["target"] is not None:
            mass = (mass * (1 - o["smoothing"]) + o["smoothing"] / C) * weight
            if o["target"] == "label":  # the label's share is weighed as a whole
                mass[~valid] = 0.0
        r_rows = 1.0 / max(1, valid.sum())
        labels = valid.sum()
        if o["target"] == "label" and self.class_weight is not None:
            labels = weight[self.label[valid]].sum()
        r_ce = 1.0 / labels if labels else 0.0
        means = (r_ce, r_rows)
        if o["normalizer"]:
            r_ce = r_rows = 1.0 / o["normalizer"]
        elif not o["mean"]:
            r_ce = r_rows = 1.0
        a = np.ones((K, N))
        if self.exit_weight is not None:
            a = np.broadcast_to(self.exit_weight.reshape(K, -1).astype(float), (K, N))
        W = named_weights(self.pairs, K, width) if self.weight is None else self.weight
        W = np.broadcast_to(W.astype(float).reshape(K, width, -1), (K, width, N)) * valid
        s = o["scale"] * (o["t"] ** 2 if o["squared"] else 1.0)
        lp, lq = log_softmax(self.z[:K]), log_softmax(self.z / o["t"])
        ce = -weigh(mass, lp).sum(-1) * valid
        of_ce, of_d = backward if backward else (np.full((K, N), r_ce), np.full((K, N), r_rows))
        g = ((of_ce * a)[..., None] * (mass.sum(-1, keepdims=True) * np.exp(lp) - mass)) * valid[
            :, None
        ]
        D, h = np.zeros((K, width, N)), np.zeros((K, N, C))
        for i, j in itertools.product(range(K), range(width)):
            d, hi, hj = divergence(self.name, lq[i], lq[j], o["beta"])
            D[i, j] = d.sum(-1) * valid
            coefficient = (W[i, j] * s * of_d[i])[:, None]
            h[i] += coefficient * hi
            if not o["detach"] and j < K:
                h[j] += coefficient * hj
        g += (h - np.exp(lq[:K]) * h.sum(-1, keepdims=True)) / o["t"]
        part = s * (W * D).sum(1)
        return {
            "loss": (r_ce * a * ce).sum() + (r_rows * part).sum(), "ce": ce, "a": a, "part": part,
            "D": D, "gradient": g, "means": means,
        }  # fmt: skip


def close(what, found, expected, dtype, scale=1.0):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = np.abs(found - expected)
    limit = TOLERANCE[dtype] * (np.abs(expected) + scale)
    if not (error <= limit).all():
        worst = np.unravel_index(np.argmax(np.nan_to_num(error, nan=np.inf)), error.shape)
        sys.exit(f"WRONG {what} at {worst}: {found[worst]}, expected {expected[worst]}")


def check(module, call, threads):
    K, N, C, real = call.exits, call.rows, call.classes, call.real
    before = [b.copy() for b in call.buffers]
    storage = np.uint16 if call.dtype == "bfloat16" else call.dtype
    width = len(call.z)
    gradients = [np.empty((N, C), storage) if k != 1 else None for k in range(K)]
    outputs = [np.empty((), real), np.empty(K, real), np.empty(K, real)]
    outputs += [np.empty((K, width), real) if call.options["matrix"] else None]
    outputs += [np.empty((K, N), np.int64), np.empty((K, N), real)]
    status, _ = module.loss(*call.arguments(SCALAR, outputs, gradients, threads))
    assert status == 0, status
    e = call.expected()
    what = f"{call.dtype} {call.pairs} {call.name} K={K} N={N} C={C} {call.options}"
    value = "float32" if real == np.float32 else "float64"
    close("loss " + what, outputs[0], e["loss"], value)
    close("ce " + what, outputs[1], e["means"][0] * e["ce"].sum(-1), value)
    close("divergence " + what, outputs[2], e["means"][1] * e["part"].sum(-1), value)
    if call.options["matrix"]:
        close("matrix " + what, outputs[3], e["means"][1] * e["D"].sum(-1), value)
    if N:
        assert (outputs[4] == call.z[:K].argmax(-1)).all()
        close("confidence " + what, outputs[5], np.exp(log_softmax(call.z[:K])).max(-1), value)
    for k, g in enumerate(gradients):
        if g is not None:
            close(f"gradient {k} {what}", decode(g, call.dtype), e["gradient"][k], call.dtype, 0.5)
    rows = [np.empty((K, N), real) for _ in range(2)]
    assert module.loss(*call.arguments(ROWS, rows, [], threads))[0] == 0
    close("row ce " + what, rows[0], e["a"] * e["ce"], value)
    close("row divergence " + what, rows[1], e["part"], value)
    assert module.loss(*call.arguments(ROWS_BACKWARD, call.upstream, gradients, threads))[0] == 0
    e = call.expected([u.astype(float) for u in call.upstream])
    for k, g in enumerate(gradients):
        if g is not None:
            close(
                f"row gradient {k} {what}", decode(g, call.dtype), e["gradient"][k], call.dtype, 4.0
            )
    for b, kept in zip(call.buffers, before, strict=True):
        assert (b.view(np.uint8) == kept.view(np.uint8)).all(), "inputs were written to"


def check_softmax(module, dtype, exits, rows, classes, log):
    t, z = 1.7, random.normal(size=(exits, rows, classes)) * 2.0
    stored = [strided(x, dtype, k % 2) for k, x in enumerate(z)]
    z = np.stack([decode(encode(x, dtype), dtype) for x in z])
    out = [np.empty_like(encode(x, dtype)) for x in z]
    code = DTYPES.index(dtype)
    tables = [b.ctypes.data for b, _ in stored], [s for _, s in stored]
    end = [o.ctypes.data for o in out]
    assert module.softmax(False, code, 1, rows, classes, t, log, *tables, [], [], end) == 0
    l = log_softmax(z / t)
    p = np.exp(l)
    for k in range(exits):
        close("softmax", decode(out[k], dtype), l[k] if log else p[k], dtype)
    g = random.normal(size=z.shape)
    upstream = [strided(x, dtype, 2) for x in g]
    grads = [np.empty_like(o) for o in out]
    assert module.softmax(
        True, code, 1, rows, classes, t, log, end, [classes] * exits,
        [b.ctypes.data for b, _ in upstream], [s for _, s in upstream],
        [o.ctypes.data for o in grads],
    ) == 0  # fmt: skip
    full = g - p * g.sum(-1, keepdims=True) if log else p * (g - (g * p).sum(-1, keepdims=True))
    for k in range(exits):
        scale = max(1.0, classes**0.5)
        close("softmax gradient", decode(grads[k], dtype), full[k] / t, dtype, scale)


def check_statistics(module, dtype, exits, rows, classes):
    z = random.normal(size=(exits, rows, classes)) * 2.0
    stored = [strided(x, dtype, k % 2) for k, x in enumerate(z)]
    z = np.stack([decode(encode(x, dtype), dtype) for x in z])
    real = real_of(dtype)
    outputs = [np.empty((exits, rows), np.int64 if i == 2 else real) for i in range(6)]
    assert module.statistics(
        DTYPES.index(dtype), 1, rows, classes, [b.ctypes.data for b, _ in stored],
        [s for _, s in stored], [o.ctypes.data for o in outputs],
    ) == 0  # fmt: skip
    if not rows:
        return
    l = log_softmax(z)
    p = np.sort(np.exp(l), -1)
    margin = p[..., -1] - p[..., -2] if classes > 1 else np.ones_like(p[..., 0])
    expected = (z.max(-1) - l.max(-1), p[..., -1], z.argmax(-1), margin, -(np.exp(l) * l).sum(-1))
    value = "float32" if real == np.float32 else "float64"
    for found, true in zip(outputs, (*expected, (p * p).sum(-1)), strict=True):
        close("statistics", found, true, value)


MEASURES = 7  # confidence, margin, entropy, normalised entropy, max logit, patience, a given score


def check_gate(module, dtype, exits, rows, classes, measure):
    """Inside its buffers, and consistent: values are compared with float64 elsewhere."""
    z = random.normal(size=(exits, rows, classes)) * 2.0
    stored = [strided(x, dtype, k % 2) for k, x in enumerate(z)]
    real, code = real_of(dtype), DTYPES.index(dtype)
    index, prediction, stay, previous = (np.zeros(rows, np.int64) for _ in range(4))
    score, streak, given = np.empty(rows, real), np.ones(rows, real), np.ones((exits, rows), real)
    count = np.empty((), np.int64)
    tables = ([b.ctypes.data for b, _ in stored], [s for _, s in stored], [2.0], [0.5])
    own = given.ctypes.data if measure == 6 else 0
    assert module.gate(
        False, code, 2, measure, rows, rows, classes, *tables, own, 0, 0,
        [o.ctypes.data for o in (prediction, score, index)],
    ) == 0  # fmt: skip
    assert (index < exits).all()
    live = max(rows - 1, 0)
    tables = tuple(t[:1] for t in tables)
    memory = (previous.ctypes.data, streak.ctypes.data) if measure == 5 else (0, 0)
    assert module.gate(
        True, code, 2, measure, rows, live, classes, *tables, own, *memory,
        [o.ctypes.data for o in (prediction, score, stay, count)],
    ) == 0  # fmt: skip
    assert sorted(stay) == list(range(rows))
    assert (stay[:count] < live).all()
    assert (prediction[:live] >= 0).all()


def check_copy(module, rows, sizes):
    source = [random.integers(0, 255, (rows, n)).astype(np.uint8) for n in sizes]
    target, back = ([np.zeros((rows, n), np.uint8) for n in sizes] for _ in range(2))
    index = random.permutation(rows).astype(np.int64)
    for scatter, a, b in ((False, source, target), (True, target, back)):
        assert module.copy_rows(
            scatter, 2, rows, rows, rows, index.ctypes.data, [x.ctypes.data for x in a],
            [x.ctypes.data for x in b], sizes, sizes, sizes,
        ) == (0, 0)  # fmt: skip
    for x, y in zip(source, back, strict=True):
        assert (x == y).all()


def check_scale(module, dtype, sizes):
    data = [random.normal(size=n) for n in sizes]
    stored = [encode(x, dtype) for x in data]
    data = [decode(x, dtype) for x in stored]
    code = DTYPES.index(dtype)
    assert module.scale(code, 1, 1.5, [x.ctypes.data for x in stored], list(sizes)) == 0
    for x, y in zip(stored, data, strict=True):
        close("scale", decode(x, dtype), 1.5 * y, dtype)


# Every pair of options occurs; sizes end before, on and after whole vectors.
LOSSES = [
    {},
    {"t": 1.0, "squared": False, "normalizer": 3.0, "class_weight": True},
    {"t": 3.0, "smoothing": 0.1, "mean": False, "exit_weight": 1},
    {"t": 4.0, "target": "probabilities", "exit_weight": 2, "gap": 5, "masked": True},
    {"t": 1.3, "target": None, "detach": False, "matrix": True, "pair_rows": True},
    {"t": 0.5, "detach": False, "target": "probabilities", "smoothing": 0.2, "class_weight": True},
    {"matrix": True, "masked": True, "pair_rows": True, "ignored": False},
]
SIZES = [
    (2, 3, 1), (1, 2, 2), (3, 19, 5), (2, 3, 8), (4, 2, 17), (2, 1, 31), (3, 0, 4), (2, 3, 67),
    (2, 35, 9), (3, 21, 45),
]  # fmt: skip


def losses():
    picks = itertools.cycle(itertools.product(LOSSES, SIZES))
    for dtype, pairs, name in itertools.product(DTYPES, PAIRS, DIVERGENCES):
        for _ in range(3):
            options, (exits, rows, classes) = next(picks)
            if pairs != "dense":
                options = options | {"pair_rows": False}
            pairs = pairs if exits > 1 or pairs == "dense" else "none"  # as the package asks
            teachers = 2 if pairs == "dense" else 0
            yield Call(dtype, exits, teachers, rows, classes, pairs, name, **options)
    for dtype in DTYPES:  # by windows, with exponentials taken again, and with the most rows
        yield Call(dtype, 3, 0, 2, 7681, "mutual", "forward_kl", t=2.5, smoothing=0.1)
        yield Call(dtype, 3, 0, 1, 41203, "mutual", "forward_kl", t=3.0, masked=True)
        yield Call(dtype, 2, 1, 1, 41203, "dense", "soft_ce", t=1.5)
        yield Call(dtype, 1, 0, 1, 122893, "none", "forward_kl")
        yield Call(dtype, 2, 1, 2, 11003, "dense", "jsd", detach=False, matrix=True)
        yield Call(dtype, 32, 32, 1, 3, "dense", "forward_kl")
    for dtype in DTYPES:  # short rows that stay where they are, with and without gradients
        yield Call(dtype, 3, 0, 37, 131, "mutual", "forward_kl", t=2.5, masked=True)
        yield Call(dtype, 5, 0, 21, 133, "last", "soft_ce", t=3.0, masked=True, exit_weight=2)
        yield Call(dtype, 2, 2, 19, 135, "dense", "forward_kl", target=None)
        yield Call(dtype, 2, 0, 17, 137, "none", "forward_kl", class_weight=True)
    # Two sweeps, before each of which a window of exponentials is refilled.
    yield Call("float64", 5, 0, 1, 106003, "mutual", "reverse_kl", t=2.5)


def everything(module):
    count = 0
    for isa in module.isas():
        module.use_isa(isa)
        for call in losses():
            count += 1
            check(module, call, threads=1 + count % 2)
        for dtype, (exits, rows, classes) in itertools.product(DTYPES, SIZES):
            for log in (False, True):
                check_softmax(module, dtype, exits, rows, classes, log)
            check_statistics(module, dtype, exits, rows, classes)
            for measure in range(MEASURES):
                check_gate(module, dtype, exits, rows, classes, measure)
            check_scale(module, dtype, (classes, rows * classes, 16385))
        for dtype, measure in itertools.product(DTYPES, range(MEASURES)):
            check_gate(module, dtype, 1, 2, 8193, measure)
        check_copy(module, 7, [1, 4, 8, 33, 0])
    print("isas", *module.isas(), "calls", count)


def lie(module, what):
    module.use_isa("baseline")  # the sanitizer does not see through masked loads
    call = Call("float32", 2, 0, 3, 5, "mutual", "forward_kl", gap=0)
    outputs = [np.empty((), np.float32), np.empty(2, np.float32), np.empty(2, np.float32), None]
    outputs += [np.empty((2, 16), np.int64), np.empty((2, 16), np.float32)]
    gradients = [np.empty((3, 5), np.float32) for _ in range(2)]
    if what == "rows":  # one more row than the buffers hold
        call.label = np.append(call.label, 0)
        module.loss(*call.arguments(SCALAR, outputs, gradients, rows=4))
    elif what == "classes":
        module.loss(*call.arguments(SCALAR, outputs, gradients, classes=6))
    elif what == "gradient":
        gradients = [np.empty((3, 5), np.float32), np.empty((3, 4), np.float32)]
        module.loss(*call.arguments(SCALAR, outputs, gradients))
    elif what == "statistics":
        outputs = [np.empty((1, 2), np.int64 if i == 2 else np.float32) for i in range(6)]
        z = np.zeros(9, np.float32)
        module.statistics(0, 1, 2, 5, [z.ctypes.data], [5], [o.ctypes.data for o in outputs])
    elif what == "gate":
        stay, count = np.empty(3, np.int64), np.empty((), np.int64)
        outputs = (np.empty(2, np.int64), np.empty(2, np.float32), stay, count)
        z = np.zeros(15, np.float32)
        addresses = [o.ctypes.data for o in outputs]
        module.gate(True, 0, 1, 0, 3, 3, 5, [z.ctypes.data], [5], [1.0], [0.5], 0, 0, 0, addresses)
    elif what == "copy":
        x, index = np.zeros(8, np.uint8), np.arange(3)
        where = ([x.ctypes.data], [x.ctypes.data + 4], [4], [4], [4])
        module.copy_rows(False, 1, 3, 3, 3, index.ctypes.data, *where)
    print("not noticed", what)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import _cpu

    np.seterr(invalid="ignore", divide="ignore")  # what masks leave out is computed all the same
    if len(sys.argv) > 2:
        lie(_cpu, sys.argv[2])
    else:
        everything(_cpu)
