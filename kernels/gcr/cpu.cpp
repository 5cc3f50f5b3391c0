// The adjoint iteration for a CPU: one call between two vector-Jacobian products. Same mathematics as aten.py; every sample has
// its own basis. Progress (best, done, ...) lies in a Broyden struct, whose S holds the basis: (B, 2, M, D), images first.

// r = q + jw - w of one sample; returns |r|^2.
template <class T>
static T true_residual(const T* q, const T* jw, const T* w, T* r, i64 D) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type acc = {};
  i64 d = 0;
  for (; d + N <= D; d += N) {
    auto v = load(q + d) + load(jw + d) - load(w + d);
    store(r + d, v);
    acc += v * v;
  }
  T total = sum<T>(acc);
  for (; d < D; d++) {
    T v = q[d] + jw[d] - w[d];
    r[d] = v;
    total += v * v;
  }
  return total;
}

template <class T>
static inline void subtract(const T* a, const T* b, T* out, i64 lo, i64 hi) {
  constexpr int N = Vec<T>::N;
  i64 d = lo;
  for (; d + N <= hi; d += N) store(out + d, load(a + d) - load(b + d));
  for (; d < hi; d++) out[d] = a[d] - b[d];
}

// y[lo:hi] += c x[lo:hi]
template <class T>
static inline void add_scaled(T c, const T* x, T* y, i64 lo, i64 hi) {
  constexpr int N = Vec<T>::N;
  auto cc = broadcast(c);
  i64 d = lo;
  for (; d + N <= hi; d += N) store(y + d, load(y + d) + cc * load(x + d));
  for (; d < hi; d++) y[d] += c * x[d];
}

// w = x + M r
template <class T>
static void trial(Scratch<T>& s, const Operator<T>* m, i64 b, i64 D, const T* x, const T* r, T* w, i64 threads, bool split) {
  apply_operator<T>(s, m, b, D, r, w, threads, split);
  over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64) { add_scaled<T>(1, x, w, lo, hi); });
}

// Begin: x = 0, r = q, w = M q; norms[b] = |q_b|. Returns |q|.
template <class T>
static double gcr_start(const Operator<T>* m, const Broyden<T>* s, const T* q, T* x, T* r, T* w, T* norms) {
  i64 D = s->D;
  start<T>(s, q);  // the best estimate is q until a residual is known: what a failed sample falls back to
  over_samples<T>(s->B, D, s->ld, s->threads, [&](Scratch<T>& scratch, i64 b, bool split) {
    T square = 0, ignored;
    std::memset(x + b * D, 0, sizeof(T) * D);
    i64 count = chunks_of(D);
    over_chunks(D, s->threads, split, [&](i64 lo, i64 hi, i64 c) {
      residual<T>(q + b * D + lo, x + b * D + lo, r + b * D + lo, hi - lo, scratch.parts[c], ignored);
    });
    for (i64 c = 0; c < count; c++) square += scratch.parts[c];
    norms[b] = std::sqrt(square);
    apply_operator<T>(scratch, m, b, D, q + b * D, w + b * D, s->threads, split);
  });
  double all = 0;
  for (i64 b = 0; b < s->B; b++) all += double(norms[b]) * double(norms[b]);
  return std::sqrt(all);
}

