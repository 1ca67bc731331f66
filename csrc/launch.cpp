// Compiled kernels started one after the other on other tensors than before. Needs no CUDA to be built: the driver,
// which is where the kernels come from, is asked for its functions when they are first used.
#include <dlfcn.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace mowe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The driver's functions by their types in cuda.h: CUresult, CUdevice and enumerations are int, what it opens is void*.
struct Driver {
  int (*get_current)(void** context);
  int (*get_context_device)(int* device);
  int (*get_device)(int* device, int ordinal);
  int (*retain)(void** context, int device);
  int (*set_current)(void* context);
  int (*launch)(void* function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y,
                unsigned threads_z, unsigned shared, void* stream, void** parameters, void** extra);
  int (*encode)(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill);
  int (*parameter)(void* function, size_t index, size_t* offset, size_t* size);
  int (*get_version)(int* version);
  int (*name_error)(int error, const char** text);
  int version = 0;
  bool found;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    found = library != nullptr;
    auto find = [&](auto& function, const char* name) {
      function = library ? reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name)) : nullptr;
      found = found && function != nullptr;
    };
    find(get_current, "cuCtxGetCurrent");
    find(get_context_device, "cuCtxGetDevice");
    find(get_device, "cuDeviceGet");
    find(retain, "cuDevicePrimaryCtxRetain");
    find(set_current, "cuCtxSetCurrent");
    find(launch, "cuLaunchKernel");
    find(encode, "cuTensorMapEncodeTiled");
    find(parameter, "cuFuncGetParamInfo");
    find(get_version, "cuDriverGetVersion");
    find(name_error, "cuGetErrorString");
    if (found) get_version(&version);
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

// As mowe_kernels/csrc/launch.py has them. Where a size is kOfBatch, it is the number of rows of the batch.
constexpr int64_t kOfBatch = -1;

struct Argument {
  enum Kind : int32_t { kValue, kAddress, kMatrix, kRows };
  Kind kind;
  int32_t place;   // of an address, among those given; of a matrix, among `matrices`
  uint64_t value;  // a value's bits, or bytes to be added to the address
};

struct Matrix {  // of which a descriptor (TMA) is made: row-major
  int32_t type, swizzle;
  int64_t rows;
  uint64_t columns, itemsize;
  uint32_t block_rows, block_columns;
  Argument address;
};

struct Launch {  // (rows // block + more) * times programs; of a fixed number, no batch has as many rows as `block`
  void* function;
  uint32_t block, more, times, threads, shared, arguments;
};

struct Layout {
  const int64_t* sizes;
  int32_t dims, type, aligned;  // aligned: whether it begins at a multiple of 16 bytes

  std::vector<int64_t> shape(int64_t rows) const {
    std::vector<int64_t> shape(sizes, sizes + dims);
    std::replace(shape.begin(), shape.end(), kOfBatch, rows);
    return shape;
  }
};

struct Program {
  const Layout *inputs, *results;
  const Launch* launches;
  const Argument* arguments;  // of all launches, one after the other
  const Matrix* matrices;
  int64_t most_rows, bytes;  // bytes: of the temporaries, of so many rows
  int32_t num_inputs, num_of_layer, num_results, num_launches, num_matrices, device;  // of a layer: the last inputs
};

struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// The context of a device by its number, of which there is one for the whole process.
int primary_context(int ordinal, void** context) {
  static std::mutex mutex;
  static std::unordered_map<int, void*> contexts;
  const std::lock_guard<std::mutex> lock(mutex);
  void*& kept = contexts[ordinal];
  int device = 0, error = 0;
  if (!kept && !(error = driver().get_device(&device, ordinal))) error = driver().retain(&kept, device);
  *context = kept;
  return error;
}

// Has a context of the device be current, which none is in a thread that has not used CUDA yet or uses another device.
// other: the context to go back to; null where there is none.
int enter(int ordinal, void** other) {
  void *before = nullptr, *own = nullptr;
  int device = 0, current = 0, error = driver().get_current(&before);
  if (!error && before) error = driver().get_context_device(&current);
  if (!error) error = driver().get_device(&device, ordinal);
  if (error || (before && current == device)) return error;
  if ((error = primary_context(ordinal, &own))) return error;
  *other = before;
  return driver().set_current(own);
}

int encode(const Matrix& matrix, int64_t rows, uint64_t address, TensorMap& map) {
  const uint64_t height = matrix.rows == kOfBatch ? rows : matrix.rows;
  const uint64_t sizes[] = {matrix.columns, height}, pitch[] = {matrix.columns * matrix.itemsize};
  const uint32_t box[] = {matrix.block_columns, matrix.block_rows}, steps[] = {1, 1};
  constexpr int kNoInterleave = 0, kPromote128Bytes = 2, kFillWithZeros = 0;
  const int error = driver().encode(&map, matrix.type, 2, reinterpret_cast<void*>(address), sizes, pitch, box, steps,
                                    kNoInterleave, matrix.swizzle, kPromote128Bytes, kFillWithZeros);
  // What these drivers set wrongly is cleared as CUTLASS and Triton do.
  constexpr int kLastWrongVersion = 13010, kSmallMatrix = 128 << 10;  // bytes
  const uint64_t last_byte = height * pitch[0] - matrix.itemsize;
  if (driver().version <= kLastWrongVersion && last_byte + 1 < kSmallMatrix) map.opaque[1] &= ~(uint64_t{1} << 21);
  return error;
}

