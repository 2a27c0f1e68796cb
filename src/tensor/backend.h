// The one contract between ops and devices: a pure virtual function per kernel, over Views. cpu/ and cuda/
// implement it under the same file names; a forgotten kernel is a compile error.
//
// Rules for every kernel:
// - It never allocates per call, never waits for the host, and takes each size that varies within a plan from
//   a tensor.
// - Activations and their gradients have the type activation_type(weights): float32, or float64 for gradient
//   checks, or bfloat16, which is computed in float32 and rounded once. Weights may also be bfloat16 where
//   activations are not (then read as float32). Gradients of parameters, routers (logits, scores, weights),
//   statistics (rstd, lse, delta) and losses (nll, token weights, masks) have the type exact_type(weights).
//   Indices are int32. Views have unit stride on the last axis; leading axes may have gaps.
// - A row's result depends neither on how many rows share the call (DESIGN, idea 5) nor on threads.
// - A Grad destination is written or added to, as its flag says; a null one is skipped.
//
// T = tokens (rows), H = heads, E = experts, K = experts a token, V = vocabulary.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include "tensor/view.h"

namespace latente {

struct Grad {
  View view;
  bool accumulate = false;
  explicit operator bool() const { return static_cast<bool>(view); }
};

// A matrix in FP8 as products read it, along its rows (DeepSeek-V3 report, section 3.3.2): codes (f8e4m3)
// times scales (f32). Of activations [R, C] a scale is for 128 of a row, [C / 128, R]; of weights [R, C], or
// a stack of them, for a square of 128 × 128, [R / 128, C / 128] (numbers of blocks rounded up). A scale is
// the largest magnitude over 448.
struct Fp8Matrix {
  View codes, scales;
};
// What products, and those of the gradients, need of one: itself, and its transpose. The transposed codes of
// activations have fp8_depth() columns, zeros behind the rows; with experts each one's rows begin at a
// multiple of 128.
struct Fp8Operand {
  Fp8Matrix along, across;
};
inline constexpr int64_t fp8_block = 128;
inline int64_t fp8_blocks(int64_t count) { return (count + fp8_block - 1) / fp8_block; }
// experts: 0 where rows are not sorted by expert.
inline int64_t fp8_depth(int64_t rows, int64_t experts) {
  return (fp8_blocks(rows) + (experts < rows ? experts : rows)) * fp8_block;
}

enum class GateScore : uint8_t { sigmoid, softmax };
// V3: the sum of a group's two highest biased scores (the one score of a group of one); V2: the highest.
enum class GroupScore : uint8_t { none, top2_sum, max };

// The auxiliary losses that a router's choices cost in training (DeepSeek-V3 report, section 2.1.2, equations
// 17-20; DeepSeek-V2, section 2.2.3); device i holds the i-th of `devices` equal parts of the experts.
struct Balance {
  double alpha = 0.0;                // of the loss over experts
  double device_alpha = 0.0;         // over the choices that each device serves
  double communication_alpha = 0.0;  // over the tokens sent to each device
  int64_t devices = 1;               // divides the number of experts
  int64_t devices_per_token = 1;     // M: how many a token is sent to at most
  bool per_sequence =
      true;  // f and P counted in each sequence (V3, V2's seq_aux) or over all tokens of a call
  int64_t sequence_length = 0;  // tokens a sequence in this call, when any() and per_sequence

