// SPDX-License-Identifier: Apache-2.0
// The Python names of _cuda: casts only. Importing it touches no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

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
    m.attr("source_hash") = MSDKERN_SOURCE_HASH;
    m.def("device_report", &device_report,
          "Architectures compiled in, CUDA runtime and driver versions, and each GPU's facts.");
}
