// SPDX-License-Identifier: Apache-2.0
// The Python names of _cuda. Importing it touches no driver.
#include "../bind.h"

#include "device.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

constexpr binding::Entries entries = {
    msdkern_cuda_loss,        msdkern_cuda_row_losses,       msdkern_cuda_row_losses_backward,
    msdkern_cuda_softmax,     msdkern_cuda_softmax_backward, msdkern_cuda_statistics,
    msdkern_cuda_scale,       msdkern_cuda_exit_gate,        msdkern_cuda_gate_step,
    msdkern_cuda_gather_rows, msdkern_cuda_scatter_rows,
};

py::dict as_dict(const msdkern::Device &d) {
    return py::dict("name"_a = d.name, "capability"_a = py::make_tuple(d.major, d.minor),
                    "processors"_a = d.processors, "memory"_a = d.memory, "binary"_a = d.binary,
                    "status"_a = d.status);
}

py::dict device_report() {
    const msdkern::DeviceReport r = [] {
        py::gil_scoped_release unlocked;  // the first contact with a driver may take seconds
        return msdkern::device_report();
    }();
    py::list devices;
    for (const auto &device : r.devices) devices.append(as_dict(device));
    return py::dict("architectures"_a = r.architectures, "runtime"_a = r.runtime,
                    "driver"_a = r.driver, "status"_a = r.status, "devices"_a = devices);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of msdkern.";
    binding::define<binding::OnDevice, entries>(m);
    m.def("workspace", &msdkern_cuda_workspace,
          "Bytes of workspace for a device, a number of exits and of external teachers.");
    m.def("last_error", &msdkern_cuda_error);
    m.def("device_report", &device_report,
          "Architectures compiled in, CUDA runtime and driver versions, and each GPU's facts.");
}
