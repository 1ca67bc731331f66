// Memory that results of one size use again: the page faults of a fresh buffer cost more than filling it.
#pragma once

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace mowe {

// Blocks that nobody uses. One comes back when the last tensor that sees it is gone, so that nothing which autograd,
// a view or another thread still holds is ever overwritten.
class Scratch {
 public:
  // An uninitialised, contiguous tensor on the CPU.
  static torch::stable::Tensor empty(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type) {
    std::vector<int64_t> strides(sizes.size());
    int64_t count = 1;
    for (size_t d = sizes.size(); d-- > 0; count *= sizes[d]) strides[d] = count;
    const size_t wanted = count * (type == torch::headeronly::ScalarType::Float ? 4 : 2);
    const size_t bytes = (wanted + kAlignment) / kAlignment * kAlignment;
    return torch::stable::from_blob(
        instance().take(bytes), sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
        [bytes](void* data) { instance().give(data, bytes); });
  }

 private:
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kMostKept = size_t{256} << 20;  // three layers of Whisper-large in float32

  struct Block {
    void* data;
    size_t bytes;
  };

  static Scratch& instance() {
    static Scratch* scratch = new Scratch;  // never destroyed: tensors may outlive the library's statics
    return *scratch;
  }

  void* take(size_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = free_.size(); i-- > 0;) {  // the last to come back is the most likely to be in cache
        if (free_[i].bytes != bytes) continue;
        void* data = free_[i].data;
        free_.erase(free_.begin() + i);
        kept_ -= bytes;
        return data;
      }
    }
    void* data = std::aligned_alloc(kAlignment, bytes);
    if (!data) throw std::bad_alloc();
    return data;
  }

  void give(void* data, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back({data, bytes});
    kept_ += bytes;
    while (kept_ > kMostKept) {
      kept_ -= free_.front().bytes;
      std::free(free_.front().data);
      free_.erase(free_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // in the order in which they came back
  size_t kept_ = 0;
};

}  // namespace mowe
