# libsla2.a from source; included by the top CMakeLists.txt once CUDA is enabled. Sets SLA2_ARCHS and
# SLA2_CUDA_VERSION.
include(Sla2Archs)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

sla2_choose_archs("${SLA2_CUDA_ARCHS}" "${SLA2_DEFAULT_ARCHS}" SLA2_ARCHS)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" SLA2_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")

# ---- generated sources ----------------------------------------------------------------------------------
set(generated_dir ${CMAKE_CURRENT_BINARY_DIR}/generated)
configure_file(cmake/version.h.in ${generated_dir}/sla2/version.h @ONLY)

set(dtype_cpp_bf16 __nv_bfloat16)
set(dtype_cpp_fp16 __half)
set(dtype_enum_bf16 SLA2_BFLOAT16)
set(dtype_enum_fp16 SLA2_FLOAT16)
# Appends to `sources` one instance of csrc/kernels/<family>/attn_fwd_instance.cu.in per variant.
function(sla2_instances family sources)
  foreach(variant IN LISTS ARGN)
    string(REPLACE "|" ";" fields "${variant}")
    list(GET fields 0 SLA2_DTYPE)
    list(GET fields 1 SLA2_HEAD_DIM)
    list(GET fields 2 SLA2_QUANT)
    set(SLA2_DTYPE_CPP ${dtype_cpp_${SLA2_DTYPE}})
    set(SLA2_DTYPE_ENUM ${dtype_enum_${SLA2_DTYPE}})
    string(TOUPPER "SLA2_QUANT_${SLA2_QUANT}" SLA2_QUANT_ENUM)
    set(instance ${generated_dir}/${family}_attn_fwd_${SLA2_DTYPE}_d${SLA2_HEAD_DIM}_${SLA2_QUANT}.cu)
    configure_file(csrc/kernels/${family}/attn_fwd_instance.cu.in ${instance} @ONLY)
    list(APPEND ${sources} ${instance})
  endforeach()
  set(${sources} ${${sources}} PARENT_SCOPE)
endfunction()
sla2_instances(sm80 SLA2_KERNEL_SOURCES ${SLA2_ATTN_FWD_VARIANTS})
sla2_instances(sm90 SLA2_SM90_SOURCES ${SLA2_ATTN_FWD_SM90_VARIANTS})

# ---- the library ----------------------------------------------------------------------------------------
add_library(sla2_core STATIC ${SLA2_CORE_SOURCES} ${SLA2_KERNEL_SOURCES})
add_library(sla2::core ALIAS sla2_core)
set_target_properties(sla2_core PROPERTIES OUTPUT_NAME sla2)
target_include_directories(sla2_core
  PUBLIC ${CMAKE_CURRENT_SOURCE_DIR}/csrc/include
  PRIVATE ${generated_dir} ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
target_link_libraries(sla2_core PUBLIC CUDA::cudart_static PRIVATE $<BUILD_INTERFACE:sla2_flags>)
if(SLA2_NEEDS_CUTLASS)
  include(third_party/cutlass.cmake)
  target_link_libraries(sla2_core PRIVATE sla2_cutlass)
endif()

sla2_gencode_flags("${SLA2_ARCHS}" gencode_flags)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  set(compress --compress-mode=size)
else()
  set(compress -Xfatbin=-compress-all)
endif()
if(SLA2_LINEINFO)
  list(APPEND SLA2_CUDA_FLAGS -lineinfo)
endif()
list(APPEND SLA2_CUDA_FLAGS ${compress})
target_compile_options(sla2_core PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${SLA2_CUDA_FLAGS};${gencode_flags}>")
set(targets sla2_core)

# The Hopper kernels exist in sm_90a code alone.
if("90a" IN_LIST SLA2_ARCHS)
  add_library(sla2_sm90 OBJECT ${SLA2_SM90_SOURCES})
  list(APPEND targets sla2_sm90)
  target_include_directories(sla2_sm90 PRIVATE
    $<TARGET_PROPERTY:sla2_core,INCLUDE_DIRECTORIES>)
  target_link_libraries(sla2_sm90 PRIVATE CUDA::cudart_static sla2_flags)
  sla2_gencode_flags("90a" gencode_sm90)
  target_compile_options(sla2_sm90 PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${SLA2_CUDA_FLAGS};${gencode_sm90}>")
  target_sources(sla2_core PRIVATE $<TARGET_OBJECTS:sla2_sm90>)
  target_compile_definitions(sla2_core PRIVATE SLA2_HAVE_SM90=1)
else()
  target_sources(sla2_core PRIVATE csrc/kernels/sm90/not_built.cpp)
endif()

# nvcc's generated names come from a seed: the file's name instead of its process id and path.
include(CheckCompilerFlag)
check_compiler_flag(CUDA -frandom-seed=sla2 SLA2_NVCC_HAS_RANDOM_SEED)
if(SLA2_NVCC_HAS_RANDOM_SEED)
  foreach(source IN LISTS SLA2_KERNEL_SOURCES SLA2_SM90_SOURCES)
    cmake_path(GET source FILENAME name)
    set_property(SOURCE ${source} APPEND PROPERTY COMPILE_OPTIONS -frandom-seed=${name})
  endforeach()
endif()

# A compile job may take up to 4 GB: no more at once than the memory or the cores carry.
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
cmake_host_system_information(RESULT memory_mib QUERY AVAILABLE_PHYSICAL_MEMORY)
math(EXPR jobs "${memory_mib} / 4096")
if(jobs GREATER cores)
  set(jobs ${cores})
elseif(jobs LESS 1)
  set(jobs 1)
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS sla2_compile=${jobs})
set_property(TARGET ${targets} PROPERTY JOB_POOL_COMPILE sla2_compile)

# nvcc leaves the name of a temporary file, process id included, in each object's symbol table.
if(CMAKE_STRIP AND NOT CMAKE_BUILD_TYPE MATCHES "Deb")
  add_custom_command(TARGET sla2_core POST_BUILD VERBATIM
    COMMAND ${CMAKE_STRIP} --strip-unneeded --enable-deterministic-archives $<TARGET_FILE:sla2_core>)
endif()

install(TARGETS sla2_core ARCHIVE DESTINATION sla2/lib)
install(FILES ${generated_dir}/sla2/version.h DESTINATION sla2/include/sla2)