  bool any() const { return alpha > 0 || device_alpha > 0 || communication_alpha > 0; }
};

// How a router chooses (DeepSeek-V3 report, section 2.1.2; DeepSeek-V2, section 2.2).
struct Routing {
  int top_k = 1;
  GateScore score = GateScore::sigmoid;
  GroupScore group_score = GroupScore::none;
  int groups = 1, top_groups = 1;
  bool normalise = true;  // weights divided by their sum + 1e-20
  double scale = 1.0;     // routed_scaling_factor
  Balance balance{};
};

struct AdamW {
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8, weight_decay = 0.1;
};

// How attention addresses a paged cache.
struct Pages {
  View block_table;  // [S, N] i32: page numbers of each sequence
  View sequence;     // [T] i32: row of block_table a query token belongs to
  View position;     // [T] i32: the query attends to cache positions 0..position
};

// The norm of h + pending, or of h; of rows [T, D].
struct NormedRows {
  View h, pending;  // pending: or null
  View weight;      // [D]
  double eps = 0;
  View sum, out;  // sum: of h and pending, or null; out: the norm
};

// What a decoding layer leaves in its latent cache, see Backend::latent_entries.
struct LatentEntries {
  View latent, latent_norm, latent_out;  // [T, rank], its norm's weight, the result
  double latent_eps = 0;
  View rotary, positions, table;  // the shared key [T, 1, rope], rotated in place or left as it is
  bool interleaved = false;
  View slots, cache;  // [T] i32; [pages, page, rank + rope], or narrow
};

// The experts of a layer, see Backend::expert_layer. K choices a token.
struct ExpertLayer {
  View x, experts, weights;                  // [T, D]; [T, K] i32; [T, K]
  View gate, up, down;                       // [E, F, D], [E, F, D], [E, D, F]
  View shared_gate, shared_up, shared_down;  // [S, D], [S, D], [D, S]; or null
  View out;                                  // [T, D]
  // Scratch.
  View offsets, rows, slots;                      // as in expert_order
  View gated, risen, inner, results;              // [T·K, F], [T·K, F], [T·K, F], [T·K, D]
  View shared_gated, shared_risen, shared_inner;  // [T, S]
};

// float64 for float64, else float32: what must be exact whatever activations are.
inline DType exact_type(DType type) { return type == DType::f64 ? DType::f64 : DType::f32; }

// Work that was recorded once, to be queued again with one call.
class Replay {
 public:
  virtual ~Replay() = default;
  virtual void launch() = 0;
};

// What attention_expanded_backward is lent: delta [T, H], and bytes, or null. As far as is known no token
// attends to more than `longest` (0: nothing is known).
struct AttentionScratch {
  AttentionScratch(View delta_, View memory_ = {}, int64_t longest_ = 0)
      : delta(delta_), memory(memory_), longest(longest_) {}
  View delta, memory;
  int64_t longest;
};

class Backend;

// Work that is the same each time: the first time it is called (kernels are set up), the second time recorded
// where the device can, and from then on replayed.
class RepeatedWork {
 public:
  void run(Backend& backend, const std::function<void()>& work);
  // What was recorded no longer holds: memory has moved.
  void forget() { replay_.reset(); }

 private:
  std::unique_ptr<Replay> replay_;
  bool has_run_ = false;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;

  // The type of activations that meet weights of this type. Error where the device has no kernels for it.
  virtual DType activation_type(DType weight) const = 0;

  // Whether the host can read and write this device's memory through pointers.
  virtual bool is_host() const = 0;
  virtual int64_t available_memory() const = 0;  // bytes
  // Memory of this device, zeroed; freed with the last owner. Errors name the size.
  virtual std::shared_ptr<void> allocate(int64_t bytes) = 0;
  virtual void upload(const void* host, View device) = 0;  // device must be contiguous
  virtual void download(View device, void* host) = 0;
  // All of them: the device is waited for once.
  using Download = std::pair<View, void*>;
  virtual void download_all(std::span<const Download> parts) {
    for (const auto& [device, host] : parts) download(device, host);
  }
  virtual void synchronize() = 0;
  // Records what `work` queues without running it; null where calling it again is as fast. The memory that
  // its kernels were given must outlive the replay.
  virtual std::unique_ptr<Replay> record(const std::function<void()>& work) = 0;
  // Whether there is a second queue. What is queued between begin_beside() and end_beside() follows what was
  // queued before, and what is queued after it need not wait: until after_beside(part), with the part or a
  // later one. The last part must be waited for.
  virtual bool runs_beside() const { return false; }
  virtual int64_t beside_bytes() const { return 0; }  // that it takes from when it is first used
  virtual void begin_beside() {}
  virtual void end_beside(int /*part*/) {}
  virtual void after_beside(int /*part*/) {}
  virtual bool all_finite(View x) = 0;  // diagnosis only: waits

