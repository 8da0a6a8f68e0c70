// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of one translation unit against scalar formulas in double, without Python:
// for vector widths and processors that the machine running the tests may not have.
// Compiled with MSDKERN_ISA as kernels.cpp was; with DRIVER_DISPATCH it calls through the C ABI.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "cpu/kernels.h"

#ifdef DRIVER_DISPATCH
static const msdkern_kernels K = {
    msdkern_cpu_loss,    msdkern_cpu_row_losses,       msdkern_cpu_row_losses_backward,
    msdkern_cpu_softmax, msdkern_cpu_softmax_backward, msdkern_cpu_statistics,
    msdkern_cpu_exit_gate, msdkern_cpu_gate_step, msdkern_cpu_gather_rows, msdkern_cpu_scatter_rows,
    msdkern_cpu_scale};
#else
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
extern const msdkern_kernels JOIN(msdkern_kernels_, MSDKERN_ISA);
static const msdkern_kernels &K = JOIN(msdkern_kernels_, MSDKERN_ISA);
#endif

typedef std::vector<double> Row;
static const char *now = "";
static int checks = 0, wrong = 0;

static void same(const char *what, double found, double expected, double limit) {
    ++checks;
    if (fabs(found - expected) <= limit * (1 + fabs(expected))) return;
    if (++wrong <= 20) printf("WRONG %s %s: %.9g, expected %.9g\n", now, what, found, expected);
}

static double uniform() { return rand() / (RAND_MAX + 1.0) * 4 - 2; }

// Storage, by dtype code: values that every dtype holds exactly come back as they went.
struct Buffer {
    int dtype;
    std::vector<unsigned char> bytes;
    Buffer(int d, size_t n) : dtype(d), bytes(n * width(d)) {}
    static size_t width(int d) { return d == MSDKERN_F64 ? 8 : d == MSDKERN_F32 ? 4 : 2; }
    template <class T>
    T *as() {
        return reinterpret_cast<T *>(bytes.data());
    }
    void set(size_t i, double v) {
        if (dtype == MSDKERN_F64) as<double>()[i] = v;
        if (dtype == MSDKERN_F32) as<float>()[i] = float(v);
        if (dtype == MSDKERN_BF16) as<uint16_t>()[i] = uint16_t(bits(float(v)) >> 16);
        if (dtype == MSDKERN_F16) {  // normal halves, exactly
            const uint32_t u = bits(float(v));
            const int e = int(u >> 23 & 255) - 112;
            const uint32_t h = e <= 0 ? 0 : uint32_t(e) << 10 | (u >> 13 & 1023);
            as<uint16_t>()[i] = uint16_t((u >> 16 & 0x8000) | h);
        }
    }
    double get(size_t i) {
        if (dtype == MSDKERN_F64) return as<double>()[i];
        if (dtype == MSDKERN_F32) return as<float>()[i];
        const uint16_t h = as<uint16_t>()[i];
        float f;
        if (dtype == MSDKERN_BF16) {
            const uint32_t u = uint32_t(h) << 16;
            memcpy(&f, &u, 4);
            return f;
        }
        const int e = h >> 10 & 31;
        const double m = e ? ldexp(1024 + (h & 1023), e - 25) : ldexp(h & 1023, -24);
        return h & 0x8000 ? -m : m;
    }
    static uint32_t bits(float f) {
        uint32_t u;
        memcpy(&u, &f, 4);
        return u;
    }
};

static double tolerance(int dtype) {
    return dtype == MSDKERN_F64 ? 1e-11 : dtype == MSDKERN_F32 ? 2e-5 : dtype == MSDKERN_F16 ? 2e-3 : 1e-2;
}

static Row log_softmax(const Row &z, double t) {
    double m = z[0], sum = 0;
    for (double x : z) m = fmax(m, x);
    for (double x : z) sum += exp((x - m) / t);
    Row l;
    for (double x : z) l.push_back((x - m) / t - log(sum));
    return l;
}

static double weight(int pairs, int i, int j, int exits, const Row &dense, int width) {
    switch (pairs) {
        case MSDKERN_PAIRS_MUTUAL:
            return i != j && j < exits ? 1.0 / (exits - 1) : 0;
        case MSDKERN_PAIRS_LAST:
            return i < j && j == exits - 1;
        case MSDKERN_PAIRS_DEEPER:
            return j > i && j < exits ? 1.0 / (exits - 1 - i) : 0;
        case MSDKERN_PAIRS_NEXT:
            return j == i + 1 && j < exits;
        case MSDKERN_PAIRS_DENSE:
            return dense[i * width + j];
        default:
            return 0;
    }
}

