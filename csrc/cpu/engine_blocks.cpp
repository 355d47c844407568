// Consecutive blocks of a frozen Vision Transformer, forward and backward. Each of their non-GEMM
// steps is also an op of its own. smi_fast.engine makes the lists of tensors that come in here.

#include "engine_products.h"

namespace smi_fast {
namespace {

// A frozen weight [out, in] and its transpose. The packed copies of the two serve GEMMs of
// `packed_rows` rows, or with 0 of any number of rows; without copies, packed_rows is -1.
struct Linear {
  const Tensor *weight, *transposed, *packed, *packed_transposed;
  int64_t packed_rows;

  // x [rows, in] · weightᵀ.
  Tensor forward(const Tensor& x) const {
    if (!is_packed_for(x)) return product(x, *transposed);
    return packed_product(x, *weight, *packed);
  }

  // Gradient of x, given that of the output [rows, out].
  Tensor backward(const Tensor& gradient) const {
    if (!is_packed_for(gradient)) return product(gradient, *weight);
    return packed_product(gradient, *transposed, *packed_transposed);
  }

  bool is_packed_for(const Tensor& x) const {
    return x.size(0) > 0 && (packed_rows == 0 || packed_rows == x.size(0));
  }
};

// Rotary positions of blocks, [B, K, 1 or H, 2D] of each, or none. See rotate_().
struct Rotary {
  const std::vector<Tensor>* rotations = nullptr;
  bool half = false;

