# SPDX-License-Identifier: Apache-2.0
"""The row formulas, one tile of classes at a time; numbers as in msdkern/reference.py.

The counterpart of csrc/math.h. Student i, teacher j; q = softmax(z / T), l = log q. "d" is l
relative to a common reference of the same class, which keeps differences between near-identical
exits accurate.
"""

from __future__ import annotations

import triton
import triton.language as tl

FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
SOFT_CE = tl.constexpr(3)


@triton.jit
def weigh(p, x):
    """p x with 0 log 0 = 0: a class without mass adds nothing, also where x is not finite."""
    return p * tl.where(p == 0, 0.0, x)


@triton.jit
def scalar(x, POINTER: tl.constexpr, REAL: tl.constexpr):
    """A number passed by value, or read from the device's memory."""
    if POINTER:
        value = tl.load(x).to(REAL)
    else:
        value = tl.full((), x, REAL)
    return value


@triton.jit
def reciprocal(x):
    """1 / x, and 0 where x is 0: a mean over no rows is 0."""
    return tl.where(x > 0, 1 / tl.where(x > 0, x, 1), 0)


@triton.jit
def positive(x):
    """A number that may be divided by, or NaN: the value is on the device, so nothing can raise."""
    return tl.where((x > 0) & (x < float("inf")), x, float("nan"))


@triton.jit
def scales(
    temperature, pair_scale, POINTERS: tl.constexpr, SQUARED: tl.constexpr,
    DIVERGENT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """(3) T, s, and 1 / T, which is 1 where there is no divergence."""
    t = positive(scalar(temperature, POINTERS & 1, REAL))
    scale = scalar(pair_scale, POINTERS & 2, REAL)
    if SQUARED:
        scale = scale * t * t
    inverse_t = 1 / t if DIVERGENT else tl.full((), 1.0, REAL)
    return t, scale, inverse_t


@triton.jit
def log_of_normal(x):
    """log x of a positive normal number, to 0.9 units of float32's last place. tl.log branches to
    its special cases, and where a kernel takes a hundred logarithms the compiler moves what it
    can past the branches: hundreds of numbers per thread then wait for the last."""
    if x.dtype == tl.float64:
        result = tl.log(x)
    else:
        bits = x.to(tl.int32, bitcast=True)
        power = (bits - 0x3F2AAAAB) & -0x800000  # of 2, so that x is it times 2/3 .. 4/3
        f = (bits - power).to(tl.float32, bitcast=True) - 1
        # log(1 + f) = f + f^2 p(f); p minimises the relative error, 4.5e-9.
        p = tl.fma(f, -0.129489472, 0.140047578)
        p = tl.fma(p, f, -0.121671583)
        p = tl.fma(p, f, 0.140011605)
        p = tl.fma(p, f, -0.166823054)
        p = tl.fma(p, f, 0.200107476)
        p = tl.fma(p, f, -0.249997175)
        p = tl.fma(p, f, 0.333332084)
        p = tl.fma(p, f, -0.500000012)
        n = power.to(tl.float32) * (1.0 / 0x800000)
        result = tl.fma(n, 0.693147181, tl.fma(f * p, f, f))
    return result


@triton.jit
def log_of_sum(s):
    """log of a sum of exponentials, the greatest of which is 1; NaN where there is none."""
    return log_of_normal(s) + (s - s)


@triton.jit
def log_one_plus(x):
    """log(1 + x) for x > -1, accurate for small x: log u corrected by what 1 + x lost."""
    # A ratio of probabilities. Bounded, so that neither end makes inf - inf or 0 / 0; a NaN stays.
    x = tl.where(x > 1e37, 1e37, x)
    u = 1 + x
    u = tl.where(u > 1e-37, u, 1e-37)
    return log_of_normal(u) + (x - (u - 1)) / u


@triton.jit
def log_ratio(a, b):
    """log(a / b), with a relative error only, also where a and b nearly agree."""
    return log_one_plus((a - b) / b)


@triton.jit
def gap_between(inverse_i, inverse_j, gap_i, gap_j):
    """l_j - l_i less x_j - x_i: gap_i - gap_j, but not blurred by a distant reference where the
    normalisers of i and j nearly agree. There log(1 + y) is its series, to float32's last bit."""
    between = gap_i - gap_j
    if between.dtype != tl.float64:  # whose last bits the series does not reach, nor blur does
        y = (inverse_j - inverse_i) / inverse_i
        series = y * (1 - y * (0.5 - y * (1.0 / 3 - y * (0.25 - y * 0.2))))
        between = tl.where(tl.abs(y) < 0.03, series, between)
    return between


@triton.jit
def forward_kl_gradient(q_i, n, mass):
    """(6) sum_j W_ij (q_i - q_j), mass = sum_j W_ij q_j, n = sum_j W_ij; the factor 1 / T is left
    to the caller. The gradient of forward KL, and of soft cross entropy."""
    return n * q_i - mass


@triton.jit
def forward_kl_value(gradient, d_i, mass, moment):
    """(2) sum_j W_ij [q_j (l_j - l_i) + (q_i - q_j)], moment = sum_j W_ij q_j d_j."""
    return (moment - weigh(mass, d_i)) + gradient


@triton.jit
def pair_terms(q_i, q_j, d, l_i, beta, DIVERGENCE: tl.constexpr):
    """(2), (6) One pair, d = l_j - l_i: the value, and the derivatives with respect to l_i and l_j
    up to multiples of q_i and q_j, which the softmax Jacobian removes."""
    if DIVERGENCE == FORWARD_KL:
        f = weigh(q_j, d)
        value, of_student, of_teacher = f + (q_i - q_j), -q_j, f
    elif DIVERGENCE == REVERSE_KL:
        f = weigh(q_i, -d)
        value, of_student, of_teacher = f + (q_j - q_i), f, -q_i
    elif DIVERGENCE == SOFT_CE:
        f = weigh(q_j, l_i)
        value, of_student, of_teacher = -f, -q_j, -f
    else:
        # The corrections (b - a) of the two KL terms cancel. With m = q_j + (1 - beta) (q_i - q_j),
        # log(q / m) = -log1p((m - q) / q).
        alpha = 1 - beta
        teacher_gap = alpha * (q_i - q_j)
        student_gap = -beta * (q_i - q_j)
        # Where q is 0, its logarithm is bounded. Selecting by q == 0 would keep as many predicates
        # as there are elements, of which a thread has seven.
        f_j = -q_j * log_one_plus(teacher_gap / tl.maximum(q_j, 1e-37))
        f_i = -q_i * log_one_plus(student_gap / tl.maximum(q_i, 1e-37))
        value = beta * (f_j + teacher_gap) + alpha * (f_i + student_gap)
        of_student, of_teacher = alpha * f_i, beta * f_j
    return value, of_student, of_teacher


@triton.jit
def softmax_jacobian(h, q, total, inverse_t):
    """(6) dL/dz from h = dL/dl: (h - q sum_c h) / T."""
    return (h - q * total) * inverse_t