// The update of sample b, whose residual at w is rt: one more pair in the basis, x and r to the minimum over it, the next trial.
template <class T>
static void extend(const Operator<T>* m, const Broyden<T>& s, Scratch<T>& scratch, i64 b, T* x, T* r, T* w, const T* rt, T tiny,
                   bool split) {
  i64 D = s.D, M = s.M, ld = s.ld, threads = s.threads;
  T *images = s.S + b * 2 * M * D, *directions = images + M * D;
  i64 k = s.n[b] < M ? s.n[b] : 0;  // a full basis is dropped, x and r stay
  T *y = images + k * D, *z = directions + k * D;
  over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64) {
    subtract<T>(r, rt, y, lo, hi);
    subtract<T>(w, x, z, lo, hi);
  });
  T *a = scratch.a.data(), *h = scratch.y.data(), *t = scratch.t.data();
  row_dots<T, true>(scratch, y, D, 1, y, r, ld, threads, split);
  T before = a[0];
  for (i64 j = 0; j < k; j++) h[j] = 0;
  if (k > 0)
    for (int pass = 0; pass < 2; pass++) {  // classical Gram-Schmidt, twice
      row_dots<T, false>(scratch, images, D, k, y, y, ld, threads, split);
      for (i64 j = 0; j < k; j++) t[j] = -a[j], h[j] -= a[j];
      over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64) { update<T>(images, D, k, t, T(1), y, nullptr, nullptr, lo, hi); });
    }
  row_dots<T, true>(scratch, y, D, 1, y, r, ld, threads, split);
  T square = a[0], along = scratch.r[0];
  if (square > tiny * tiny * before && finite(1 / square) && finite(along)) {
    T inverse = 1 / std::sqrt(square), alpha = along * inverse;
    over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64) {
      update<T>(directions, D, k, h, inverse, z, nullptr, nullptr, lo, hi);
      update<T>(images, D, 0, h, inverse, y, nullptr, nullptr, lo, hi);
      add_scaled<T>(alpha, z, x, lo, hi);
      add_scaled<T>(-alpha, y, r, lo, hi);
    });
    s.n[b] = int32_t(k + 1);
  } else {  // nothing new: begin again where the residual is known
    std::memcpy(x, w, sizeof(T) * D);
    std::memcpy(r, rt, sizeof(T) * D);
    s.n[b] = 0;
  }
  trial<T>(scratch, m, b, D, x, r, w, threads, split);
}

// Residual rt = q + jw - w and its norms; then, unless that of the batch is at most `stop`, the update of the samples that still
// run. Returns the batch's norm; *active: samples that go on. A sample with norms[b] = 0 counts as solved.
template <class T>
static double gcr_step(const Operator<T>* m, const Broyden<T>* s, const T* q, const T* jw, T* x, T* r, T* w, const T* norms,
                       double stop, T* rt, T* relative, double tiny, i64 evaluation, i64 last, i64* active) {
  i64 D = s->D, B = s->B, going = 0, threads = s->threads;
  bool rows = B >= threads, split = threads > 1 && !rows;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows)
  for (i64 b = 0; b < B; b++) {
    T square = true_residual<T>(q + b * D, jw + b * D, w + b * D, rt + b * D, D);
    relative[b] = norms[b] > 0 ? std::sqrt(square) / norms[b] : T(0);
  }
  double all = 0;
  for (i64 b = 0; b < B; b++) {
    double norm = double(relative[b]) * double(norms[b]);
    all += norm * norm;
  }
  all = std::sqrt(all);
  *active = 0;
  if (all <= stop) return all;
#pragma omp parallel for num_threads(threads) reduction(+ : going) if (threads > 1 && rows)
  for (i64 b = 0; b < B; b++) {
    if (s->done[b] != RUNNING) continue;
    bool improved = false;
    if (!observe<T>(*s, b, w + b * D, relative[b], T(1), evaluation, last, improved)) continue;
    static thread_local Scratch<T> scratch;
    scratch.fit(s->ld, chunks_of(D));
    if (improved) std::memcpy(s->z_best + b * D, w + b * D, sizeof(T) * D);
    extend<T>(m, *s, scratch, b, x + b * D, r + b * D, w + b * D, rt + b * D, T(tiny), split);
    going++;
  }
  *active = going;
  return all;
}

#define DEQ_GCR(SUFFIX, T)                                                                                                       \
  double gcr_start_##SUFFIX(const Operator<T>* m, const Broyden<T>* s, const T* q, T* x, T* r, T* w, T* norms) {                 \
    return gcr_start(m, s, q, x, r, w, norms);                                                                                   \
  }                                                                                                                              \
  double gcr_step_##SUFFIX(const Operator<T>* m, const Broyden<T>* s, const T* q, const T* jw, T* x, T* r, T* w, const T* norms, \
                           double stop, T* rt, T* relative, double tiny, int64_t evaluation, int64_t last, int64_t* active) {    \
    return gcr_step(m, s, q, jw, x, r, w, norms, stop, rt, relative, tiny, evaluation, last, active);                            \
  }
extern "C" {
DEQ_GCR(f32, float)
DEQ_GCR(f64, double)
}
