# Every library the build needs, in one place. `make setup` installs them.
find_package(Threads REQUIRED)
find_package(fmt REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(OpenMP REQUIRED)
# The packages onednn-devel-cpu-gomp of PyPI and oneDNN's own builds call it dnnl; 2.x lacks what the kernels use.
find_package(dnnl 3 CONFIG REQUIRED)
if(COMFYTP_CLI)
  find_package(CLI11 REQUIRED)
endif()
if(COMFYTP_TESTS)
  find_package(GTest REQUIRED)
endif()
