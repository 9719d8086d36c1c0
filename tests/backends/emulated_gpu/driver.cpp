// A GPU that is this processor: what TVM's runtime calls of CUDA's driver and runtime, over memory of the host.
// Kernels come from the library that EMULATED_KERNELS names, which is compiled from the same source as the binary.

#include <dlfcn.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Launch {
  unsigned grid[3], block[3], shared;
};

using Run = void (*)(const char* name, const unsigned* grid, const unsigned* block, void** arguments);

void* kernels() {
  static void* opened = dlopen(std::getenv("EMULATED_KERNELS"), RTLD_NOW);
  if (!opened) std::fprintf(stderr, "%s\n", dlerror());
  return opened;
}

// Compute capability 9.0; of all else that is asked a power of two.
int attribute(int which) { return which == 75 ? 9 : which == 76 ? 0 : 1024; }

}  // namespace

extern "C" {

int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int) { return *device = 0; }
int cuDeviceGetAttribute(int* value, int which, int) { return *value = attribute(which), 0; }
int cuDeviceGetName(char* name, int size, int) { return std::snprintf(name, size, "emulated") < 0; }
int cuGetErrorName(int, const char** text) { return *text = "error", 0; }
int cuGetErrorString(int, const char** text) { return *text = "error", 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuTensorMapEncodeTiled() { return 1; }
int cuModuleUnload(void*) { return 0; }

int cuModuleLoadData(void** module, const void* image) {
  *module = kernels();
  return *module && !std::memcmp(image, "\177ELF", 4) ? 0 : 200;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = dlsym(module, name) ? strdup(name) : nullptr;
  return *function ? 0 : 500;
}

int cuLaunchKernelEx(const Launch* launch, void* function, void** arguments, void**) {
  reinterpret_cast<Run>(dlsym(kernels(), "emulate"))(static_cast<char*>(function), launch->grid, launch->block, arguments);
  return 0;
}

int cudaDeviceGetAttribute(int* value, int which, int) { return *value = attribute(which), 0; }
int cudaGetDeviceCount(int* count) { return *count = 1, 0; }
int cudaGetDevice(int* device) { return *device = 0; }
int cudaSetDevice(int device) { return device; }
int cudaGetDeviceProperties(void*, int) { return 1; }
const char* cudaGetErrorName(int) { return "error"; }
const char* cudaGetErrorString(int) { return "error"; }
int cudaGetLastError() { return 0; }
int cudaPeekAtLastError() { return 0; }
int cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = 1u << 30, 0; }

// Garbage, so that what is read before it is written shows.
int cudaMalloc(void** memory, size_t size) {
  *memory = std::aligned_alloc(256, (size + 255) / 256 * 256);
  return std::memset(*memory, 0xff, size), 0;
}

int cudaMallocHost(void** memory, size_t size) { return cudaMalloc(memory, size); }
int cudaFree(void* memory) { return std::free(memory), 0; }
int cudaFreeHost(void* memory) { return std::free(memory), 0; }
int cudaMemcpyAsync(void* to, const void* from, size_t size, int, void*) { return std::memmove(to, from, size), 0; }
int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, void*) {
  return std::memmove(to, from, size), 0;
}

int cudaStreamCreate(void** stream) { return *stream = nullptr, 0; }
int cudaStreamCreateWithFlags(void** stream, unsigned) { return *stream = nullptr, 0; }
int cudaStreamDestroy(void*) { return 0; }
int cudaStreamSynchronize(void*) { return 0; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return 0; }
int cudaStreamBeginCapture(void*, int) { return 1; }
int cudaStreamEndCapture(void*, void**) { return 1; }
int cudaEventCreate(void** event) { return *event = nullptr, 0; }
int cudaEventDestroy(void*) { return 0; }
int cudaEventRecord(void*, void*) { return 0; }
int cudaEventSynchronize(void*) { return 0; }
int cudaEventElapsedTime(float* time, void*, void*) { return *time = 0, 0; }
int cudaGraphDestroy(void*) { return 1; }
int cudaGraphExecDestroy(void*) { return 1; }
int cudaGraphInstantiate() { return 1; }
int cudaGraphLaunch(void*, void*) { return 1; }
}