// Value, and its derivatives in l_i and l_j, of one class of one pair.
struct Term {
    double value, student, teacher;
};
static Term term(int divergence, double li, double lj, double beta) {
    const double qi = exp(li), qj = exp(lj), lm = log(beta * qj + (1 - beta) * qi);
    if (divergence == MSDKERN_FORWARD_KL) return {qj * (lj - li), -qj, qj * (lj - li)};
    if (divergence == MSDKERN_REVERSE_KL) return {qi * (li - lj), qi * (li - lj), -qi};
    if (divergence == MSDKERN_SOFT_CE) return {-qj * li, -qj, -qj * li};
    const double a = beta * qj * (lj - lm), b = (1 - beta) * qi * (li - lm);
    return {a + b, b, a};
}

struct Shape {
    int exits, teachers, rows, classes;
};

static void loss(int dtype, Shape s, int pairs, int divergence, bool detach, double t) {
    const int width = s.exits + s.teachers, N = s.rows, C = s.classes;
    const bool wide = dtype == MSDKERN_F64;
    std::vector<Buffer> logits, gradient;
    for (int r = 0; r < width; ++r) logits.emplace_back(dtype, size_t(N * C));
    for (int k = 0; k < s.exits; ++k) gradient.emplace_back(dtype, size_t(N * C));
    for (Buffer &b : logits)
        for (int i = 0; i < N * C; ++i) b.set(i, floor(uniform() * 64) / 64);
    const int real = wide ? MSDKERN_F64 : MSDKERN_F32;
    Buffer value(real, 1), ce(real, s.exits), div(real, s.exits), confidence(real, s.exits * N);
    Buffer dense(real, size_t(s.exits * width));
    Row w;
    for (int i = 0; i < s.exits * width; ++i) {
        w.push_back(floor((uniform() + 2.5) * 64) / 64);
        dense.set(i, w.back());
    }
    std::vector<int64_t> label(N), prediction(s.exits * N);
    for (int n = 0; n < N; ++n) label[n] = n == 1 ? -100 : (n * 7 + C - 1) % C;
    msdkern_loss call = {};
    call.dtype = dtype, call.exits = s.exits, call.teachers = s.teachers, call.place.threads = 2;
    call.rows = N, call.classes = C, call.pairs = pairs, call.divergence = divergence;
    for (int r = 0; r < width; ++r) call.logits[r] = logits[r].bytes.data(), call.stride[r] = C;
    for (int k = 0; k < s.exits; ++k) call.gradient[k] = gradient[k].bytes.data();
    call.label = label.data(), call.ignore_index = -100, call.pair_weight = dense.bytes.data();
    call.temperature = t, call.pair_scale = 0.5, call.beta = 0.25, call.temperature_squared = 1;
    call.detach_teacher = detach, call.mean = 1;
    call.loss = value.bytes.data(), call.cross_entropy = ce.bytes.data();
    call.divergence_mean = div.bytes.data(), call.confidence = confidence.bytes.data();
    call.prediction = prediction.data();
    same("status", K.loss(&call), MSDKERN_OK, 0);

    const double r = 1.0 / (N > 1 ? N - 1 : N), scale = 0.5 * t * t;
    double total = 0;
    for (int n = 0; n < N; ++n) {
        if (n == 1) continue;
        std::vector<Row> z(width), l(width), h(s.exits, Row(C));
        for (int k = 0; k < width; ++k) {
            for (int c = 0; c < C; ++c) z[k].push_back(logits[k].get(n * C + c));
            l[k] = log_softmax(z[k], t);
        }
        for (int i = 0; i < s.exits; ++i)
            for (int j = 0; j < width; ++j) {
                const double a = r * scale * weight(pairs, i, j, s.exits, w, width);
                for (int c = 0; a != 0 && c < C; ++c) {
                    const Term x = term(divergence, l[i][c], l[j][c], call.beta);
                    total += a * x.value;
                    h[i][c] += a * x.student;
                    if (!detach && j < s.exits) h[j][c] += a * x.teacher;
                }
            }
        for (int k = 0; k < s.exits; ++k) {
            const Row p = log_softmax(z[k], 1);
            double sum = 0;
            for (double x : h[k]) sum += x;
            total -= r * p[label[n]];
            for (int c = 0; c < C; ++c) {
                const double g = r * (exp(p[c]) - (c == label[n])) + (h[k][c] - exp(l[k][c]) * sum) / t;
                same("gradient", gradient[k].get(n * C + c), g, tolerance(dtype));
            }
        }
    }
    same("loss", value.get(0), total, wide ? 1e-11 : 2e-5);
}