  // -- elementwise.cpp --
  virtual void fill(View x, double value) = 0;
  // Same shape, either may be strided; f32 and bf16 are converted where activations may be bf16.
  virtual void copy(View from, Grad to) = 0;
  virtual void add(View a, View b, View out) = 0;  // out may be a or b
  // out = silu(gate) * up, all [T, F] (rows may be strided)
  virtual void swiglu(View gate, View up, View out) = 0;
  virtual void swiglu_backward(View d_out, View gate, View up, Grad d_gate, Grad d_up) = 0;

  // -- embedding.cpp --
  // out[t] = table[ids[t]]; ids [T] i32 within [0, V). The table may be quantised: then in panels.
  virtual void embedding(View ids, View table, View out) = 0;
  virtual void embedding_backward(View ids, View d_out, Grad d_table) = 0;

  // -- norm.cpp --
  // out = x · rstd · weight with rstd = 1 / sqrt(mean(x²) + eps); x [T, D] (rows may be strided), rstd [T].
  // A null weight means ones.
  virtual void rms_norm(View x, View weight, double eps, View out, View rstd) = 0;
  // sum = h + x; out = rms_norm(sum)
  virtual void rms_norm_add(View h, View x, View weight, double eps, View sum, View out, View rstd) = 0;
  virtual void rms_norm_backward(View d_out, View x, View weight, View rstd, Grad d_x, Grad d_weight) = 0;

  // -- rope.cpp --
  // Rotates x [T, H, D] in place by the angles of positions [T] i32. table [P, D] f32: D/2 cosines, then D/2
  // sines, of each position. interleaved: pairs (2i, 2i+1), else (i, i + D/2). inverse rotates back: the
  // gradient.
  virtual void rope(View x, View positions, View table, bool interleaved, bool inverse) = 0;

  // -- linear.cpp --
  // out (+)= x · wᵀ + bias; x [T, K] (rows may be strided), w [N, K] (rows may be strided), out [T, N], bias
  // [N] of the exact type, or null. Where activations are bf16, out may be of either type, and w and then
  // d_out exact (routers).
  virtual void linear(View x, View w, View bias, Grad out) = 0;
  virtual void linear_backward_input(View d_out, View w, Grad d_x) = 0;
  virtual void linear_backward_weight(View d_out, View x, Grad d_w) = 0;
  virtual void linear_backward_bias(View d_out, Grad d_bias) = 0;
  // The form of a weight [N, K] or [E, N, K] that linear and grouped_linear read fastest, if this device has
  // one beside rows: its view, without data, and the bytes it needs. Results have the same bits in either
  // form.
  struct Packed {
    View view;
    int64_t bytes = 0;
  };
  virtual std::optional<Packed> packed(View w) const = 0;
  virtual void pack(View w, View to) = 0;
  // packed() of weights in f8e4m3 has room for their scales, one for each 128 rows and 128 columns: they are
  // packed from codes [N, K] and scales [N / 128, K / 128] (rounded up), as the `index`-th of a stack.
  // Products are those with float32 weights that hold the products of codes and scales, but for rounding: the
  // activations are scaled instead. False when a code is NaN or a scale is not within 0 to 128. Null scales:
  // they are elsewhere, and what stands behind the codes stays as it is.
  virtual bool pack_fp8(View, const float*, View, int64_t) { return false; }
  // The form of a weight of this shape in 8 or 4 bits (DType::q8, q4, q4m) with a scale for each `group`
  // elements of a row (tensor/quantise.h), or in FP8 (f8e4m3, with squares of 128: tensor/panels.h), if this
  // device has one. It is the form in the host's memory: another device lays panels out for itself. On a CPU
  // what such a weight meets is rounded to 8 bits, row by row and group by group.
  virtual std::optional<Packed> quantised(Shape shape, DType type, int64_t group) const = 0;
  // Packs the rows [row, row + rows) of a matrix, the `index`-th of a stack, given as codes [rows, K] and
  // scales [rows, groups], of q4m followed by offsets [rows, groups]; row is a multiple of 16.
  virtual void pack_quantised(const int8_t* codes, const float* scales, View to, int64_t index, int64_t row,
                              int64_t rows) = 0;
  // The same from rows of GGML's blocks: Q8_0 for q8, Q4_0 for q4, Q4_K for q4m. False where a code is -128
  // or a scale or an offset is not finite, and where the backend has no such way; what `to` then holds is
  // undefined. For different rows from several threads at once.
  virtual bool pack_blocks(const std::byte*, View, int64_t, int64_t, int64_t) { return false; }
  // The same from values [rows, K], quantised as quantise_rows does (not to q4m); importance [K] or null.
  // False when a value or a scale is not finite. Both may be called for different rows from several threads
  // at once.
  virtual bool quantise(const float* values, const float* importance, View to, int64_t index, int64_t row,
                        int64_t rows) = 0;
  // Not where the device is the host: lays out what the host's memory holds in the form of `view`, and gives
  // `view` its place. Returns the memory's owner.
  virtual std::shared_ptr<void> take_panels(const void* panels, View& view) = 0;
  // A matrix a head: out[t, h] = w[h] · x[t, h] (transpose false: w [H, N, K], x [T, H, K], out [T, H, N]),
  // or w[h]ᵀ · x[t, h] (transpose true: w [H, K, N]; not for packed weights). All may be strided on leading
  // axes.
  virtual void head_linear(View x, View w, bool transpose, View out) = 0;

