// The table of lowerings: a number and a few flags for each name. Python fills it in (torch_spiral/lowering.py).
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "call.h"
#include "plan.h"

namespace spiral {

struct Op {
  std::string name;
  bool coarse = false;  // its schedules don't depend on sizes: they enter the key as 0, 1 or more
};
const Op& op(OpId id);
void set_coarse(OpId id);

// Registers `name` (an aten overload) with the dispatcher: calls go to the lowering of that name. `slots` names integer
// arguments whose value must not enter the key; `exact` names tensors whose sizes beyond the second do (filter taps): they
// follow the tensor as a list.
void register_boxed(const std::string& name, const std::vector<std::string>& slots, const std::vector<std::string>& exact);

// Asks Python for the plan of a call. Takes the GIL; no lock may be held.
std::shared_ptr<Plan> record_plan(OpId id, c10::DeviceIndex device, const pybind11::object& args);

}  // namespace spiral
