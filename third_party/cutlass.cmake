# The CUTLASS headers as the interface target sla2_cutlass: from CUTLASS_ROOT, else from the PyPI package
# nvidia-cutlass. Included only where a kernel needs them (SLA2_NEEDS_CUTLASS).
sla2_option(CUTLASS_ROOT "" "CUTLASS checkout or install prefix, the folder that holds include/cutlass")

set(cutlass_hints "")
if(CUTLASS_ROOT)
  set(cutlass_hints "${CUTLASS_ROOT}/include" "${CUTLASS_ROOT}")
else()
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  # Located without an import: the package's __init__ loads more than a build environment has.
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE cutlass_library OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(cutlass_library)
    set(cutlass_hints "${cutlass_library}/source/include")
  endif()
endif()

find_path(SLA2_CUTLASS_INCLUDE cutlass/cutlass.h NO_DEFAULT_PATH PATHS ${cutlass_hints})
if(NOT SLA2_CUTLASS_INCLUDE)
  message(FATAL_ERROR "CUTLASS headers not found (looked in: ${cutlass_hints}). Set CUTLASS_ROOT, or run "
                      "pip install nvidia-cutlass==4.2.0.0.")
endif()
message(STATUS "sla2: CUTLASS headers in ${SLA2_CUTLASS_INCLUDE}")
add_library(sla2_cutlass INTERFACE)
target_include_directories(sla2_cutlass SYSTEM INTERFACE ${SLA2_CUTLASS_INCLUDE})