  // -- experts.cpp --
  // scores [T, E]: the gate's scores (sigmoid or softmax of logits), kept for the gradient; bias [E] or null
  // is added for the selection only; experts [T, K] i32 in falling order of selection score (ties: lower
  // index first); weights [T, K]. load [E] (f32, accumulated: counts of selections) or null; balance_loss [1]
  // or null:
  //   mean over sequences of sum_i c_i P_i, P_i = mean over t of s_i/sum_j s_j,
  //   c_i = alpha · f_i + device_alpha · f'_d + communication_alpha · f''_d for an expert i of device d,
  //   f_i = E/(K·T)·count_i, f'_d = mean of f over the device's experts,
  //   f''_d = devices/(M·T)·(tokens with at least one choice on the device).
  // token_mask [T] (0 = padding) or null: masked tokens are routed but counted in neither
  // load nor loss (T above: unmasked tokens; sequences without any are left out of the mean).
  virtual void route(View logits, View bias, View token_mask, const Routing& routing, View scores,
                     View weights, View experts, View load, View balance_loss) = 0;
  // With routing.balance.any() the balance loss's gradient is added; a null d_weights means zeros.
  virtual void route_backward(View d_weights, View scores, View weights, View experts, View token_mask,
                              const Routing& routing, Grad d_logits) = 0;
  // Sorts the T·K choices by expert, stably: offsets [E + 1] i32; rows [T·K] i32: the token of each sorted
  // row; slots [T, K] i32: the sorted row of each choice.
  virtual void expert_order(View experts, View offsets, View rows, View slots) = 0;
  // Said before the products of stacks that are in memory on demand (View::residency): the experts with rows
  // will be read, of gate first and of down last. Reading them begins.
  virtual void will_read(View gate, View up, View down, View offsets) = 0;
  // out[r] = x[rows[r]] · w[e]ᵀ for offsets[e] <= r < offsets[e+1]; x [T, D] with rows [R], or [R, D] with
  // null rows; w [E, N, D], out [R, N].
  virtual void grouped_linear(View x, View rows, View offsets, View w, View out) = 0;
  // d_x [R, D]: sorted rows
  virtual void grouped_linear_backward_input(View d_out, View offsets, View w, Grad d_x) = 0;
  virtual void grouped_linear_backward_weight(View d_out, View x, View rows, View offsets, Grad d_w) = 0;
  // out[t] (+)= sum_k weights[t, k] · y[slots[t, k]]; weights null = ones. y [R, D], out [T, D].
  virtual void combine(View y, View weights, View slots, Grad out) = 0;
  // d_y[slots[t, k]] = weights[t, k] · d_out[t]; d_weights[t, k] = d_out[t] · y[slots[t, k]]
  virtual void combine_backward(View d_out, View y, View weights, View slots, Grad d_y, Grad d_weights) = 0;

