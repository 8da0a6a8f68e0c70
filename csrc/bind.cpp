// SPDX-License-Identifier: Apache-2.0
// pybind11: names and casts only. Addresses arrive as integers; msdkern/executors/native.py is the
// only caller and has checked shapes, dtypes and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "msdkern.h"

#ifndef MSDKERN_SOURCE_HASH
#define MSDKERN_SOURCE_HASH "unknown"
#endif

namespace py = pybind11;

namespace {

typedef std::vector<std::uintptr_t> Addresses;
typedef std::vector<std::int64_t> Numbers;

template <class T>
T *at(std::uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

template <class T, std::size_t N>
void fill(T *(&table)[N], const Addresses &addresses) {
    if (addresses.size() > N) throw py::value_error("too many tensors in one call");
    for (std::size_t i = 0; i < addresses.size(); ++i) table[i] = at<T>(addresses[i]);
}

template <std::size_t N>
void fill(std::int64_t (&table)[N], const Numbers &numbers) {
    if (numbers.size() > N) throw py::value_error("too many tensors in one call");
    for (std::size_t i = 0; i < numbers.size(); ++i) table[i] = numbers[i];
}

// The forms of the loss family. `outputs` are the tensors that a form writes, or for the backward
// the upstream gradients that it reads.
enum Form { kScalar, kRows, kRowsBackward };

py::tuple loss(int form, int dtype, int threads, int exits, std::int64_t rows, std::int64_t classes,
               const Addresses &logits, const Numbers &strides, const Addresses &gradients,
               std::uintptr_t label, std::uintptr_t target, std::uintptr_t exit_weight,
               bool exit_weight_per_row, int pairs, std::uintptr_t pair_weight,
               bool pair_weight_per_row, double pair_scale, double temperature,
               bool temperature_squared, int divergence, double beta, bool detach_teacher,
               std::uintptr_t class_weight, std::int64_t ignore_index, double label_smoothing,
               bool mean, double normalizer, const Addresses &outputs) {
    msdkern_loss call = {};
    call.dtype = dtype;
    call.place.threads = threads;
    call.exits = exits;
    call.teachers = static_cast<int>(logits.size()) - exits;
    call.rows = rows;
    call.classes = classes;
    fill(call.logits, logits);
    fill(call.stride, strides);
    fill(call.gradient, gradients);
    call.label = at<const std::int64_t>(label);
    call.target = at<const void>(target);
    call.exit_weight = at<const void>(exit_weight);
    call.exit_weight_per_row = exit_weight_per_row;
    call.pairs = pairs;
    call.pair_weight = at<const void>(pair_weight);
    call.pair_weight_per_row = pair_weight_per_row;
    call.pair_scale = pair_scale;
    call.temperature = temperature;
    call.temperature_squared = temperature_squared;
    call.divergence = divergence;
    call.beta = beta;
    call.detach_teacher = detach_teacher;
    call.class_weight = at<const void>(class_weight);
    call.ignore_index = ignore_index;
    call.label_smoothing = label_smoothing;
    call.mean = mean;
    call.normalizer = normalizer;
    if (form == kScalar) {
        call.loss = at<void>(outputs.at(0));
        call.cross_entropy = at<void>(outputs.at(1));
        call.divergence_mean = at<void>(outputs.at(2));
        call.pair_divergence = at<void>(outputs.at(3));
        call.prediction = at<std::int64_t>(outputs.at(4));
        call.confidence = at<void>(outputs.at(5));
    } else if (form == kRows) {
        call.row_cross_entropy = at<void>(outputs.at(0));
        call.row_divergence = at<void>(outputs.at(1));
    } else {
        call.upstream_cross_entropy = at<const void>(outputs.at(0));
        call.upstream_divergence = at<const void>(outputs.at(1));
    }
    int status;
    {
        py::gil_scoped_release release;
        status = form == kScalar ? msdkern_cpu_loss(&call)
                 : form == kRows ? msdkern_cpu_row_losses(&call)
                                 : msdkern_cpu_row_losses_backward(&call);
    }
    return py::make_tuple(status, call.bad_label);
}

int softmax(bool backward, int dtype, int threads, std::int64_t rows, std::int64_t classes,
            double temperature, bool log, const Addresses &input, const Numbers &strides,
            const Addresses &upstream, const Numbers &upstream_strides, const Addresses &output) {
    msdkern_softmax call = {};
    call.dtype = dtype;
    call.place.threads = threads;
    call.exits = static_cast<int>(input.size());
    call.rows = rows;
    call.classes = classes;
    call.temperature = temperature;
    call.log = log;
    fill(call.input, input);
    fill(call.stride, strides);
    fill(call.upstream, upstream);
    fill(call.upstream_stride, upstream_strides);
    fill(call.output, output);
    py::gil_scoped_release release;
    return backward ? msdkern_cpu_softmax_backward(&call) : msdkern_cpu_softmax(&call);
}

int statistics(int dtype, int threads, std::int64_t rows, std::int64_t classes,
               const Addresses &logits, const Numbers &strides, const Addresses &outputs) {
    msdkern_statistics call = {};
    call.dtype = dtype;
    call.place.threads = threads;
    call.exits = static_cast<int>(logits.size());
    call.rows = rows;
    call.classes = classes;
    fill(call.logits, logits);
    fill(call.stride, strides);
    call.lse = at<void>(outputs.at(0));
    call.confidence = at<void>(outputs.at(1));
    call.prediction = at<std::int64_t>(outputs.at(2));
    call.margin = at<void>(outputs.at(3));
    call.entropy = at<void>(outputs.at(4));
    call.sum_squares = at<void>(outputs.at(5));
    py::gil_scoped_release release;
    return msdkern_cpu_statistics(&call);
}

int scale(int dtype, int threads, double factor, const Addresses &data, const Numbers &sizes) {
    msdkern_scale call = {};
    call.dtype = dtype;
    call.place.threads = threads;
    call.factor = factor;
    call.tensors = static_cast<int>(data.size());
    fill(call.data, data);
    fill(call.size, sizes);
    py::gil_scoped_release release;
    return msdkern_cpu_scale(&call);
}

std::vector<std::string> isas() {
    std::vector<std::string> names(1);
    for (const char *c = msdkern_cpu_isas(); *c; ++c) {
        if (*c == ',')
            names.emplace_back();
        else
            names.back() += *c;
    }
    return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of msdkern. Use the functions of the package, not these.";
    m.attr("abi_version") = MSDKERN_ABI_VERSION;
    m.attr("source_hash") = MSDKERN_SOURCE_HASH;
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
    m.def("loss", &loss);
    m.def("softmax", &softmax);
    m.def("statistics", &statistics);
    m.def("scale", &scale);
    m.def("isas", &isas, "The instruction sets this processor runs, best first.");
    m.def("use_isa", [](const std::string &name) {
        if (msdkern_cpu_use_isa(name.empty() ? nullptr : name.c_str()) != MSDKERN_OK)
            throw py::value_error("use_isa: this processor does not run " + name);
    });
}
