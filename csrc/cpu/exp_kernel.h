// e^x for x <= 0 across vector lanes, accurate to about one unit in the last place.

template <typename T>
struct ExpConstants;

// - ln 2 = ln2_high + ln2_low. ln2_high ends in zero bits, so its multiples by n are exact.
// - Adding `round` to a small number leaves its nearest integer in the low bits of the sum, already
//   with the bias of an exponent.
// - e^lowest is still a normal number.
template <>
struct ExpConstants<float> {
  static constexpr float log2_e = 0x1.715476p+0f;
  static constexpr float ln2_high = 0x1.62ep-1f, ln2_low = 0x1.0bfbe8p-15f;
  static constexpr float round = 0x1.8p+23f + 127, lowest = -87.0f;
  static constexpr int degree = 7, mantissa_bits = 23;
};

template <>
struct ExpConstants<double> {
  static constexpr double log2_e = 0x1.71547652b82fep+0;
  static constexpr double ln2_high = 0x1.62e42fefap-1, ln2_low = 0x1.cf79abc9e3b3ap-40;
  static constexpr double round = 0x1.8p+52 + 1023, lowest = -708.0;
  static constexpr int degree = 13, mantissa_bits = 52;
};

constexpr double factorial(int k) { return k < 2 ? 1.0 : k * factorial(k - 1); }

// e^x = 2^n e^r with |r| <= ln 2 / 2, where a short Taylor series suffices. The result is zero
// below `lowest`.
template <typename T>
inline Vec<T> exp_of_negative(const Vec<T>& x) {
  using Constants = ExpConstants<T>;
  const Vec<T> shifted = x * Constants::log2_e + Constants::round;
  const Vec<T> n = shifted - Constants::round;
  const Vec<T> r = (x - n * Constants::ln2_high) - n * Constants::ln2_low;
  Vec<T> sum = Vec<T>{} + static_cast<T>(1 / factorial(Constants::degree));
#pragma GCC unroll 16
  for (int k = Constants::degree - 1; k >= 0; --k) sum = sum * r + static_cast<T>(1 / factorial(k));
  const auto low_bits = load<Vec<Bits<T>>>(&shifted);
  const auto exponent = low_bits << Constants::mantissa_bits;
  return x < Constants::lowest ? Vec<T>{} : sum * load<Vec<T>>(&exponent);
}