  // -- attention.cpp --
  // Causal attention within one call, keys and values a head (MLA expanded; MHA, GQA, MQA). q [T, H, dk +
  // dr]; k [T, G, dk]; k_rope [T, dr], shared by all heads, or null (dr = 0); v [T, G, dv]; H a multiple of
  // G; starts [T] i32: token t attends to tokens starts[t]..t; out [T, H, dv]; lse [T, H]: log of the sum of
  // exponentials.
  virtual void attention_expanded(View q, View k, View k_rope, View v, View starts, double scale, View out,
                                  View lse) = 0;
  virtual void attention_expanded_backward(View d_out, View q, View k, View k_rope, View v, View starts,
                                           double scale, View out, View lse, const AttentionScratch& scratch,
                                           Grad d_q, Grad d_k, Grad d_k_rope, Grad d_v) = 0;
  // Memory beside delta with which that is fastest.
  virtual int64_t attention_scratch_bytes(const Shape&, const Shape&, const Shape&, int64_t) const {
    return 0;
  }
  // Attention over a paged cache. q [T, H, dk]; keys [pages, page, G, dk]; values [pages, page, G, dv] (for
  // MLA G = 1, and values are the first kv_lora_rank columns of keys: the latent itself); out [T, H, dv]. A
  // narrow latent cache has entries of bytes instead, values being their first kv_lora_rank.
  virtual void attention_paged(View q, View keys, View values, const Pages& pages, double scale,
                               View out) = 0;
  // How many entries block tables should name for attention_paged of T tokens with H heads, of which none
  // attends to more than `entries`: one of a few numbers, not below that, if the call takes less time for
  // naming no more, else 0. Bits are the same. Latents have no values of their own: null.
  virtual int64_t short_table(int64_t /*tokens*/, int64_t /*heads*/, View /*keys*/, View /*values*/,
                              int64_t /*entries*/) const {
    return 0;
  }
  // The same for MLA with keys and values expanded from the latents, block by block, which costs less where
  // many tokens share them. q [T, H, nope + rope]; cache [pages, page, 1, rank + rope]; kv_b [H · (nope +
  // dv), rank], of any layout; out [T, H, dv].
  virtual void attention_paged_expanded(View q, View cache, View kv_b, const Pages& pages, double scale,
                                        View out) = 0;
  // An entry of a narrow latent cache (u8, holding int8, or f8e4m3): the codes of the latent, the rotary part
  // in bfloat16, and the scale of the codes in float32, one after the other.
  static constexpr int64_t narrow_entry_bytes(int64_t rank, int64_t rope) { return rank + 2 * rope + 4; }
  // The rotary part's width in entries of `width` elements, narrow or not.
  static constexpr int64_t rotary_width(DType type, int64_t width, int64_t rank) {
    return is_narrow_cache(type) ? (width - rank - 4) / 2 : width - rank;
  }
  static constexpr bool is_narrow_cache(DType type) { return type == DType::u8 || type == DType::f8e4m3; }
  // Such entries of latent [T, rank] and rotary [T, rope] into cache [pages, page, bytes]; negative slots are
  // skipped. Values that are not finite make the entry not finite.
  virtual void cache_store_narrow(View latent, View rotary, View slots, View cache) = 0;
  // cache[slots[t] / page, slots[t] % page] = x[t]; x [T, D] (rows may be strided), cache [pages, page, D']
  // with D <= D' (a view of some columns); negative slots are skipped.
  virtual void cache_store(View x, View slots, View cache) = 0;

