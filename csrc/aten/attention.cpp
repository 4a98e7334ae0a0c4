// Scaled dot product attention: which calls the fused kernels take, and the fused operators. Their bodies are the lowerings
// in torch_spiral/ops/attention.py; what is decided here is what needs sizes.
#include "dispatch/call.h"

#include <ATen/Context.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <c10/util/llvmMathExtras.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

namespace spiral {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

constexpr int64_t kMaxHead = 256;

// Also asked of fake tensors: looks at no data, and at sizes by their symbols.
bool fused(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const MaybeTensor& mask, double dropout, bool gqa) {
  if (!(dropout >= 0 && dropout <= 1) || q.is_nested() || k.is_nested() || v.is_nested()) return false;
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4) return false;
  const at::ScalarType dtype = q.scalar_type();
  if (dtype != at::kFloat && dtype != at::kHalf && dtype != at::kBFloat16) return false;
  if (k.scalar_type() != dtype || v.scalar_type() != dtype) return false;
  const c10::SymInt heads = q.sym_size(1), kv_heads = k.sym_size(1), head = q.sym_size(3), head_v = v.sym_size(3);
  if (head < 1 || head > kMaxHead || head_v < 1 || head_v > kMaxHead || k.sym_size(3) != head) return false;
  if (k.sym_size(0) != q.sym_size(0) || v.sym_size(0) != q.sym_size(0) || k.sym_size(2) != v.sym_size(2)) return false;
  if (kv_heads < 1 || v.sym_size(1) != kv_heads || (gqa ? heads % kv_heads != 0 : heads != kv_heads)) return false;
  if (!mask || !mask->defined()) return true;
  const at::ScalarType m = mask->scalar_type();
  if (m != at::kFloat && m != at::kHalf && m != at::kBFloat16 && m != at::kBool) return false;
  const c10::SymInt scores[] = {q.sym_size(0), heads, q.sym_size(2), k.sym_size(2)};
  return mask->dim() <= 4 && at::is_expandable_to(mask->sym_sizes(), scores);
}

int64_t choose(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const MaybeTensor& mask, double dropout, bool /*causal*/,
    std::optional<double> /*scale*/, bool gqa) {
  TORCH_CHECK(
      dropout >= 0 && dropout <= 1, "dropout probability has to be between 0 and 1, but got ", dropout);
  const auto& context = at::globalContext();
  if (context.userEnabledOverrideableSDP() && fused(q, k, v, mask, dropout, gqa)) {
    return static_cast<int64_t>(at::SDPBackend::overrideable);
  }
  TORCH_CHECK(context.userEnabledMathSDP(), "No viable backend for scaled_dot_product_attention was found.");
  return static_cast<int64_t>(at::SDPBackend::math);
}

// The kernels read and write the head dimension with stride 1.
bool has_unit_stride(const at::Tensor& t) { return t.dim() != 4 || t.size(3) <= 1 || t.stride(3) == 1; }

at::Tensor unit_stride(const at::Tensor& t) {
  const at::Tensor plain = t.resolve_neg();
  return has_unit_stride(plain) ? plain : plain.contiguous();
}

// What the kernel writes for a result of any layout, and the way back to it.
at::Tensor writable(const at::Tensor& t) {
  return !t.defined() || has_unit_stride(t) ? t : at::empty(t.sizes(), t.options());
}

void finish(const at::Tensor& result, const at::Tensor& written) {
  if (result.defined() && !result.is_same(written)) result.copy_(written);
}

// The layout that torch's meta function promises: the query's order of dimensions, without holes.
at::Tensor make_output(const at::Tensor& q, int64_t head_v) {
  if (q.size(3) == head_v) return at::empty_like(q);
  int order[4] = {0, 1, 2, 3};
  std::stable_sort(order, order + 4, [&](int a, int b) { return q.stride(a) > q.stride(b); });
  const int64_t sizes[] = {q.size(0), q.size(1), q.size(2), head_v};
  int64_t strides[4], stride = 1;
  for (int i = 3; i >= 0; --i) {
    strides[order[i]] = stride;
    stride *= sizes[order[i]];
  }
  return at::empty_strided(sizes, strides, q.options());
}