bool fits(const Tensor& tensor, const Layout& layout, int64_t rows, int device) {
  auto is = [rows](int64_t size, int64_t expected) { return size == (expected == kOfBatch ? rows : expected); };
  const auto sizes = tensor.sizes();
  return tensor.get_device() == device && tensor.scalar_type() == static_cast<ScalarType>(layout.type) &&
         std::equal(sizes.begin(), sizes.end(), layout.sizes, layout.sizes + layout.dims, is) &&
         tensor.is_contiguous() && (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0) == (layout.aligned != 0);
}

int run(const Program& program, int64_t rows, const std::vector<uint64_t>& addresses, void* stream) {
  auto address = [&](const Argument& argument) { return addresses[argument.place] + argument.value; };
  void* other = nullptr;
  int error = program.num_launches ? enter(std::max(program.device, 0), &other) : 0;
  std::vector<TensorMap> maps(program.num_matrices);
  for (int i = 0; i < program.num_matrices && !error; ++i)
    error = encode(program.matrices[i], rows, address(program.matrices[i].address), maps[i]);
  std::vector<uint64_t> values;
  std::vector<void*> parameters;
  const Argument* next = program.arguments;
  for (int i = 0; i < program.num_launches && !error; ++i) {
    const Launch& launch = program.launches[i];
    values.resize(std::max<size_t>(values.size(), launch.arguments));
    parameters.resize(values.size());
    for (uint32_t j = 0; j < launch.arguments; ++j, ++next) {
      values[j] = next->kind == Argument::kAddress ? address(*next) : next->kind == Argument::kRows ? rows : next->value;
      parameters[j] = next->kind == Argument::kMatrix ? static_cast<void*>(&maps[next->place]) : &values[j];
    }
    const auto programs = static_cast<unsigned>((rows / launch.block + launch.more) * launch.times);
    error = driver().launch(launch.function, programs, 1, 1, launch.threads, 1, 1, launch.shared, stream,
                            parameters.data(), nullptr);
  }
  if (other) driver().set_current(other);
  return error;
}

Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, int32_t type) {
  try {
    return torch::stable::new_empty(like, sizes, static_cast<ScalarType>(type));
  } catch (const std::exception&) {  // whose text is not that of the allocator
    STD_TORCH_CHECK(false, "out of memory for the results and temporaries of a layer");
  }
}

// The results for inputs that lie as those did of which the program was made, whatever the rows up to its most; none
// for others. Behind the last inputs may follow those of further layers, each of which gets the first result of the one
// before it in the place of the first input.
std::vector<Tensor> launch_layers(int64_t address, const std::vector<Tensor>& inputs, int64_t stream) {
  const Program& program = *reinterpret_cast<const Program*>(address);
  const int count = static_cast<int>(inputs.size()), of_all = program.num_inputs - program.num_of_layer;
  if (count < program.num_inputs || (count - of_all) % program.num_of_layer || inputs[0].dim() == 0) return {};
  const int64_t rows = inputs[0].size(0);
  if (rows > program.most_rows) return {};
  for (int i = 0; i < count; ++i) {
    const int place = i < of_all ? i : of_all + (i - of_all) % program.num_of_layer;
    if (!fits(inputs[i], program.inputs[place], rows, program.device)) return {};
  }

  const Tensor memory = allocate(inputs[0], {&program.bytes, 1}, static_cast<int32_t>(ScalarType::Byte));
  Tensor x = inputs[0];
  std::vector<Tensor> results;
  for (int layer = of_all; layer < count; layer += program.num_of_layer) {
    std::vector<uint64_t> addresses;  // of the inputs, of the results that are not empty, of the temporaries
    auto lies = [&](const Tensor& tensor) { addresses.push_back(reinterpret_cast<uint64_t>(tensor.data_ptr())); };
    if (!results.empty()) x = results[0];
    lies(x);
    for (int i = 1; i < of_all; ++i) lies(inputs[i]);
    for (int i = 0; i < program.num_of_layer; ++i) lies(inputs[layer + i]);
    results.clear();
    for (int i = 0; i < program.num_results; ++i) {
      results.push_back(allocate(inputs[0], program.results[i].shape(rows), program.results[i].type));
      if (results.back().numel()) lies(results.back());
    }
    lies(memory);
    if (const int error = run(program, rows, addresses, reinterpret_cast<void*>(stream))) {
      const char* text = nullptr;
      driver().name_error(error, &text);
      STD_TORCH_CHECK(false, "CUDA error: ", text ? text : "unknown error");
    }
  }
  return results;
}

}  // namespace
}  // namespace mowe

// Number of parameters of a kernel, and the bytes each takes, of the first `most`; -1 where the driver cannot say.
extern "C" __attribute__((visibility("default"))) int mowe_parameters(void* function, size_t* sizes, int most) {
  size_t offset = 0, size = 0;
  if (!mowe::driver().found) return -1;
  int count = 0;
  for (; mowe::driver().parameter(function, count, &offset, &size) == 0; ++count)
    if (count < most) sizes[count] = size;
  return count;
}

STABLE_TORCH_LIBRARY_FRAGMENT(mowe, m) { m.def("launch_layers(int program, Tensor[] inputs, int stream) -> Tensor[]"); }

STABLE_TORCH_LIBRARY_IMPL(mowe, CompositeExplicitAutograd, m) {
  m.impl("launch_layers", TORCH_BOX(&mowe::launch_layers));
}