  // -- gated.cpp: a gate and what it gates, of all rows or (grouped_) of experts' rows. The defaults make the
  // calls that it stands for. --
  // gated = x · gateᵀ, risen = x · upᵀ, out = swiglu(gated, risen), in the bits of those calls. Where they
  // are not kept, gated and risen are scratch.
  virtual void gated_linear(View x, View gate, View up, View gated, View risen, View out, bool kept);
  virtual void grouped_gated_linear(View x, View rows, View offsets, View gate, View up, View gated,
                                    View risen, View out);
  // d_x (+)= d_gated · gate + d_risen · up
  virtual void gated_linear_backward_input(View d_gated, View d_risen, View gate, View up, Grad d_x);
  virtual void grouped_gated_linear_backward_input(View d_gated, View d_risen, View offsets, View gate,
                                                   View up, Grad d_x);
  // Both may add to one gradient.
  virtual void gated_linear_backward_weight(View d_gated, View d_risen, View x, Grad d_gate, Grad d_up);
  virtual void grouped_gated_linear_backward_weight(View d_gated, View d_risen, View x, View rows,
                                                    View offsets, Grad d_gate, Grad d_up);

  // -- fused.cpp: what decoding does in a row, in one call. The defaults make the calls that it stands for,
  // and an implementation's results have their bits. --
  // Whether plans without gradients are to be recorded so.
  virtual bool fuses() const { return false; }
  // Two linear() of x, without bias.
  virtual void linear_both(View x, View w, View other_w, View out, View other_out);
  // linear() of x's norm by w, and by other_w if there is one. x.out is scratch.
  virtual void normed_linear(const NormedRows& x, View w, View other_w, View out, View other_out);
  // route() of the logits [T, E] (scratch) that linear() makes of x's norm, without losses or loads.
  virtual void normed_route(const NormedRows& x, View gate, View bias, const Routing& routing, View logits,
                            View scores, View weights, View experts);
  // latent_out = rms_norm(latent); it and the rotated key to the cache.
  virtual void latent_entries(const LatentEntries& entries);
  // out [T, H, R + rope]: head_linear of q's first columns [T, H, N], and beside it the rotary rest of q,
  // rotated (in q, too, or not). w as head_linear takes it.
  virtual void absorb_rotated(View q, View w, bool transpose, View positions, View table, bool interleaved,
                              View out);
  // latent_entries(), and absorb_rotated() at the same positions.
  virtual void absorb_beside_entries(const LatentEntries& entries, View q, View w, bool transpose, View out);
  // absorb_beside_entries(), attention_paged() of what comes of it (folded, [T, H, R + rope]) over `keys`,
  // whose entries these are, and head_linear() of the results (attended, [T, H, R]) by w_uv [H, V, R].
  // Entries' slots are those that `pages` gives tokens' positions. folded and attended are scratch; q and the
  // entries' latents and rotary parts may be overwritten, and latent_out is scratch, too.
  virtual void attend_entries(const LatentEntries& entries, View q, View w_uk, bool transpose, View keys,
                              const Pages& pages, double scale, View w_uv, View folded, View attended,
                              View out);
  // out[t] = the sum over the token's choices of weight · down(silu(gate(x)) · up(x)), added onto the same of
  // the shared expert, in that order.
  virtual void expert_layer(const ExpertLayer& layer);

  // -- sample.cpp --
  // out [T] i32: the token that choices [T, Choice::words] i32 (tensor/choice.h) take from logits [T, V] of
  // the exact type; or not_a_number where a logit is NaN, not_finite where the largest is infinite.
  virtual void choose(View logits, View choices, View out) = 0;
  // out[t] = ids[t] where from[t] is negative, else chosen[from[t]], or 0 where that is no token. All i32.
  virtual void take_chosen(View ids, View from, View chosen, View out) = 0;
  static constexpr int32_t not_a_number = -1, not_finite = -2;

  // -- loss.cpp --
  // logits = h · wᵀ, a chunk of rows at a time in scratch [chunk, V] of the exact type;
  // nll[t] = -log softmax(logits[t])[targets[t]]; predicted[t] i32 = argmax, or null;
  // loss [1] = sum_t token_weights[t]·nll[t]. targets [T] i32; a negative target is ignored (nll 0).
  virtual void linear_cross_entropy(View h, View w, View targets, View token_weights, View scratch, View nll,
                                    View predicted, View loss) = 0;
  // The same, and the gradient of loss with respect to h and w, in one pass.
  virtual void linear_cross_entropy_with_gradient(View h, View w, View targets, View token_weights,
                                                  View scratch, View nll, View predicted, View loss, Grad d_h,
                                                  Grad d_w) = 0;