  const Tensor* of(size_t block) const { return rotations ? &rotations->at(block) : nullptr; }
};

// Weights of one block, and the buffers of its two norms. The bias of qkv is that of q alone, or
// with rotary positions those of q and k. With a norm in front of proj, that of v is apart.
struct Block {
  Linear qkv, proj, fc1, fc2;
  const Tensor *q_bias, *proj_bias, *fc1_bias, *fc2_bias;
  const Tensor *to_attention, *attention_rstd, *to_mlp, *mlp_rstd;
  const Tensor* v_bias;
};

constexpr size_t kWeights = 12, kPacked = 8, kNormalized = 4;

std::vector<Block> blocks_of(const std::vector<Tensor>& weights, const std::vector<Tensor>& packed,
                             int64_t packed_rows, const std::vector<Tensor>& normalized) {
  const size_t count = normalized.size() / kNormalized;
  const size_t each = weights.size() / std::max<size_t>(1, count);
  STD_TORCH_CHECK(weights.size() == count * each && (each == kWeights || each == kWeights + 1) &&
                      normalized.size() == count * kNormalized &&
                      (packed.empty() || packed.size() == count * kPacked),
                  "expected ", kWeights, " weights or one more, ", kNormalized,
                  " buffers of norms, and ", kPacked, " packed weights or none, for each block");
  std::vector<Block> blocks;
  for (size_t i = 0; i < count; ++i) {
    const Tensor* w = &weights[i * each];
    const Tensor* n = &normalized[i * kNormalized];
    const auto linear = [&](size_t which) {
      const Tensor* p = packed.empty() ? nullptr : &packed[i * kPacked + 2 * which];
      return Linear{w + 3 * which, w + 3 * which + 1, p, p ? p + 1 : nullptr, p ? packed_rows : -1};
    };
    blocks.push_back({linear(0), linear(1), linear(2), linear(3), w + 2, w + 5, w + 8, w + 11, n,
                      n + 1, n + 2, n + 3, each > kWeights ? w + kWeights : nullptr});
  }
  return blocks;
}

// Whether a block has SwiGLU in place of GELU: fc1 then has a gate and an input for each row of
// fc2.
bool is_gated(const Block& block) {
  return block.fc1.weight->size(0) == 2 * block.fc2.weight->size(1);
}

// Writes the attention of qkv [B, N, 3, H, D/H] into attended. With a rotation, q and k are biased
// and rotated in place. With offsets, images are concatenated, see attend_().
void attend_block(const Block& block, const Tensor& qkv, const Tensor* rotation, bool half,
                  const std::optional<Tensor>& offsets, const Tensor& attended) {
  if (!rotation) {
    recorded("smi_fast::attend_", attend_, qkv, *block.q_bias, attended, offsets);
    return;
  }
  recorded("smi_fast::rotate_", rotate_, qkv, *block.q_bias, *rotation, half);
  const Tensor none = torch::stable::new_zeros(*block.q_bias, {qkv.size(3) * qkv.size(4)});
  recorded("smi_fast::attend_", attend_, qkv, none, attended, offsets);
}

// Writes the gradient of qkv before its bias into d_qkv, given that of the attention's output.
void attend_block_backward(const Block& block, const Tensor& grad, const Tensor& qkv,
                           const Tensor* rotation, bool half, const std::optional<Tensor>& offsets,
                           const Tensor& d_qkv) {
  if (!rotation) {
    recorded("smi_fast::attend_backward_", attend_backward_, grad, qkv, *block.q_bias, d_qkv,
             offsets);
    return;
  }
  const Tensor none = torch::stable::new_zeros(*block.q_bias, {qkv.size(3) * qkv.size(4)});
  recorded("smi_fast::attend_backward_", attend_backward_, grad, qkv, none, d_qkv, offsets);
  const Tensor parts = torch::stable::view(d_qkv, {qkv.size(0), qkv.size(1), 3, qkv.size(3), -1});
  recorded("smi_fast::rotate_backward_", rotate_backward_, parts, 2, *rotation, half);
}

// The gradient of fc1's output, given that of the hidden layer, and what activate() saved.
Tensor activate_backward(const Block& block, const Tensor& d_hidden, const Tensor& derivative) {
  if (!is_gated(block)) {
    recorded("smi_fast::multiply_", multiply_, d_hidden, derivative);
    return d_hidden;
  }
  const Tensor d_x = torch::stable::empty_like(derivative);
  recorded("smi_fast::swiglu_backward_", swiglu_backward_, d_hidden, derivative, d_x);
  return d_x;
}

// Runs the blocks on the residual stream x [rows, D] in place; with offsets, the rows of image b
// are those from offsets[b] up to offsets[b + 1]. What products read and write has the type of the
// weights; x, rstd and the biases have the one that this is computed in. Norms are LayerNorm, or
// RMSNorm unless `centred`. Each block has an eps of its two norms, of one in front of proj if it
// has a v_bias, and of one in front of fc2 if there is one more eps. GELU may be approximated, see
// gelu_(). With `saves`, returns what backward needs of each block:
// - qkv [B, N, 3, H, D/H];
// - the derivatives [rows, F] of GELU or [rows, 2F] of SwiGLU;
// - normalized [rows, A] and rstd [rows] of the norm in front of proj, if there is one;
// - normalized [rows, F] and rstd [rows] of the norm in front of fc2, if there is one.
// The last tensor returned is the output of the last fc2. It is not yet added to x, and neither is
// its bias.
std::vector<Tensor> run(const Tensor& x, const std::vector<Tensor>& weights,
                        const std::vector<Tensor>& packed, int64_t packed_rows,
                        const std::vector<Tensor>& normalized, const std::vector<double>& eps,
                        const Tensor& attended, const Tensor& hidden, bool saves,
                        const Rotary& rotary, const std::optional<Tensor>& offsets, bool centred,
                        const std::string& approximate) {
  const std::vector<Block> blocks = blocks_of(weights, packed, packed_rows, normalized);
  STD_TORCH_CHECK(!blocks.empty() && eps.size() % blocks.size() == 0,
                  "expected at least one block, and two to four eps for each");
  const std::vector<int64_t> qkv_shape{attended.size(0), attended.size(1), 3, attended.size(2),
                                       attended.size(3)};
  const Tensor attended_rows = torch::stable::view(
      attended, {attended.size(0) * attended.size(1), attended.size(2) * attended.size(3)});
  std::vector<Tensor> saved;
  std::optional<Tensor> added, bias;
  const double* own_eps = eps.data();
  const size_t eps_count = eps.size() / blocks.size();
  for (size_t i = 0; i < blocks.size(); ++i) {
    const Block& block = blocks[i];
    recorded("smi_fast::add_normalize_", add_normalize_, x, added, bias, own_eps[0],
             *block.to_attention, *block.attention_rstd, centred);
    const Tensor qkv = torch::stable::view(block.qkv.forward(*block.to_attention), qkv_shape);
    attend_block(block, qkv, rotary.of(i), rotary.half, offsets, attended);
    std::vector<Tensor> inner;  // what norms inside of attention and of the MLP save
    const auto normed = [&](const Tensor& rows, const std::optional<Tensor>& offset,
                            double norm_eps) {
      const auto [result, rstd] = normalize_inner(rows, offset, norm_eps, centred);
      inner.insert(inner.end(), {result, rstd});
      return result;
    };
    added = block.proj.forward(block.v_bias ? normed(attended_rows, *block.v_bias, own_eps[2])
                                            : attended_rows);
    recorded("smi_fast::add_normalize_", add_normalize_, x, added, std::optional(*block.proj_bias),
             own_eps[1], *block.to_mlp, *block.mlp_rstd, centred);
    const Tensor derivative = block.fc1.forward(*block.to_mlp);
    if (is_gated(block)) {
      recorded("smi_fast::swiglu_", swiglu_, derivative, *block.fc1_bias, hidden);
    } else {
      recorded("smi_fast::gelu_", gelu_, derivative, *block.fc1_bias, hidden, approximate);
    }
    const bool has_mlp_norm = eps_count > (block.v_bias ? 3 : 2);
    added = block.fc2.forward(has_mlp_norm ? normed(hidden, std::nullopt, own_eps[eps_count - 1])
                                           : hidden);
    if (saves) {
      saved.insert(saved.end(), {qkv, derivative});
      saved.insert(saved.end(), inner.begin(), inner.end());
    }
    bias = *block.fc2_bias;
    own_eps += eps_count;
  }
  saved.push_back(*added);
  return saved;
}

// Turns the gradient [rows, D] of the blocks' output into that of their input, in place. Products
// take it in the type of the weights, from a copy if that is another one.
void run_backward(const Tensor& gradient, const std::vector<Tensor>& weights,
                  const std::vector<Tensor>& packed, int64_t packed_rows,
                  const std::vector<Tensor>& normalized, const std::vector<Tensor>& saved,
                  const Tensor& d_qkv, const Rotary& rotary, const std::optional<Tensor>& offsets,
                  bool centred) {
  const std::vector<Block> blocks = blocks_of(weights, packed, packed_rows, normalized);
  const ScalarType type = d_qkv.scalar_type();
  const bool copies = gradient.scalar_type() != type;
  const Tensor operand = copies ? torch::stable::to(gradient, type) : gradient;
  const std::optional<Tensor> copy = copies ? std::optional(operand) : std::nullopt;
  const size_t count = saved.size() / blocks.size();
  STD_TORCH_CHECK(saved.size() == count * blocks.size() && (count == 2 || count == 4 || count == 6),
                  "expected two, four or six saved tensors for each block");
  for (size_t i = blocks.size(); i-- > 0;) {
    const Block& block = blocks[i];
    const Tensor* own = &saved[count * i];
    const Tensor &qkv = own[0], &derivative = own[1];
    Tensor d_hidden = block.fc2.backward(operand);
    if (count > (block.v_bias ? 4 : 2)) {
      d_hidden = normalize_inner_backward(d_hidden, own[count - 2], own[count - 1], centred);
    }
    const Tensor d_fc1 = activate_backward(block, d_hidden, derivative);
    recorded("smi_fast::normalize_backward_", normalize_backward_, gradient,
             block.fc1.backward(d_fc1), *block.to_mlp, *block.mlp_rstd, copy, centred);
    Tensor d_attended = block.proj.backward(operand);
    if (block.v_bias) {
      d_attended = normalize_inner_backward(d_attended, own[2], own[3], centred);
    }
    attend_block_backward(block, d_attended, qkv, rotary.of(i), rotary.half, offsets, d_qkv);
    recorded("smi_fast::normalize_backward_", normalize_backward_, gradient,
             block.qkv.backward(d_qkv), *block.to_attention, *block.attention_rstd, copy, centred);
  }
}

std::vector<Tensor> run_blocks_(Tensor x, const std::vector<Tensor>& weights,
                                const std::vector<Tensor>& packed, int64_t packed_rows,
                                const std::vector<Tensor>& normalized,
                                const std::vector<double>& eps, Tensor attended, Tensor hidden,
                                bool saves, const std::optional<Tensor>& offsets, bool centred,
                                const std::string& approximate) {
  return run(x, weights, packed, packed_rows, normalized, eps, attended, hidden, saves, {}, offsets,
             centred, approximate);
}

void run_blocks_backward_(Tensor gradient, const std::vector<Tensor>& weights,
                          const std::vector<Tensor>& packed, int64_t packed_rows,
                          const std::vector<Tensor>& normalized, const std::vector<Tensor>& saved,
                          Tensor d_qkv, const std::optional<Tensor>& offsets, bool centred) {
  run_backward(gradient, weights, packed, packed_rows, normalized, saved, d_qkv, {}, offsets,
               centred);
}

// The same with rotary positions, of each block.
std::vector<Tensor> run_rotary_blocks_(Tensor x, const std::vector<Tensor>& weights,
                                       const std::vector<Tensor>& packed, int64_t packed_rows,
                                       const std::vector<Tensor>& normalized,
                                       const std::vector<double>& eps, Tensor attended,
                                       Tensor hidden, bool saves,
                                       const std::vector<Tensor>& rotations, bool half,
                                       bool centred, const std::string& approximate) {
  return run(x, weights, packed, packed_rows, normalized, eps, attended, hidden, saves,
             {&rotations, half}, std::nullopt, centred, approximate);
}

void run_rotary_blocks_backward_(Tensor gradient, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& packed, int64_t packed_rows,
                                 const std::vector<Tensor>& normalized,
                                 const std::vector<Tensor>& saved, Tensor d_qkv,
                                 const std::vector<Tensor>& rotations, bool half, bool centred) {
  run_backward(gradient, weights, packed, packed_rows, normalized, saved, d_qkv, {&rotations, half},
               std::nullopt, centred);
}

}  // namespace

// CompositeExplicitAutograd, not CPU: a packed weight is an MKL-DNN tensor, whose dispatch key
// outranks CPU.
STABLE_TORCH_LIBRARY_IMPL(smi_fast, CompositeExplicitAutograd, m) {
  m.impl("run_blocks_", TORCH_BOX(&run_blocks_));
  m.impl("run_blocks_backward_", TORCH_BOX(&run_blocks_backward_));
  m.impl("run_rotary_blocks_", TORCH_BOX(&run_rotary_blocks_));
  m.impl("run_rotary_blocks_backward_", TORCH_BOX(&run_rotary_blocks_backward_));
}

}  // namespace smi_fast
