// The root of torch_spiral._C. Each part of the library has its own file of bindings.
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace spiral {

void bind_engine(py::module_&);    // engine_bindings.cpp: raw engines, for tests and tools
void bind_runtime(py::module_&);   // runtime_bindings.cpp: devices, memory, streams, events
void bind_dispatch(py::module_&);  // dispatch_bindings.cpp: lowerings, plans, fallback
void bind_graphs(py::module_&);    // graph_bindings.cpp: compiled graphs

// torch's own translator is not registered for this module, and would add backtraces.
void translate(std::exception_ptr pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const c10::OutOfMemoryError& e) {
    py::set_error(py::module_::import("torch").attr("OutOfMemoryError"), e.what_without_backtrace());
  } catch (const c10::IndexError& e) {
    py::set_error(PyExc_IndexError, e.what_without_backtrace());
  } catch (const c10::ValueError& e) {
    py::set_error(PyExc_ValueError, e.what_without_backtrace());
  } catch (const c10::TypeError& e) {
    py::set_error(PyExc_TypeError, e.what_without_backtrace());
  } catch (const c10::NotImplementedError& e) {
    py::set_error(PyExc_NotImplementedError, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    py::set_error(PyExc_RuntimeError, e.what_without_backtrace());
  }
}

}  // namespace spiral

PYBIND11_MODULE(_C, m) {
  py::register_local_exception_translator(spiral::translate);
  spiral::bind_engine(m);
  spiral::bind_runtime(m);
  spiral::bind_dispatch(m);
  spiral::bind_graphs(m);
}