  // -- optimizer.cpp --
  // result [1] f64 += sum of squares of x (any shape, f32 or f64), in an order that does not depend on
  // threads
  virtual void add_sum_of_squares(View x, View result) = 0;
  // One step of AdamW (decoupled decay). parameter f32, f64 or bf16 with its f32 `master` (else null);
  // m and v as the gradient, or bf16 beside f32. scalars [4] f64: learning rate, gradient factor (clipping),
  // 1 - beta1^t, 1 - beta2^t.
  virtual void adamw(View parameter, View master, View gradient, View m, View v, View scalars,
                     const AdamW& options) = 0;
  // bias[e] += rate * sign(mean(load) - load[e]); load is zeroed (Wang et al. 2024, algorithm 1)
  virtual void update_routing_bias(View load, View bias, double rate) = 0;

  // -- fp8.cpp: training in FP8 (report, section 3.3): linear layers and experts, of bfloat16 activations and
  // weights. Sums over 128 of the depth are scaled and added in float32. Sizes are in sixteens. With offsets
  // rows are sorted by expert and weights are stacks; elsewhere offsets are null. --
  virtual bool multiplies_fp8() const { return false; }
  // x [R, C], or with rows the rows of x that they name
  virtual void quantise_fp8(View x, View rows, View offsets, const Fp8Operand& out);
  virtual void quantise_fp8_weight(View w, const Fp8Operand& out);
  // out (+)= x · wᵀ + bias (or null). The gradient of x is the same of d_out and w's transpose.
  virtual void linear_fp8(const Fp8Matrix& x, const Fp8Matrix& w, View offsets, View bias, Grad out);
  virtual void linear_fp8_backward_weight(const Fp8Matrix& d_out_across, const Fp8Matrix& x_across,
                                          View offsets, Grad d_w);
  // linear_fp8_backward_weight of both weights; where one launch makes both, a depth that is cut may be cut
  // elsewhere.
  virtual void gated_linear_fp8_backward_weight(const Fp8Matrix& d_gated_across,
                                                const Fp8Matrix& d_risen_across, const Fp8Matrix& x_across,
                                                View offsets, Grad d_gate, Grad d_up);
  // As gated_linear; rows of out times `factors` [R], or null
  virtual void gated_linear_fp8(const Fp8Matrix& x, const Fp8Matrix& gate, const Fp8Matrix& up, View offsets,
                                View factors, View gated, View risen, View out);
  // d_x (+)= d_gated · gate + d_risen · up
  virtual void gated_linear_fp8_backward_input(const Fp8Matrix& d_gated, const Fp8Matrix& d_risen,
                                               const Fp8Matrix& gate_across, const Fp8Matrix& up_across,
                                               View offsets, Grad d_x);
  // factors [T·K] of rows as expert_order sorted them, from weights [T, K]
  virtual void sort_weights(View weights, View slots, View factors);
  // swiglu_backward, of rows times `factors` (or null), quantised in the same pass. With factors also
  // d_weights [T, K] (or null) of the weights that they are, through slots.
  virtual void swiglu_backward_fp8(View d_out, View gated, View risen, View factors, View slots, View offsets,
                                   const Fp8Operand& d_gated, const Fp8Operand& d_risen, Grad d_weights);
  // linear() of x in bf16 by an exact w, in training alone: a row's result may depend on how many share the
  // call.
  virtual void linear_of_many(View x, View w, View out);
};

inline void RepeatedWork::run(Backend& backend, const std::function<void()>& work) {
  if (!replay_ && has_run_) replay_ = backend.record(work);
  has_run_ = true;
  replay_ ? replay_->launch() : work();
}

}  // namespace latente
