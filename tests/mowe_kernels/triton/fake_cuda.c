/* A CUDA driver without a GPU: it loads any kernel, and notes what it is asked to start instead of starting it. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define KERNELS 4096
#define NOTES 4096
#define PARAMETERS 64

typedef struct { uint32_t grid[3], block[3], shared; void *stream, *attributes; uint32_t num_attributes; } Config;

typedef struct {
  uint64_t function, stream;
  uint32_t grid[3], block[3], shared, num_attributes, num_bytes;
  uint8_t bytes[PARAMETERS * 16]; /* the parameters, one after the other */
} Note;

static struct { size_t count, sizes[PARAMETERS]; } kernels[KERNELS];
static Note notes[NOTES];
static int num_kernels, num_notes, error_of_launches, driver_version = 13000;
static __thread void *context; /* any is of the first device but one */
static void *launched_in;
static void *const other = (void *)1;

/* For the tests. A function is the number of its kernel, from 1 on. */
void fake_parameters(uint64_t function, size_t count, const size_t *sizes) {
  kernels[function].count = count;
  memcpy(kernels[function].sizes, sizes, count * sizeof *sizes);
}
void fake_error(int error) { error_of_launches = error; }
void fake_version(int version) { driver_version = version; }
void fake_launched_in(void **of_the_last_one) { *of_the_last_one = launched_in; }
int fake_notes(const Note **first) {
  const int count = num_notes;
  *first = notes;
  num_notes = 0;
  return count;
}

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  if (!context || context == other) return 201; /* CUDA_ERROR_INVALID_CONTEXT */
  launched_in = context;
  if (error_of_launches) return error_of_launches;
  if (num_notes == NOTES) abort();
  Note *note = memset(&notes[num_notes++], 0, sizeof *note);
  note->function = (uint64_t)function, note->stream = (uint64_t)config->stream;
  memcpy(note->grid, config->grid, sizeof note->grid), memcpy(note->block, config->block, sizeof note->block);
  note->shared = config->shared, note->num_attributes = config->num_attributes;
  for (size_t i = 0; i < kernels[note->function].count; ++i) {
    const size_t size = kernels[note->function].sizes[i];
    memcpy(note->bytes + note->num_bytes, parameters[i], size), note->num_bytes += size;
  }
  return 0;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, void *stream, void **parameters, void **extra) {
  const Config config = {{x, y, z}, {block_x, block_y, block_z}, shared, stream, NULL, 0};
  return cuLaunchKernelEx(&config, function, parameters, extra);
}
/* The descriptor is a copy of what it was made of. */
int cuTensorMapEncodeTiled(void *map, uint32_t type, uint32_t rank, uint64_t address, const uint64_t *sizes,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *steps, uint32_t interleave,
                           uint32_t swizzle, uint32_t promotion, uint32_t fill) {
  if (rank != 2 || (uintptr_t)map % 64) return 1;
  const uint64_t numbers[16] = {address, ~0u << 16 | type, rank, sizes[0], sizes[1], strides[0], box[0], box[1],
                                steps[0], steps[1], interleave, swizzle, promotion, fill};
  memcpy(map, numbers, sizeof numbers);
  return 0;
}
int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *size) {
  if (index >= kernels[(uint64_t)function].count) return 1; /* CUDA_ERROR_INVALID_VALUE */
  *offset = 0, *size = kernels[(uint64_t)function].sizes[index];
  return 0;
}
int cuGetErrorString(int error, const char **text) {
  *text = error == 201 ? "invalid device context" : error == 719 ? "unspecified launch failure" : NULL;
  return *text ? 0 : 1;
}
int cuCtxGetCurrent(void **current) { *current = context; return 0; }
int cuCtxGetDevice(int *device) { *device = context == other; return 0; }
int cuCtxSetCurrent(void *current) { context = current; return 0; }
int cuDriverGetVersion(int *version) { *version = driver_version; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **retained, int device) { *retained = kernels; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = 1024; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = kernels; return 0; }
int cuModuleGetFunction(uint64_t *function, void *module, const char *name) { *function = ++num_kernels; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) { *value = pointer; return 0; }

/* Needed to load what Triton compiles against the driver, and never called. */
#define UNUSED(name) int name(void) { abort(); }
UNUSED(cuCtxGetLimit) UNUSED(cuCtxSetLimit) UNUSED(cuOccupancyMaxActiveClusters)
