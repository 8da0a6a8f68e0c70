// SPDX-License-Identifier: Apache-2.0
// The Python names of _cpu.
#include "bind.h"

namespace {

namespace py = pybind11;

constexpr binding::Entries entries = {
    msdkern_cpu_loss,        msdkern_cpu_row_losses,       msdkern_cpu_row_losses_backward,
    msdkern_cpu_softmax,     msdkern_cpu_softmax_backward, msdkern_cpu_statistics,
    msdkern_cpu_scale,       msdkern_cpu_exit_gate,        msdkern_cpu_gate_step,
    msdkern_cpu_gather_rows, msdkern_cpu_scatter_rows,
};

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
    m.def("isas", &isas,
          "The instruction sets this processor runs: the one in use, then the others, best first.");
    m.def("use_isa", [](const std::string &name) {
        if (msdkern_cpu_use_isa(name.empty() ? nullptr : name.c_str()) != MSDKERN_OK)
            throw py::value_error("use_isa: this processor does not run " + name);
    });
}
