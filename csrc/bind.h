// SPDX-License-Identifier: Apache-2.0
// The Python signatures of the C ABI, shared by _cpu and _cuda: casts only. Addresses arrive as
// integers; msdkern/executors/native.py is the only caller and has checked shapes, dtypes and
// devices.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "msdkern.h"

#ifndef MSDKERN_SOURCE_HASH
#define MSDKERN_SOURCE_HASH "unknown"
#endif

namespace binding {

namespace py = pybind11;

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

// Where a call runs: the number of threads of a CPU; or device, stream, workspace, and the
// addresses of the numbers that are on the device (0 for those that are not).
struct OnDevice {
    int device;
    std::uintptr_t stream, workspace;
    Addresses scalars;
};
inline msdkern_place place_of(int threads) {
    msdkern_place place = {};
    place.threads = threads;
    return place;
}
inline msdkern_place place_of(const OnDevice &where) {
    msdkern_place place = {};
    place.device = where.device;
    place.stream = at<void>(where.stream);
    place.workspace = at<void>(where.workspace);
    return place;
}
inline const void *scalar(int, std::size_t) { return nullptr; }
inline const void *scalar(const OnDevice &where, std::size_t i) {
    return i < where.scalars.size() ? at<const void>(where.scalars[i]) : nullptr;
}

// The entry points of one kind of machine.
struct Entries {
    int (*loss)(msdkern_loss *);
    int (*row_losses)(msdkern_loss *);
    int (*row_losses_backward)(msdkern_loss *);
    int (*softmax)(const msdkern_softmax *);
    int (*softmax_backward)(const msdkern_softmax *);
    int (*statistics)(const msdkern_statistics *);
    int (*scale)(const msdkern_scale *);
    int (*exit_gate)(const msdkern_gate *);
    int (*gate_step)(const msdkern_gate *);
    int (*gather_rows)(msdkern_copy *);
    int (*scatter_rows)(msdkern_copy *);
};

// The forms of the loss family. `outputs` are the tensors that a form writes, or for the backward
// the upstream gradients that it reads.
enum Form { kScalar, kRows, kRowsBackward };

template <class Place, const Entries &entries>
py::tuple loss(int form, int dtype, const Place &place, int exits, std::int64_t rows,
               std::int64_t classes, const Addresses &logits, const Numbers &strides,
               const Addresses &gradients, std::uintptr_t label, std::uintptr_t target,
               std::uintptr_t exit_weight, bool exit_weight_per_row, int pairs,
               std::uintptr_t pair_weight, bool pair_weight_per_row, double pair_scale,
               double temperature, bool temperature_squared, int divergence, double beta,
               bool detach_teacher, std::uintptr_t class_weight, std::int64_t ignore_index,
               double label_smoothing, bool mean, double normalizer, const Addresses &outputs) {
    msdkern_loss call = {};
    call.dtype = dtype;
    call.place = place_of(place);
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
    call.temperature_at = scalar(place, 0);
    call.pair_scale_at = scalar(place, 1);
    call.normalizer_at = scalar(place, 2);
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
        status = form == kScalar ? entries.loss(&call)
                 : form == kRows ? entries.row_losses(&call)
                                 : entries.row_losses_backward(&call);
    }
    return py::make_tuple(status, call.bad_label);
}

template <class Place, const Entries &entries>
int softmax(bool backward, int dtype, const Place &place, std::int64_t rows, std::int64_t classes,
            double temperature, bool log, const Addresses &input, const Numbers &strides,
            const Addresses &upstream, const Numbers &upstream_strides, const Addresses &output) {
    msdkern_softmax call = {};
    call.dtype = dtype;
    call.place = place_of(place);
    call.exits = static_cast<int>(input.size());
    call.rows = rows;
    call.classes = classes;
    call.temperature = temperature;
    call.temperature_at = scalar(place, 0);
    call.log = log;
    fill(call.input, input);
    fill(call.stride, strides);
    fill(call.upstream, upstream);
    fill(call.upstream_stride, upstream_strides);
    fill(call.output, output);
    py::gil_scoped_release release;
    return backward ? entries.softmax_backward(&call) : entries.softmax(&call);
}

template <class Place, const Entries &entries>
int statistics(int dtype, const Place &place, std::int64_t rows, std::int64_t classes,
               const Addresses &logits, const Numbers &strides, const Addresses &outputs) {
    msdkern_statistics call = {};
    call.dtype = dtype;
    call.place = place_of(place);
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
    return entries.statistics(&call);
}

