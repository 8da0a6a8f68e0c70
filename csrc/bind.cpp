// SPDX-License-Identifier: Apache-2.0
// The Python names of _cpu.
#include "bind.h"

namespace {

namespace py = pybind11;

using binding::Addresses;
using binding::at;
using binding::fill;
using binding::Numbers;

constexpr binding::Entries entries = {
    msdkern_cpu_loss,    msdkern_cpu_row_losses,       msdkern_cpu_row_losses_backward,
    msdkern_cpu_softmax, msdkern_cpu_softmax_backward, msdkern_cpu_statistics,
    msdkern_cpu_scale,
};

// One exit (`outputs`: prediction, score, stay, count) or all (prediction, score, exit index).
int gate(bool step, int dtype, int threads, int measure, std::int64_t rows, std::int64_t live,
         std::int64_t classes, const Addresses &logits, const Numbers &strides,
         const std::vector<double> &temperature, const std::vector<double> &threshold,
         std::uintptr_t given, std::uintptr_t previous_prediction, std::uintptr_t previous_score,
         const Addresses &outputs) {
    msdkern_gate call = {};
    call.dtype = dtype;
    call.exits = static_cast<int>(logits.size());
    call.place.threads = threads;
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
    return step ? msdkern_cpu_gate_step(&call) : msdkern_cpu_exit_gate(&call);
}

py::tuple copy_rows(bool scatter, int threads, std::int64_t count, std::int64_t capacity,
                    std::int64_t limit, std::uintptr_t index, const Addresses &source,
                    const Addresses &target, const Numbers &source_stride,
                    const Numbers &target_stride, const Numbers &bytes) {
    msdkern_copy call = {};
    call.tensors = static_cast<int>(source.size());
    call.place.threads = threads;
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
        status = scatter ? msdkern_cpu_scatter_rows(&call) : msdkern_cpu_gather_rows(&call);
    }
    return py::make_tuple(status, call.bad_index);
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
    binding::define<int, entries>(m);
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
    m.def("gate", &gate);
    m.def("copy_rows", &copy_rows);
    m.def("isas", &isas, "The instruction sets this processor runs, best first.");
    m.def("use_isa", [](const std::string &name) {
        if (msdkern_cpu_use_isa(name.empty() ? nullptr : name.c_str()) != MSDKERN_OK)
            throw py::value_error("use_isa: this processor does not run " + name);
    });
}
