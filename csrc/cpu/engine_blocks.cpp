// Blocks of a frozen Vision Transformer, one after the other: the order of their steps, each of
// which is an op of its own. See smi_fast/engine.py, which makes the lists that come in here.

#include "engine_steps_api.h"

// Only where torch has MKL, which Python asks before it packs a matrix.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_cpu__mkl_linear(AtenTensorHandle x, AtenTensorHandle packed, AtenTensorHandle matrix,
                           AtenTensorHandle* bias, int64_t packed_rows, AtenTensorHandle* product);

namespace smi_fast {
namespace {

// x [rows, in] times the matrix [out, in] transposed, packed for that many rows.
Tensor packed_product(const Tensor& x, const Tensor& matrix, const Tensor& packed) {
  AtenTensorHandle product = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__mkl_linear(x.get(), packed.get(), matrix.get(), nullptr,
                                                    x.size(0), &product));
  return Tensor(product);
}

// A frozen matrix [out, in], as it is and transposed, and both packed for so many rows or none.
struct Matrix {
  const Tensor *weight, *transposed, *packed, *packed_transposed;
  int64_t packed_rows;

  // x [rows, in] times the transposed matrix.
  Tensor product(const Tensor& x) const { return times(x, *transposed, *weight, packed); }

  // The gradient of x from that of the product [rows, out].
  Tensor back(const Tensor& gradient) const {
    return times(gradient, *weight, *transposed, packed_transposed);
  }

 private:
  // x · right, with left = rightᵀ, which MKL knows as the matrix of a linear layer.
  Tensor times(const Tensor& x, const Tensor& right, const Tensor& left,
               const Tensor* packed) const {
    if (x.size(0) != packed_rows) return torch::stable::matmul(x, right);
    return recorded("mkl::_mkl_linear", packed_product, x, left, *packed);
  }
};

// A block's matrices with their biases, that of qkv for q only; and what backward needs.
struct Block {
  Matrix qkv, proj, fc1, fc2;
  const Tensor *q_bias, *proj_bias, *fc1_bias, *fc2_bias;
  const Tensor *to_attention, *attention_rstd, *to_mlp, *mlp_rstd;
};

constexpr size_t kWeights = 12, kPacked = 8, kNormalized = 4;

std::vector<Block> blocks_of(const std::vector<Tensor>& weights, const std::vector<Tensor>& packed,
                             int64_t packed_rows, const std::vector<Tensor>& normalized) {
  const size_t count = weights.size() / kWeights;
  STD_TORCH_CHECK(weights.size() == count * kWeights && normalized.size() == count * kNormalized &&
                      (packed.empty() || packed.size() == count * kPacked),
                  "expected ", kWeights, " weights, ", kNormalized,
                  " tensors to normalize into and ", kPacked,
                  " packed ones or none for each block");
  std::vector<Block> blocks;
  for (size_t i = 0; i < count; ++i) {
    const Tensor* w = &weights[i * kWeights];
    const Tensor* n = &normalized[i * kNormalized];
    const auto matrix = [&](size_t which) {
      const Tensor* p = packed.empty() ? nullptr : &packed[i * kPacked + 2 * which];
      return Matrix{w + 3 * which, w + 3 * which + 1, p, p ? p + 1 : nullptr, p ? packed_rows : -1};
    };
    blocks.push_back({matrix(0), matrix(1), matrix(2), matrix(3), w + 2, w + 5, w + 8, w + 11, n,
                      n + 1, n + 2, n + 3});
  }
  return blocks;
}

// Turns the residual stream x [rows, D] into that after the blocks, but for the last product and
// its bias. Returns that product, after what backward needs of each block beside `normalized`:
// qkv [B, N, 3, H, D/H] and GELU's derivative [rows, F].
std::vector<Tensor> run_blocks_(Tensor x, const std::vector<Tensor>& weights,
                                const std::vector<Tensor>& packed, int64_t packed_rows,
                                const std::vector<Tensor>& normalized,
                                const std::vector<double>& eps, Tensor attended, Tensor hidden,
                                bool saves) {
  const std::vector<Block> blocks = blocks_of(weights, packed, packed_rows, normalized);
  STD_TORCH_CHECK(!blocks.empty() && eps.size() == 2 * blocks.size(),
                  "expected a block or more and two eps for each");
  const std::vector<int64_t> qkv_shape{attended.size(0), attended.size(1), 3, attended.size(2),
                                       attended.size(3)};
  const Tensor attended_rows = torch::stable::view(
      attended, {attended.size(0) * attended.size(1), attended.size(2) * attended.size(3)});
  std::vector<Tensor> saved;
  std::optional<Tensor> added, bias;
  const double* own_eps = eps.data();
  for (const Block& block : blocks) {
    recorded("smi_fast::add_normalize_", add_normalize_, x, added, bias, own_eps[0],
             *block.to_attention, *block.attention_rstd);
    const Tensor qkv = torch::stable::view(block.qkv.product(*block.to_attention), qkv_shape);
    recorded("smi_fast::attend_", attend_, qkv, *block.q_bias, attended);
    added = block.proj.product(attended_rows);
    recorded("smi_fast::add_normalize_", add_normalize_, x, added, std::optional(*block.proj_bias),
             own_eps[1], *block.to_mlp, *block.mlp_rstd);
    const Tensor derivative = block.fc1.product(*block.to_mlp);
    recorded("smi_fast::gelu_", gelu_, derivative, *block.fc1_bias, hidden);
    added = block.fc2.product(hidden);
    bias = *block.fc2_bias;
    if (saves) saved.insert(saved.end(), {qkv, derivative});
    own_eps += 2;
  }
  saved.push_back(*added);
  return saved;
}

// Turns the gradient [rows, D] after the blocks into that before them.
void run_blocks_backward_(Tensor gradient, const std::vector<Tensor>& weights,
                          const std::vector<Tensor>& packed, int64_t packed_rows,
                          const std::vector<Tensor>& normalized, const std::vector<Tensor>& saved,
                          Tensor d_qkv) {
  const std::vector<Block> blocks = blocks_of(weights, packed, packed_rows, normalized);
  STD_TORCH_CHECK(saved.size() == 2 * blocks.size(), "expected two saved tensors for each block");
  for (size_t i = blocks.size(); i-- > 0;) {
    const Block& block = blocks[i];
    const Tensor &qkv = saved[2 * i], &derivative = saved[2 * i + 1];
    const Tensor d_hidden = block.fc2.back(gradient);
    recorded("smi_fast::multiply_", multiply_, d_hidden, derivative);
    recorded("smi_fast::normalize_backward_", normalize_backward_, gradient,
             block.fc1.back(d_hidden), *block.to_mlp, *block.mlp_rstd);
    recorded("smi_fast::attend_backward_", attend_backward_, block.proj.back(gradient), qkv,
             *block.q_bias, d_qkv);
    recorded("smi_fast::normalize_backward_", normalize_backward_, gradient, block.qkv.back(d_qkv),
             *block.to_attention, *block.attention_rstd);
  }
}

}  // namespace

// Not for the CPU's key: among the arguments, a packed matrix has MKL-DNN's and would win.
STABLE_TORCH_LIBRARY_IMPL(smi_fast, CompositeExplicitAutograd, m) {
  m.impl("run_blocks_", TORCH_BOX(&run_blocks_));
  m.impl("run_blocks_backward_", TORCH_BOX(&run_blocks_backward_));
}

}  // namespace smi_fast
