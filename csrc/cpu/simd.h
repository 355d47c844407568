// Vector types of the instruction set in whose namespace this file is included. The compiler
// defines their operators. There is no include guard on purpose; see isa_dispatch.h.

template <typename T, int kBytes = kVectorBytes>
struct VecOf {
  typedef T Type __attribute__((vector_size(kBytes)));
};

template <typename T, int kBytes = kVectorBytes>
using Vec = typename VecOf<T, kBytes>::Type;

template <typename V, typename T>
inline V load(const T* from) {
  V result;
  std::memcpy(&result, from, sizeof(V));
  return result;
}

template <typename V, typename T>
inline void store(T* to, const V& vector) {
  std::memcpy(to, &vector, sizeof(V));
}

template <typename T>
constexpr int64_t lanes() {
  return kVectorBytes / sizeof(T);
}

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
