// Driver libraries, loaded at run time and never unloaded: drivers keep threads.
#pragma once

#include <string>

#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace spiral {

// Null where it does not load; `why`, if given, then says why.
inline void* open_library(const std::string& name, std::string* why = nullptr) {
#ifdef _WIN32
  void* library = reinterpret_cast<void*>(LoadLibraryA(name.c_str()));
  if (!library && why) *why = "LoadLibrary failed with code " + std::to_string(GetLastError());
#else
  void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library && why) *why = dlerror();
#endif
  return library;
}

inline void* find_symbol(void* library, const char* name) {
#ifdef _WIN32
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
#else
  return dlsym(library, name);
#endif
}

}  // namespace spiral
