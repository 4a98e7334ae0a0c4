// A compiled graph as Python calls it: tensors and sizes go from the interpreter's argument vector straight into a Call, and the
// tensors that its plan returns come back as a tuple. torch_spiral/compiler/runtime.py says what the arguments are.
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <structmember.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstddef>
#include <string>
#include <vector>

#include "../dispatch/ops.h"
#include "../dispatch/recording.h"

namespace py = pybind11;

namespace spiral {

void translate(std::exception_ptr);  // module.cpp

namespace {

// What a call returns at one position.
struct Output {
  enum class Kind : uint8_t { None, Returned, View, Argument } kind;
  uint32_t index;  // of a tensor that the plan returns, or of an argument
  std::vector<int64_t> sizes, strides;
  int64_t offset;  // in elements, from the start of the tensor
};

struct Graph {
  OpId op;
  int device;  // where a graph without operands runs
  size_t arguments;
  std::vector<uint32_t> inputs, written, sizes;  // positions of arguments
  std::vector<Output> outputs;                   // none: what the plan returns, in order
  std::vector<uint32_t> bumped;                  // arguments whose version counts the write
};

struct GraphObject {
  PyObject_HEAD
  vectorcallfunc vectorcall;
  Graph* graph;
};

at::Tensor view(const at::Tensor& t, const Output& o) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(t.storage()), t.key_set(), t.dtype());
  impl->set_sizes_and_strides(o.sizes, o.strides, t.storage_offset() + o.offset);
  return at::Tensor(std::move(impl));
}

PyObject* run(const Graph& g, PyObject* const* args) {
  auto tensor = [&](uint32_t i) -> const at::Tensor& {
    TORCH_CHECK_TYPE(THPVariable_Check(args[i]), op(g.op).name, ": argument ", i, " is no tensor");
    return THPVariable_Unpack(args[i]);
  };
  c10::SmallVector<at::Tensor, 16> inputs, written;
  for (uint32_t i : g.inputs) inputs.push_back(tensor(i));
  for (uint32_t i : g.written) written.push_back(tensor(i));
  c10::SmallVector<int64_t, 8> sizes, classes;
  for (uint32_t i : g.sizes) {
    const int64_t n = PyLong_AsLongLong(args[i]);
    if (n == -1 && PyErr_Occurred()) throw py::error_already_set();
    sizes.push_back(n);
    classes.push_back(static_cast<int64_t>(Recording::size_class(n)));
  }
  const at::Tensor* first = inputs.empty() ? written.empty() ? nullptr : &written[0] : &inputs[0];
  Call call(g.op, first ? first->device().index() : static_cast<c10::DeviceIndex>(g.device));
  {
    py::gil_scoped_release release;
    call.tensors(at::ArrayRef<at::Tensor>(inputs));
    call.outs(at::ArrayRef<at::Tensor>(written));
    call.slots(sizes);
    call.value(at::IntArrayRef(classes));
    call.run();
  }
  for (uint32_t i : g.bumped) {
    c10::TensorImpl* impl = tensor(i).unsafeGetTensorImpl();
    if (!impl->is_inference()) impl->bump_version();
  }
  auto& returned = call.returned();
  if (g.outputs.empty()) {
    py::tuple result(returned.size());
    for (size_t i = 0; i < returned.size(); ++i) {
      PyTuple_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i), THPVariable_Wrap(std::move(returned[i])));
    }
    return result.release().ptr();
  }
  py::tuple result(g.outputs.size());
  for (size_t i = 0; i < g.outputs.size(); ++i) {
    const Output& o = g.outputs[i];
    PyObject* item = Py_None;
    switch (o.kind) {
      case Output::Kind::None: Py_INCREF(item); break;
      case Output::Kind::Argument: Py_INCREF(item = args[o.index]); break;
      case Output::Kind::Returned: item = THPVariable_Wrap(returned[o.index]); break;
      case Output::Kind::View: item = THPVariable_Wrap(view(returned[o.index], o)); break;
    }
    if (!item) throw py::error_already_set();
    PyTuple_SET_ITEM(result.ptr(), static_cast<Py_ssize_t>(i), item);
  }
  return result.release().ptr();
}

PyObject* vectorcall(PyObject* self, PyObject* const* args, size_t flags, PyObject* names) {
  const Graph& g = *reinterpret_cast<GraphObject*>(self)->graph;
  const auto count = static_cast<size_t>(PyVectorcall_NARGS(flags));
  if (count != g.arguments || (names && PyTuple_GET_SIZE(names))) {
    PyErr_Format(PyExc_TypeError, "a compiled graph of %zu arguments was called with %zu", g.arguments, count);
    return nullptr;
  }
  try {
    return run(g, args);
  } catch (py::error_already_set& e) {
    e.restore();
  } catch (python_error& e) {
    e.restore();
  } catch (...) {
    try {
      translate(std::current_exception());
    } catch (const std::exception& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what());
    }
  }
  return nullptr;
}

void deallocate(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<GraphObject*>(self)->graph;
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(GraphObject, vectorcall), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr}};
PyType_Slot type_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(deallocate)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_members, members},
    {Py_tp_doc, const_cast<char*>("A compiled graph: (tensors and sizes…) -> tuple of tensors.")},
    {0, nullptr}};
PyType_Spec spec = {
    "torch_spiral._C.GraphCall", sizeof(GraphObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION, type_slots};

}  // namespace

void bind_graphs(py::module_& m) {
  static PyObject* type = PyType_FromSpec(&spec);
  if (!type) throw py::error_already_set();
  m.add_object("GraphCall", py::reinterpret_borrow<py::object>(type));
  using Described = std::tuple<std::string, uint32_t, std::vector<int64_t>, std::vector<int64_t>, int64_t>;
  m.def(
      "graph_call",
      [](const std::string& name, int device, size_t arguments, std::vector<uint32_t> inputs, std::vector<uint32_t> written,
         std::vector<uint32_t> sizes, const std::vector<Described>& outputs, std::vector<uint32_t> bumped) {
        auto g = std::make_unique<Graph>(Graph{op_id(name), device, arguments, std::move(inputs), std::move(written), std::move(sizes), {}, std::move(bumped)});
        for (const auto* positions : {&g->inputs, &g->written, &g->sizes, &g->bumped}) {
          for (uint32_t i : *positions) TORCH_CHECK_VALUE(i < arguments, name, ": no argument ", i);
        }
        for (const auto& [kind, index, shape, strides, offset] : outputs) {
          const auto k = kind == "none" ? Output::Kind::None : kind == "returned" ? Output::Kind::Returned : kind == "view" ? Output::Kind::View : Output::Kind::Argument;
          g->outputs.push_back({k, index, shape, strides, offset});
        }
        auto* object = PyObject_New(GraphObject, reinterpret_cast<PyTypeObject*>(type));
        if (!object) throw py::error_already_set();
        object->vectorcall = vectorcall;
        object->graph = g.release();
        return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(object));
      },
      py::arg("name"), py::arg("device"), py::arg("arguments"), py::arg("inputs"), py::arg("written"), py::arg("sizes"),
      py::arg("outputs"), py::arg("bumped"));
}

}  // namespace spiral
