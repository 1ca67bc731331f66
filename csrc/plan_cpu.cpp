// The packing plan on the CPU: a counting sort of the (clip, slot) pairs by encoder, and where their rows lie.
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace mowe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// indices: int64 [B, k]; lengths: int32 [L, B]; rank: int32 [E]; level_bounds: int32 [L, 2]; all contiguous.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pack_plan(
    const Tensor& indices, const Tensor& lengths, const Tensor& rank, const Tensor& level_bounds) {
  const int64_t batch = indices.size(0), slots = indices.size(1), pairs = batch * slots;
  const int64_t levels = lengths.size(0), encoders = rank.size(0);
  auto integers = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_empty(lengths, sizes, ScalarType::Int);
  };
  auto data = [](const Tensor& tensor) { return static_cast<int32_t*>(tensor.data_ptr()); };
  const Tensor out[5] = {integers({pairs}), integers({batch, slots}), integers({pairs}), integers({levels, pairs + 1}),
                         integers({levels, encoders + 1})};
  int32_t *order = data(out[0]), *position = data(out[1]), *encoder = data(out[2]);
  const int32_t *ranks = data(rank), *bounds = data(level_bounds);
  const auto* chosen = static_cast<const int64_t*>(indices.data_ptr());
  for (int64_t e = 0; e < encoders; ++e) {
    STD_TORCH_CHECK(0 <= ranks[e] && ranks[e] < encoders, "pack_plan: rank ", ranks[e], " is out of range for ",
                    encoders, " encoders");
  }

  // The sorting key of every pair, that of an absent one being the number of encoders, and the slot that serves it.
  std::vector<int32_t> key(pairs), server(pairs);
  std::vector<int32_t> first_pair(encoders + 2, 0);  // of each key, counted at one place further on
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t first_slot = pair / slots * slots, choice = chosen[pair];
    STD_TORCH_CHECK(choice < encoders, "pack_plan: index ", choice, " is out of range for ", encoders, " encoders");
    int64_t same = first_slot;
    while (same < pair && (chosen[same] < 0 ? choice >= 0 : chosen[same] != choice)) ++same;
    server[pair] = static_cast<int32_t>(same);
    key[pair] = choice < 0 || same < pair ? static_cast<int32_t>(encoders) : ranks[choice];
    ++first_pair[key[pair] + 1];
  }
  for (int64_t e = 0; e < encoders + 1; ++e) first_pair[e + 1] += first_pair[e];

  std::vector<int32_t> next(first_pair.begin(), first_pair.end()), place(pairs);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int32_t at = next[key[pair]]++;
    place[pair] = at;
    order[at] = static_cast<int32_t>(pair);
    encoder[at] = key[pair];
  }
  for (int64_t pair = 0; pair < pairs; ++pair) position[pair] = place[server[pair]];

  for (int64_t level = 0; level < levels; ++level) {
    const int32_t low = bounds[2 * level], high = bounds[2 * level + 1];
    const int32_t* frames = data(lengths) + level * batch;
    int32_t *ends = data(out[3]) + level * (pairs + 1), *offsets = data(out[4]) + level * (encoders + 1);
    ends[0] = 0;
    for (int64_t at = 0; at < pairs; ++at) {
      const bool present = low <= encoder[at] && encoder[at] < high;
      ends[at + 1] = ends[at] + (present ? frames[order[at] / slots] : 0);
    }
    for (int64_t e = 0; e <= encoders; ++e) offsets[e] = ends[first_pair[e]];
  }
  return {out[0], out[1], out[2], out[3], out[4]};
}

}  // namespace
}  // namespace mowe

STABLE_TORCH_LIBRARY_FRAGMENT(mowe, m) {
  m.def(
      "pack_plan.csrc(Tensor indices, Tensor lengths, Tensor rank, Tensor level_bounds)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mowe, CPU, m) { m.impl("pack_plan.csrc", TORCH_BOX(&mowe::pack_plan)); }
