# SLA2_CORE_LIBRARY: a libsla2.a built before, so that another Python's module compiles in seconds with a host
# compiler, the header cuda_runtime_api.h and libcudart_static.a. What the library was built from stands in
# version.h beside it (lib/../include/sla2/version.h), which every install of this project carries.
get_filename_component(core_library "${SLA2_CORE_LIBRARY}" REALPATH BASE_DIR "${CMAKE_CURRENT_SOURCE_DIR}")
if(NOT EXISTS "${core_library}" OR IS_DIRECTORY "${core_library}")
  message(FATAL_ERROR "SLA2_CORE_LIBRARY=${SLA2_CORE_LIBRARY}: no such file; give the path of a libsla2.a.")
endif()
get_filename_component(core_dir "${core_library}" DIRECTORY)
find_file(SLA2_CORE_VERSION_HEADER version.h NO_DEFAULT_PATH
  PATHS "${core_dir}/../include/sla2" "${core_dir}/generated/sla2")
if(NOT SLA2_CORE_VERSION_HEADER)
  message(FATAL_ERROR "SLA2_CORE_LIBRARY=${SLA2_CORE_LIBRARY}: its version.h is neither in ../include/sla2 nor in "
                      "generated/sla2 beside it; point into an installed package or a build folder.")
endif()
foreach(name VERSION GIT_SHA ARCHS CUDA_VERSION)
  file(STRINGS "${SLA2_CORE_VERSION_HEADER}" line REGEX "^#define SLA2_CORE_${name} ")
  string(REGEX REPLACE "^[^\"]*\"(.*)\"$" "\\1" core_${name} "${line}")
  string(REPLACE "\\;" ";" core_${name} "${core_${name}}") # file(STRINGS) escapes the separator
endforeach()
if(NOT core_VERSION STREQUAL SLA2_VERSION)
  message(FATAL_ERROR "SLA2_CORE_LIBRARY=${SLA2_CORE_LIBRARY}: it is version ${core_VERSION}, these sources are "
                      "${SLA2_VERSION}.")
endif()
set(SLA2_ARCHS "${core_ARCHS}")
set(SLA2_CUDA_VERSION "${core_CUDA_VERSION}")
set(SLA2_GIT_SHA "${core_GIT_SHA}")

# CUDAToolkit wants nvcc in some CMake versions; the header and the library are all that is needed.
find_package(CUDAToolkit QUIET)
if(NOT TARGET CUDA::cudart_static)
  set(cuda_roots $ENV{CUDA_PATH} $ENV{CUDA_HOME} ${CUDAToolkit_ROOT} $ENV{CUDAToolkit_ROOT} /usr/local/cuda)
  find_path(SLA2_CUDART_INCLUDE cuda_runtime_api.h HINTS ${cuda_roots} PATH_SUFFIXES include)
  find_library(SLA2_CUDART_STATIC cudart_static HINTS ${cuda_roots} PATH_SUFFIXES lib64 lib lib/x64)
  if(NOT SLA2_CUDART_INCLUDE OR NOT SLA2_CUDART_STATIC)
    message(FATAL_ERROR "SLA2_CORE_LIBRARY needs cuda_runtime_api.h and libcudart_static.a; found "
                        "'${SLA2_CUDART_INCLUDE}' and '${SLA2_CUDART_STATIC}'. Set CUDAToolkit_ROOT.")
  endif()
  find_package(Threads REQUIRED)
  add_library(CUDA::cudart_static STATIC IMPORTED)
  set_target_properties(CUDA::cudart_static PROPERTIES
    IMPORTED_LOCATION "${SLA2_CUDART_STATIC}"
    INTERFACE_INCLUDE_DIRECTORIES "${SLA2_CUDART_INCLUDE}"
    INTERFACE_LINK_LIBRARIES "Threads::Threads;${CMAKE_DL_LIBS};rt")
endif()

add_library(sla2::core STATIC IMPORTED)
set_target_properties(sla2::core PROPERTIES
  IMPORTED_LOCATION "${core_library}"
  INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CURRENT_SOURCE_DIR}/csrc/include"
  INTERFACE_LINK_LIBRARIES CUDA::cudart_static)
install(FILES "${core_library}" DESTINATION sla2/lib RENAME libsla2.a)
install(FILES "${SLA2_CORE_VERSION_HEADER}" DESTINATION sla2/include/sla2)
message(STATUS "sla2: reusing ${core_library} (${core_GIT_SHA}, archs ${core_ARCHS})")
