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
#if SMI_X86_DISPATCH
  if constexpr (std::is_same_v<S, BFloat16> && kNarrows) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const auto bits = (Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xFFFF, halves) << 16;
    return load<Vec<float>>(&bits);
  } else
#endif
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
#if SMI_X86_DISPATCH
  if constexpr (std::is_same_v<S, BFloat16> && kNarrows) {
    const auto halves = (__m256i)_mm512_cvtneps_pbh((__m512)vector);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
  } else
#endif
      if constexpr (std::is_same_v<S, BFloat16>) {
    const auto bits = load<Vec<uint32_t>>(&vector);
    const Vec<uint32_t> rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    const Vec<uint32_t> kept = vector == vector ? rounded : Vec<uint32_t>{} + 0x7FC0;
    store(to, __builtin_convertvector(kept, Vec<uint16_t, kVectorBytes / 2>));
  } else {
    store(to, vector);
  }
}

// The first `count` elements, at most a vector of them; zeros follow.
template <typename S>
inline Vec<Computed<S>> load_n(const S* from, int64_t count) {
  if (count == lanes<Computed<S>>()) return load_wide(from);
  S some[lanes<Computed<S>>()]{};
  std::copy_n(from, count, some);
  return load_wide(some);
}

template <typename S>
inline void store_n(S* to, const Vec<Computed<S>>& vector, int64_t count) {
  if (count == lanes<Computed<S>>()) return store_narrow(to, vector);
  S some[lanes<Computed<S>>()];
  store_narrow(some, vector);
  std::copy_n(some, count, to);
}

// The vector with zeros behind its first `count` elements.
template <typename T>
inline Vec<T> keep_n(const Vec<T>& vector, int64_t count) {
  if (count == lanes<T>()) return vector;
  T some[lanes<T>()];
  store(some, vector);
  return load_n(some, count);
}

// Elements of the vector that begins at element i of `count`.
template <typename T>
inline int64_t elements_at(int64_t i, int64_t count) {
  return std::min(lanes<T>(), count - i);
}

// Copies `count` elements to a type that is computed in the same one.
template <typename From, typename To>
inline void convert_n(const From* from, int64_t count, To* to) {
  using T = Computed<From>;
  for (int64_t i = 0; i < count; i += lanes<T>()) {
    const int64_t n = elements_at<T>(i, count);
    store_n(to + i, load_n(from + i, n), n);
  }
}