static void statistics(int dtype, int N, int C) {
    Buffer z(dtype, size_t(N * C)), y(dtype, size_t(N * C));
    for (int i = 0; i < N * C; ++i) z.set(i, floor(uniform() * 16) / 16);  // ties occur
    const int real = dtype == MSDKERN_F64 ? MSDKERN_F64 : MSDKERN_F32;
    std::vector<Buffer> out(5, Buffer(real, N));
    std::vector<int64_t> prediction(N);
    msdkern_statistics call = {};
    call.dtype = dtype, call.exits = 1, call.place.threads = 1, call.rows = N, call.classes = C;
    call.logits[0] = z.bytes.data(), call.stride[0] = C, call.prediction = prediction.data();
    void **fields[] = {&call.lse, &call.confidence, &call.margin, &call.entropy, &call.sum_squares};
    for (int i = 0; i < 5; ++i) *fields[i] = out[i].bytes.data();
    same("status", K.statistics(&call), MSDKERN_OK, 0);
    msdkern_softmax soft = {};
    soft.dtype = dtype, soft.exits = 1, soft.place.threads = 1, soft.rows = N, soft.classes = C;
    soft.temperature = 2, soft.input[0] = z.bytes.data(), soft.stride[0] = C;
    soft.output[0] = y.bytes.data();
    same("status", K.softmax(&soft), MSDKERN_OK, 0);
    for (int n = 0; n < N; ++n) {
        Row row;
        for (int c = 0; c < C; ++c) row.push_back(z.get(n * C + c));
        const Row l = log_softmax(row, 1), half = log_softmax(row, 2);
        int best = 0;
        double entropy = 0, squares = 0, second = 0;
        for (int c = 1; c < C; ++c)
            if (row[c] > row[best]) best = c;
        for (int c = 0; c < C; ++c) {
            entropy -= exp(l[c]) * l[c], squares += exp(2 * l[c]);
            if (c != best) second = fmax(second, exp(l[c]));
            same("softmax", y.get(n * C + c), exp(half[c]), tolerance(dtype));
        }
        const double expected[] = {row[best] - l[best], exp(l[best]), exp(l[best]) - second, entropy, squares};
        for (int i = 0; i < 5; ++i) same("statistics", out[i].get(n), expected[i], tolerance(real));
        same("prediction", double(prediction[n]), best, 0);
    }
}

static double measured(int measure, const Row &row, double t) {
    const Row l = log_softmax(row, t);
    double best = row[0], first = 0, second = 0, entropy = 0;
    for (size_t c = 0; c < row.size(); ++c) {
        const double p = exp(l[c]);
        best = fmax(best, row[c]), entropy -= p * l[c];
        if (p > first) second = first, first = p;
        else if (p > second) second = p;
    }
    const double normal = row.size() > 1 ? log(double(row.size())) : 1;
    const double all[] = {first, first - second, entropy, entropy / normal, best / t};
    return all[measure];
}