struct Problem {
  at::Tensor q, k, v, mask;  // mask: expanded to the scores, or undefined
  double scale;
  bool causal, vec;

  Problem(
      const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const MaybeTensor& bias, double dropout,
      bool is_causal, std::optional<double> scale_)
      : q(unit_stride(query)), k(unit_stride(key)), v(unit_stride(value)), causal(is_causal) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        fused(q, k, v, bias, dropout, true),
        "spiral's fused attention takes 4-dimensional float32, float16 or bfloat16 tensors with at most ", kMaxHead,
        " elements a head, a mask that expands to the scores, and a dropout probability of 0 to 1");
    if (bias && bias->defined()) {
      mask = bias->resolve_neg().expand({q.size(0), q.size(1), q.size(2), k.size(2)});
    }
    scale = scale_.value_or(1.0 / std::sqrt(static_cast<double>(q.size(3))));
    vec = vectors(q) && vectors(k) && vectors(v);
  }

  // Whether whole groups of four elements can be loaded, as far as sizes and strides tell.
  static bool vectors(const at::Tensor& t) {
    bool ok = t.size(3) % 4 == 0;
    for (int d = 0; d < 3; ++d) ok = ok && (t.size(d) <= 1 || t.stride(d) % 4 == 0);
    return ok;
  }

  // What kernels are chosen by; everything else about sizes is an argument of theirs.
  void classes(Call& call) const {
    auto head_class = [](int64_t head) { return (head + 31) / 32 * 32; };
    call.value(head_class(q.size(3)));
    call.value(head_class(v.size(3)));
    // 2: the heads are as wide as their classes, too.
    call.value(int64_t{vec} << int{q.size(3) % 32 == 0 && v.size(3) % 32 == 0});
    const uint64_t tiles = static_cast<uint64_t>(q.size(0) * q.size(1)), queries = static_cast<uint64_t>(q.size(2));
    // How many queries a workgroup takes, as a logarithm less one, at most 6: fewer where few heads would leave units idle.
    int64_t rows = std::min<int64_t>(c10::llvm::Log2_64(queries), 6);
    while (rows > 3 && ((queries - 1) / (uint64_t{2} << rows) + 1) * tiles < 64) --rows;
    call.value(rows);
    // Few queries and many keys: the keys are dealt to several workgroups, about 256 in all.
    const bool split = q.size(2) <= 32 && k.size(2) >= 512 && tiles <= 128;
    call.value(split ? int64_t{256} >> c10::llvm::Log2_64(tiles) : int64_t{1});
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt, at::Tensor, at::Tensor, at::Tensor>
forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const MaybeTensor& attn_bias, double dropout_p,
    bool is_causal, bool /*return_debug_mask*/, std::optional<double> scale) {
  Problem p(query, key, value, attn_bias, dropout_p, is_causal, scale);
  if (p.scale < 0) {  // kernels take the largest product of a row for its largest score
    p.q = p.q.neg();
    p.scale = -p.scale;
  }
  const at::Tensor out = make_output(query, value.size(3));
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), keys = key.size(2);
  const at::Tensor lse = at::empty({batch, heads, queries}, query.options().dtype(at::kFloat));
  // With dropout, 64 random bits: the key of the call's own Philox numbers, which backward draws again. There is no offset.
  const at::Tensor seed = at::empty({}, query.options().dtype(at::kLong));
  if (out.numel() != 0 && keys == 0) {
    out.zero_();
    lse.fill_(-INFINITY);
  } else if (out.numel() != 0) {
    const at::Tensor written = writable(out);
    at::Tensor result = written;
    // One query of each head: the query heads that share keys become queries of one head.
    if (const int64_t kv_heads = key.size(1); queries == 1 && kv_heads != heads && !is_causal && dropout_p == 0) {
      auto fold = [&](const at::Tensor& t) {
        const int64_t head = t.stride(1);
        return t.as_strided(
            {batch, kv_heads, heads / kv_heads, t.size(3)}, {t.stride(0), head * (heads / kv_heads), head, t.stride(3)});
      };
      p.q = fold(p.q);
      result = fold(written);
      if (p.mask.defined()) p.mask = fold(p.mask);
    }
    static const OpId id = op_id("_scaled_dot_product_fused_attention_overrideable");
    Call call(id, query.device().index());
    call.tensor(p.q);
    call.tensor(p.k);
    call.tensor(p.v);
    call.tensor(p.mask);
    call.value(p.causal);
    call.slot(p.scale);
    dropout_p == 0 ? call.none() : call.slot(dropout_p);
    p.classes(call);
    call.out(result);
    call.out(lse);
    dropout_p == 0 ? call.none() : call.out(seed);
    call.run();
    finish(out, written);
  }
  return {out, lse, at::Tensor(), at::Tensor(), queries, keys, seed, seed, at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& attn_bias, std::array<bool, 4> wanted, const at::Tensor& out, const at::Tensor& logsumexp,
    const at::Tensor& /*cum_seq_q*/, const at::Tensor& /*cum_seq_k*/, c10::SymInt /*max_q*/,
    c10::SymInt /*max_k*/, double dropout_p, bool is_causal, const at::Tensor& philox_seed,
    const at::Tensor& /*philox_offset*/, std::optional<double> scale) {
  Problem p(query, key, value, attn_bias, dropout_p, is_causal, scale);
  const bool dq_wanted = wanted[0], dkv_wanted = wanted[1] || wanted[2], bias_wanted = wanted[3] && attn_bias.defined();
  at::Tensor dq, dk, dv, ds;
  if (grad_out.numel() == 0 || key.size(2) == 0) {
    return {wanted[0] ? at::zeros_like(query) : dq, wanted[1] ? at::zeros_like(key) : dk,
            wanted[2] ? at::zeros_like(value) : dv, bias_wanted ? at::zeros_like(attn_bias) : ds};
  }
  const at::Tensor g = unit_stride(grad_out), o = unit_stride(out), lse = logsumexp.contiguous();
  if (dq_wanted || bias_wanted) dq = at::empty_like(query);
  if (dkv_wanted) {
    dk = at::empty_like(key);
    dv = at::empty_like(value);
  }
  if (bias_wanted) {
    ds = at::empty({query.size(0), query.size(1), query.size(2), key.size(2)}, query.options().dtype(at::kFloat));
  }
  p.vec = p.vec && Problem::vectors(g);
  static const OpId id = op_id("_scaled_dot_product_fused_attention_overrideable_backward");
  Call call(id, query.device().index());
  call.tensor(g);
  call.tensor(p.q);
  call.tensor(p.k);
  call.tensor(p.v);
  call.tensor(p.mask);
  call.tensor(o);
  call.tensor(lse);
  call.value(p.causal);
  call.slot(p.scale);
  dropout_p == 0 ? call.none() : call.slot(dropout_p);
  dropout_p == 0 ? call.none() : call.tensor(philox_seed);
  p.classes(call);
  const at::Tensor results[] = {dq, dk, dv}, written[] = {writable(dq), writable(dk), writable(dv)};
  for (const at::Tensor& t : written) t.defined() ? call.out(t) : call.none();
  ds.defined() ? call.out(ds) : call.none();
  call.run();
  for (int i = 0; i < 3; ++i) finish(results[i], written[i]);
  at::Tensor dbias;
  if (bias_wanted) dbias = at::sum_to(ds, attn_bias.sizes()).to(attn_bias.scalar_type());
  return {wanted[0] ? dq : at::Tensor(), wanted[1] ? dk : at::Tensor(), wanted[2] ? dv : at::Tensor(), dbias};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_fused_sdp_choice", choose);
  m.impl("_scaled_dot_product_fused_attention_overrideable", forward);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", backward);
}

}  // namespace
}  // namespace spiral

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &spiral::choose)
}  // namespace at::native