template <class Place, const Entries &entries>
int scale(int dtype, const Place &place, double factor, const Addresses &data,
          const Numbers &sizes) {
    msdkern_scale call = {};
    call.dtype = dtype;
    call.place = place_of(place);
    call.factor = factor;
    call.factor_at = scalar(place, 0);
    call.tensors = static_cast<int>(data.size());
    fill(call.data, data);
    fill(call.size, sizes);
    py::gil_scoped_release release;
    return entries.scale(&call);
}

// One exit (`outputs`: prediction, score, stay, count) or all (prediction, score, exit index).
template <class Place, const Entries &entries>
int gate(bool step, int dtype, const Place &place, int measure, std::int64_t rows,
         std::int64_t live, std::int64_t classes, const Addresses &logits, const Numbers &strides,
         const std::vector<double> &temperature, const std::vector<double> &threshold,
         std::uintptr_t given, std::uintptr_t previous_prediction, std::uintptr_t previous_score,
         const Addresses &outputs) {
    msdkern_gate call = {};
    call.dtype = dtype;
    call.exits = static_cast<int>(logits.size());
    call.place = place_of(place);
    call.measure = measure;
    call.rows = rows;
    call.live = live;
    call.classes = classes;
    fill(call.logits, logits);
    fill(call.stride, strides);
    for (std::size_t k = 0; k < logits.size(); ++k) {
        call.temperature[k] = temperature.size() == 1 ? temperature[0] : temperature.at(k);
        call.threshold[k] = threshold.size() == 1 ? threshold[0] : threshold.at(k);
    }
    call.temperature_at = scalar(place, 0);
    call.threshold_at = scalar(place, 1);
    call.live_at = static_cast<const std::int64_t *>(scalar(place, 2));
    call.temperature_per_exit = temperature.size() > 1;
    call.threshold_per_exit = threshold.size() > 1;
    call.given = at<const void>(given);
    call.previous_prediction = at<const std::int64_t>(previous_prediction);
    call.previous_score = at<const void>(previous_score);
    if (!step) call.exit_index = at<std::int64_t>(outputs.at(2));
    call.prediction = at<std::int64_t>(outputs.at(0));
    call.score = at<void>(outputs.at(1));
    if (step) {
        call.stay = at<std::int64_t>(outputs.at(2));
        call.count = at<std::int64_t>(outputs.at(3));
    }
    py::gil_scoped_release release;
    return step ? entries.gate_step(&call) : entries.exit_gate(&call);
}

template <class Place, const Entries &entries>
py::tuple copy_rows(bool scatter, const Place &place, std::int64_t count, std::int64_t capacity,
                    std::int64_t limit, std::uintptr_t index, const Addresses &source,
                    const Addresses &target, const Numbers &source_stride,
                    const Numbers &target_stride, const Numbers &bytes) {
    msdkern_copy call = {};
    call.tensors = static_cast<int>(source.size());
    call.place = place_of(place);
    call.count_at = static_cast<const std::int64_t *>(scalar(place, 0));
    call.count = count;
    call.capacity = capacity;
    call.limit = limit;
    call.index = at<const std::int64_t>(index);
    fill(call.source, source);
    fill(call.target, target);
    fill(call.source_stride, source_stride);
    fill(call.target_stride, target_stride);
    fill(call.bytes, bytes);
    int status;
    {
        py::gil_scoped_release release;
        status = scatter ? entries.scatter_rows(&call) : entries.gather_rows(&call);
    }
    return py::make_tuple(status, call.bad_index);
}

template <class Place, const Entries &entries>
void define(py::module_ &m) {
    m.attr("abi_version") = MSDKERN_ABI_VERSION;
    m.attr("source_hash") = MSDKERN_SOURCE_HASH;
    m.def("loss", &loss<Place, entries>);
    m.def("softmax", &softmax<Place, entries>);
    m.def("statistics", &statistics<Place, entries>);
    m.def("scale", &scale<Place, entries>);
    m.def("gate", &gate<Place, entries>);
    m.def("copy_rows", &copy_rows<Place, entries>);
}

}  // namespace binding

// (device, stream, workspace, [addresses of numbers]) as OnDevice.
namespace pybind11 {
namespace detail {
template <>
struct type_caster<binding::OnDevice> {
    PYBIND11_TYPE_CASTER(binding::OnDevice, const_name("tuple"));
    bool load(handle source, bool) {
        typedef std::tuple<int, std::uintptr_t, std::uintptr_t, binding::Addresses> Fields;
        const Fields fields = source.cast<Fields>();
        value = {std::get<0>(fields), std::get<1>(fields), std::get<2>(fields),
                 std::get<3>(fields)};
        return true;
    }
};
}  // namespace detail
}  // namespace pybind11
