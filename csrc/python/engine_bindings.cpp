#include "runtime/engine.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace spiral {

void bind_engine(py::module_& m) {}

}  // namespace spiral
