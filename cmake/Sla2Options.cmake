# Small helpers: options that environment variables can set, flags for both compilers, the commit.

# A cache variable whose default is the environment variable of the same name, else `default`.
function(sla2_option name default help)
  set(value "${default}")
  if(DEFINED ENV{${name}} AND NOT "$ENV{${name}}" STREQUAL "")
    set(value "$ENV{${name}}")
  endif()
  set(${name} "${value}" CACHE STRING "${help}")
endfunction()

# Host-compiler flags on an interface target: as they are for C++, behind -Xcompiler for CUDA.
function(sla2_host_flags target)
  foreach(flag IN LISTS ARGN)
    target_compile_options(${target} INTERFACE
      $<$<COMPILE_LANGUAGE:CXX>:${flag}> $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${flag}>)
  endforeach()
endfunction()

# The commit being built, "+dirty" where tracked files differ from it, "unknown" outside a checkout.
function(sla2_git_sha out)
  set(sha "unknown")
  find_package(Git QUIET)
  if(DEFINED ENV{SLA2_GIT_SHA} AND NOT "$ENV{SLA2_GIT_SHA}" STREQUAL "")
    set(sha "$ENV{SLA2_GIT_SHA}")
  elseif(GIT_FOUND AND EXISTS "${PROJECT_SOURCE_DIR}/.git")
    execute_process(COMMAND ${GIT_EXECUTABLE} rev-parse --short=12 HEAD WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
      OUTPUT_VARIABLE head RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(NOT failed)
      execute_process(COMMAND ${GIT_EXECUTABLE} status --porcelain --untracked-files=no
        WORKING_DIRECTORY ${PROJECT_SOURCE_DIR} OUTPUT_VARIABLE changed ERROR_QUIET)
      set(sha "${head}")
      if(changed)
        string(APPEND sha "+dirty")
      endif()
    endif()
  endif()
  set(${out} "${sha}" PARENT_SCOPE)
endfunction()