static void gates(int dtype, int N, int C, int measure, double t) {
    Buffer z(dtype, size_t(2 * N * C));
    for (int i = 0; i < 2 * N * C; ++i) z.set(i, floor(uniform() * 64) / 64);
    const bool low = measure == MSDKERN_ENTROPY || measure == MSDKERN_NORMALIZED_ENTROPY;
    const int real = dtype == MSDKERN_F64 ? MSDKERN_F64 : MSDKERN_F32;
    std::vector<double> scores;
    for (int i = 0; i < 2 * N; ++i) {
        Row row;
        for (int c = 0; c < C; ++c) row.push_back(z.get(size_t(i * C + c)));
        scores.push_back(measured(measure, row, t));
    }
    Buffer score(real, size_t(N));
    std::vector<int64_t> prediction(N), stay(N), index(N);
    int64_t count = -1;
    msdkern_gate call = {};
    call.dtype = dtype, call.exits = 1, call.place.threads = 2, call.measure = measure;
    call.rows = call.live = N, call.classes = C;
    for (int k = 0; k < 2; ++k) {
        call.logits[k] = z.bytes.data() + size_t(k * N * C) * Buffer::width(dtype);
        call.stride[k] = C, call.temperature[k] = t, call.threshold[k] = scores[0] + 1e-3;
    }
    call.prediction = prediction.data(), call.score = score.bytes.data();
    call.stay = stay.data(), call.count = &count, call.exit_index = index.data();
    same("status", K.gate_step(&call), MSDKERN_OK, 0);
    std::vector<int64_t> expected, others;
    for (int n = 0; n < N; ++n) {
        same("score", score.get(n), scores[n], tolerance(real));
        const bool fires = low ? scores[n] <= call.threshold[0] : scores[n] >= call.threshold[0];
        (fires ? others : expected).push_back(n);
    }
    same("count", double(count), double(expected.size()), 0);
    expected.insert(expected.end(), others.begin(), others.end());
    for (int n = 0; n < N; ++n) same("stay", double(stay[n]), double(expected[n]), 0);
    call.exits = 2;
    same("status", K.exit_gate(&call), MSDKERN_OK, 0);
    for (int n = 0; n < N; ++n) {
        const bool fires = low ? scores[n] <= call.threshold[0] : scores[n] >= call.threshold[0];
        same("exit", double(index[n]), fires ? 0 : 1, 0);
        same("score", score.get(n), scores[fires ? n : N + n], tolerance(real));
    }
}

static void copies(int N, int bytes) {
    std::vector<unsigned char> source(N * bytes), target(N * bytes, 7), back(N * bytes, 9);
    for (size_t i = 0; i < source.size(); ++i) source[i] = (unsigned char)(i * 31);
    std::vector<int64_t> index;
    for (int n = N - 1; n >= 0; --n) index.push_back(n);
    msdkern_copy call = {};
    call.tensors = 1, call.place.threads = 2, call.count = N - 1, call.capacity = N, call.limit = N;
    call.index = index.data(), call.bytes[0] = bytes;
    call.source[0] = source.data(), call.target[0] = target.data();
    call.source_stride[0] = call.target_stride[0] = bytes;
    same("status", K.gather_rows(&call), MSDKERN_OK, 0);
    call.source[0] = target.data(), call.target[0] = back.data();
    same("status", K.scatter_rows(&call), MSDKERN_OK, 0);
    for (int i = 0; i < N * bytes; ++i) {
        same("past the count", target[(N - 1) * bytes + i % bytes], 0, 0);
        same("back", back[i], i < bytes ? 9 : source[i], 0);
    }
    index[0] = N;
    same("status", K.gather_rows(&call), MSDKERN_BAD_INDEX, 0);
    same("bad index", double(call.bad_index), N, 0);
}

int main() {
    const Shape shapes[] = {{3, 0, 3, 1}, {2, 0, 2, 5}, {4, 0, 2, 16}, {3, 0, 2, 37}, {2, 0, 2, 2801}};
    char name[96];
    now = name;
    for (int dtype = 0; dtype < 4; ++dtype)
        for (int pairs = 0; pairs <= MSDKERN_PAIRS_DENSE; ++pairs)
            for (int divergence = 0; divergence < 4; ++divergence)
                for (int detach = 0; detach < 2; ++detach)
                    for (Shape s : shapes) {
                        if (pairs == MSDKERN_PAIRS_DENSE) s.teachers = 2;
                        const double t = (divergence + detach) % 2 ? 3 : 1.5;
                        snprintf(name, sizeof name, "dtype %d pairs %d divergence %d C %d", dtype,
                                 pairs, divergence, s.classes);
                        loss(dtype, s, pairs, divergence, detach != 0, t);
                    }
    for (int dtype = 0; dtype < 4; ++dtype)
        for (int classes : {1, 2, 15, 16, 17, 63, 131}) statistics(dtype, 3, classes);
    for (int dtype = 0; dtype < 4; ++dtype)
        for (int measure = 0; measure <= MSDKERN_MAX_LOGIT; ++measure)
            for (int classes : {1, 2, 15, 16, 17, 63, 131, 2801})
                gates(dtype, 5, classes, measure, measure % 2 ? 1.5 : 1);
    for (int bytes : {1, 3, 4, 8, 24, 513}) copies(6, bytes);
    printf("%d checks, %d wrong\n", checks, wrong);
    return wrong != 0;
}
