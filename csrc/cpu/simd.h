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

// An element as the type that it is computed in. A bfloat16 is the upper half of a float32.
template <typename T>
inline T widen(const T& x) {
  return x;
}

inline float widen(const BFloat16& x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  return load<float>(&bits);
}

// The nearest element of a type that is computed in that of x, ties to even. NaN is set apart,
// because the carry of rounding could turn it into a number.
template <typename S>
inline S narrow(const Computed<S>& x) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const uint32_t bits = load<uint32_t>(&x);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return BFloat16(static_cast<uint16_t>(x == x ? rounded : 0x7FC0), BFloat16::from_bits());
  } else {
    return x;
  }
}

// The same for a vector of consecutive elements.
template <typename S>
inline Vec<Computed<S>> load_wide(const S* from) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const auto halves = load<Vec<uint16_t, kVectorBytes / 2>>(from);
    const Vec<uint32_t> bits = __builtin_convertvector(halves, Vec<uint32_t>) << 16;
    return load<Vec<float>>(&bits);
  } else {
    return load<Vec<S>>(from);
  }
}

template <typename S>
inline void store_narrow(S* to, const Vec<Computed<S>>& vector) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    const auto bits = load<Vec<uint32_t>>(&vector);
    const Vec<uint32_t> rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const Vec<uint32_t> kept = vector == vector ? rounded : Vec<uint32_t>{} + 0x7FC0;
    store(to, __builtin_convertvector(kept, Vec<uint16_t, kVectorBytes / 2>));
  } else {
    store(to, vector);
  }
}

// Copies `count` elements to a type that is computed in the same one.
template <typename From, typename To>
inline void convert_n(const From* __restrict from, int64_t count, To* __restrict to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<To>(widen(from[i]));
}
