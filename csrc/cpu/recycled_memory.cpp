#include "recycled_memory.h"

#include <map>
#include <mutex>
#include <new>

// Weak, because torch defines it only from 2.11 on. Before that, results are allocated like any
// other tensor.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                int64_t offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* tensor, int32_t layout, const uint8_t* metadata,
                int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace smi_fast {
namespace {

// Below this size malloc reuses blocks well. Larger ones may go back to the OS, and faulting their
// pages in again costs more than writing the result.
constexpr size_t kLeastBytes = size_t{1} << 20;
constexpr size_t kMostBytesHeld = size_t{32} << 20;
constexpr std::align_val_t kAlignment{64};

#ifdef __SANITIZE_ADDRESS__
constexpr bool kRecycles = false;  // recycling would hide reads of freed memory
#else
constexpr bool kRecycles = true;
#endif

// Unused blocks by their size in bytes.
class FreeBlocks {
 public:
  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto block = blocks_.find(bytes);
      if (block != blocks_.end()) {
        void* data = block->second;
        blocks_.erase(block);
        held_ -= bytes;
        return data;
      }
    }
    return ::operator new(bytes, kAlignment);
  }

  void give_back(void* data, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // Sizes change from phase to phase, so blocks of the last phase make room for this one.
    while (held_ + bytes > kMostBytesHeld && !blocks_.empty()) drop(blocks_.begin());
    if (held_ + bytes > kMostBytesHeld) return ::operator delete(data, kAlignment);
    blocks_.emplace(bytes, data);
    held_ += bytes;
  }

 private:
  using Blocks = std::multimap<size_t, void*>;

  void drop(Blocks::iterator block) {
    held_ -= block->first;
    ::operator delete(block->second, kAlignment);
    blocks_.erase(block);
  }

  std::mutex mutex_;
  Blocks blocks_;
  size_t held_ = 0;
};

// Never destroyed, because tensors may outlive static objects.
FreeBlocks& free_blocks() {
  static FreeBlocks& instance = *new FreeBlocks;
  return instance;
}

}  // namespace

Tensor new_result(const Tensor& like, const std::vector<int64_t>& sizes) {
  int64_t count = 1;
  std::vector<int64_t> strides(sizes.size());
  for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) strides[i] = count;
  const size_t bytes = count * like.element_size();
  if (!kRecycles || !torch_from_blob || bytes < kLeastBytes) {
    return torch::stable::new_empty(like, sizes);
  }
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  void* data = free_blocks().take(bytes);
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      data, sizes.size(), sizes.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(), -1,
      &result, aoti_torch_layout_strided(), nullptr, 0,
      [](void* block, void* size) {
        free_blocks().give_back(block, reinterpret_cast<size_t>(size));
      },
      reinterpret_cast<void*>(bytes)));
  return Tensor(result);
}

}  // namespace smi_fast
