#include "recycled_memory.h"

#include <map>
#include <mutex>
#include <new>

// Torch has it from 2.11 on; before that, results are allocated like any other tensor.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides,
                int64_t offset, int32_t dtype, int32_t device_type, int32_t device_index,
                AtenTensorHandle* tensor, int32_t layout, const uint8_t* metadata,
                int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace smi_fast {
namespace {

// An allocator's own blocks are as good below this size. Above, it may return them to the system
// or cut them up, and then the pages of the next result cost more than what is written to them.
constexpr size_t kLeastBytes = size_t{1} << 20;
constexpr size_t kMostBytesHeld = size_t{32} << 20;
constexpr std::align_val_t kAlignment{64};

#ifdef __SANITIZE_ADDRESS__
constexpr bool kRecycles = false;  // it would hide what is read after it was freed
#else
constexpr bool kRecycles = true;
#endif

// Blocks that nobody uses, by their size.
class Pool {
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
    // Sizes change from phase to phase: those of the last one make room.
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

// Never destroyed, for tensors may outlive everything that is.
Pool& pool() {
  static Pool& instance = *new Pool;
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
  void* data = pool().take(bytes);
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      data, sizes.size(), sizes.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(), -1,
      &result, aoti_torch_layout_strided(), nullptr, 0,
      [](void* block, void* size) { pool().give_back(block, reinterpret_cast<size_t>(size)); },
      reinterpret_cast<void*>(bytes)));
  return Tensor(result);
}

}  // namespace smi_fast
