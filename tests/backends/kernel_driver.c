/* Runs one compiled function on tensors from a file, without TVM's runtime, and writes the tensors back.
 *
 * The file: int64 count; for each tensor int64 code, bits, rank, sizes, then its data, all little-endian.
 */
#include <dlpack/dlpack.h>
#include <stdio.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>

typedef struct {
  void* sync;
  int32_t tasks;
} Environment;
typedef int (*Lambda)(int task, Environment* environment, void* data);

static int launch(Lambda lambda, void* data, int tasks) {
  Environment environment = {0, 1};
  return lambda(0, &environment, data);
}
static void* allocate(int device, int id, uint64_t bytes, int code, int bits) { return aligned_alloc(64, (bytes + 63) & ~63ull); }
static int release(int device, int id, void* memory) { free(memory); return 0; }

int (*__TVMBackendParallelLaunch)(Lambda, void*, int) = launch;
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = release;

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; ++i) fputs(parts[i], stderr);
  exit(3);
}

extern int __tvm_ffi_function(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);

static int64_t number(FILE* file) {
  int64_t value;
  if (fread(&value, 8, 1, file) != 1) exit(2);
  return value;
}

int main(int argc, char** argv) {
  FILE* file = fopen(argv[1], "rb");
  int64_t count = number(file), bytes[32];
  static DLTensor tensors[32];
  TVMFFIAny arguments[32] = {0}, result = {0};
  for (int64_t i = 0; i < count; ++i) {
    DLTensor* tensor = &tensors[i];
    tensor->device.device_type = kDLCPU;
    tensor->dtype.code = number(file), tensor->dtype.bits = number(file), tensor->dtype.lanes = 1;
    tensor->ndim = number(file), tensor->shape = calloc(tensor->ndim, 8), tensor->strides = calloc(tensor->ndim, 8);
    bytes[i] = tensor->dtype.bits / 8;
    for (int axis = 0; axis < tensor->ndim; ++axis) bytes[i] *= tensor->shape[axis] = number(file);
    for (int64_t axis = tensor->ndim - 1, stride = 1; axis >= 0; stride *= tensor->shape[axis--]) tensor->strides[axis] = stride;
    tensor->data = aligned_alloc(64, (bytes[i] + 63) & ~63ll);
    if (fread(tensor->data, 1, bytes[i], file) != (size_t)bytes[i]) return 2;
    arguments[i].type_index = kTVMFFIDLTensorPtr, arguments[i].v_ptr = tensor;
  }
  fclose(file);
  if (__tvm_ffi_function(0, arguments, count, &result)) return 1;
  file = fopen(argv[1], "wb");
  for (int64_t i = 0; i < count; ++i) fwrite(tensors[i].data, 1, bytes[i], file);
  return fclose(file);
}
