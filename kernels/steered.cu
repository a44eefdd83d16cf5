// steered_attention for a card: softmax attention of a picture's queries to two short texts, and NASA's or NAG's mix.
// One block of threads for each token, all heads of it, as NAG's norm is over all of them. Sums in float32.
// It reads the texts' keys once a token where a tiled kernel would once a block of tokens: where it is slower than plain
// torch, the trial of its speed leaves it aside. Built by `python -m onestep.kernels build` against torch's stable ABI: one library for every torch from 2.10 on.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

using torch::stable::Tensor;

namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

struct View {
  const void* data;
  int64_t batch, head, row;
};

__device__ float sum_of_warp(float value) {
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(0xffffffffu, value, lane);
  return value;
}

// One warp: z[d] = softmax(q k^T / sqrt(D)) v for one head of one token. q lies in shared memory, scores have room
// there for `keys` numbers.
template <typename T>
__device__ void attend(const float* q, const T* k, const T* v, int64_t k_row, int64_t v_row, int keys, int width,
                       float* scores, float* z) {
  const int lane = threadIdx.x % 32;
  float peak = -INFINITY;
  for (int key = 0; key < keys; ++key) {
    float dot = 0;
    for (int d = lane; d < width; d += 32) dot += q[d] * static_cast<float>(k[key * k_row + d]);
    dot = sum_of_warp(dot) * rsqrtf(static_cast<float>(width));
    if (lane == 0) scores[key] = dot;
    peak = fmaxf(peak, dot);
  }
  __syncwarp();
  float total = 0;
  for (int key = lane; key < keys; key += 32) total += scores[key] = expf(scores[key] - peak);
  total = sum_of_warp(total);
  __syncwarp();
  for (int d = lane; d < width; d += 32) {
    float found = 0;
    for (int key = 0; key < keys; ++key) found += scores[key] * static_cast<float>(v[key * v_row + d]);
    z[d] = found / total;
  }
  __syncwarp();
}

template <typename T>
__device__ const T* at(const View& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(view.data) + batch * view.batch + head * view.head + row * view.row;
}

// Shared: [positive H D][negative H D][q of each warp D][scores of each warp keys][norms 2 kWarps]
template <typename T>
__global__ void steer(View q, View k, View v, View k2, View v2, View out, int heads, int keys, int keys2, int width,
                      float scale, bool nag, float tau, float alpha, bool square) {
  extern __shared__ float room[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, all = heads * width, most = max(keys, keys2);
  float *positive = room, *negative = positive + all, *query = negative + all + warp * width;
  float *scores = negative + all + kWarps * width + warp * most;
  float* norms = negative + all + kWarps * (width + most);
  const int64_t token = blockIdx.x, batch = blockIdx.y;
  for (int head = warp; head < heads; head += kWarps) {
    for (int d = lane; d < width; d += 32) query[d] = static_cast<float>(at<T>(q, batch, head, token)[d]);
    __syncwarp();
    attend(query, at<T>(k, batch, head, 0), at<T>(v, batch, head, 0), k.row, v.row, keys, width, scores,
           positive + head * width);
    attend(query, at<T>(k2, batch, head, 0), at<T>(v2, batch, head, 0), k2.row, v2.row, keys2, width, scores,
           negative + head * width);
  }
  __syncthreads();
  // NASA: Z = Z+ - a Z-.  NAG: G = Z+ - (s - 1) / s Z-
  const float share = nag ? (scale - 1) / scale : scale;
  float reach = 1;
  if (nag) {
    float plus = 0, norm = 0;
    for (int i = threadIdx.x; i < all; i += kThreads) {
      const float z = positive[i], g = z - share * negative[i];
      plus += square ? z * z : fabsf(z);
      norm += square ? g * g : fabsf(g);
    }
    plus = sum_of_warp(plus), norm = sum_of_warp(norm);
    if (lane == 0) norms[warp] = plus, norms[kWarps + warp] = norm;
    __syncthreads();
    plus = norm = 0;
    for (int i = 0; i < kWarps; ++i) plus += norms[i], norm += norms[kWarps + i];
    if (square) plus = sqrtf(plus), norm = sqrtf(norm);
    reach = fminf(scale, tau * fmaxf(plus, 1.1754944e-38f) / fmaxf(norm, 1.1754944e-38f));
  }
  for (int i = threadIdx.x; i < all; i += kThreads) {
    const float z = positive[i], g = z - share * negative[i];
    // Z = alpha min(s, tau |Z+| / |G|) G + (1 - alpha) Z+
    const float mixed = nag ? z + alpha * (g * reach - z) : g;
    const_cast<T*>(at<T>(out, batch, i / width, token))[i % width] = static_cast<T>(mixed);
  }
}

View view(const Tensor& value) { return {value.data_ptr(), value.stride(0), value.stride(1), value.stride(2)}; }

template <typename T>
void launch(const Tensor* tensors, const Tensor& out, double scale, bool nag, double tau, double alpha, bool square,
            cudaStream_t stream) {
  const Tensor &q = tensors[0], &k = tensors[1], &k2 = tensors[3];
  const int heads = q.size(1), tokens = q.size(2), width = q.size(3), keys = k.size(2), keys2 = k2.size(2);
  const size_t bytes = sizeof(float) * (2 * heads * width + kWarps * (width + (keys > keys2 ? keys : keys2)) + 2 * kWarps);
  STD_TORCH_CHECK(bytes <= 48 * 1024, "too many heads or keys for a block's shared memory");
  const dim3 grid(tokens, q.size(0));
  steer<T><<<grid, kThreads, bytes, stream>>>(view(q), view(k), view(tensors[2]), view(k2), view(tensors[4]), view(out),
                                              heads, keys, keys2, width, scale, nag, tau, alpha, square);
  const cudaError_t trouble = cudaGetLastError();
  STD_TORCH_CHECK(trouble == cudaSuccess, cudaGetErrorString(trouble));
}

Tensor steered(Tensor q, Tensor k, Tensor v, Tensor k2, Tensor v2, double scale, bool nag, double tau, double alpha,
               bool square, int64_t stream) {
  const Tensor tensors[5] = {q, k, v, k2, v2};
  for (const Tensor& value : tensors) STD_TORCH_CHECK(value.stride(3) == 1, "a token's numbers must lie side by side");
  Tensor out = torch::stable::empty_like(q);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  using torch::headeronly::ScalarType;
  if (q.scalar_type() == ScalarType::Half)
    launch<__half>(tensors, out, scale, nag, tau, alpha, square, on);
  else if (q.scalar_type() == ScalarType::BFloat16)
    launch<__nv_bfloat16>(tensors, out, scale, nag, tau, alpha, square, on);
  else
    launch<float>(tensors, out, scale, nag, tau, alpha, square, on);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(onestep_cuda, m) {
  m.def(
      "steered_attention(Tensor q, Tensor k, Tensor v, Tensor k2, Tensor v2, float scale, bool nag, float tau, float "
      "alpha, bool square, int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(onestep_cuda, CUDA, m) { m.impl("steered_attention", TORCH_BOX(&steered)); }
