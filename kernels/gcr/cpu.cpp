// The adjoint iteration for a CPU: one call between two vector-Jacobian products. Same mathematics as aten.py; every sample has
// its own basis. Progress (best, done, ...) lies in a Broyden struct, whose S holds the basis: (B, 2, M, D), images first.
//
// With k pairs in the basis a move reads and writes about 5k + 24 words a state element, and 2n + 2 more for an operator of n
// steps: what is computed from one pass over a row is computed in that pass.

template <class T>
struct Gcr {
  const Operator<T>* m;
  const Broyden<T>* s;
  const T* q;                   // (B, D)
  T *x, *r, *w, *rt;            // (B, D): iterate, its residual, trial, the trial's residual
  T *norms, *relative, *sums;   // (B,), (B,), (B, 2): |q|, |rt| / |q|, and y.y and y.r of the new image y
  double stop, tiny;            // batch norm to stop at; share of an image that counts as new
  i64 active;                   // samples that go on
};

// Where the next pair of sample b goes; a full basis is dropped, x and r stay.
template <class T>
static inline i64 next_pair(const Broyden<T>& s, i64 b) {
  return s.n[b] < s.M ? s.n[b] : 0;
}

// rt = q + jw - w, and where y is given the image y = r - rt of the step z = w - x; adds |rt|^2, y.y and y.r to t[0..2].
template <class T>
static void judge(const T* q, const T* jw, const T* w, const T* r, const T* x, T* rt, T* y, T* z, i64 lo, i64 hi, T* t) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type a = {}, b = {}, c = {};
  i64 d = lo;
  for (; d + N <= hi; d += N) {
    auto trial = load(w + d), v = load(q + d) + load(jw + d) - trial;
    store(rt + d, v);
    a += v * v;
    if (!y) continue;
    auto old = load(r + d), image = old - v;
    store(y + d, image);
    store(z + d, trial - load(x + d));
    b += image * image;
    c += image * old;
  }
  t[0] = sum<T>(a), t[1] = sum<T>(b), t[2] = sum<T>(c);
  for (; d < hi; d++) {
    T v = q[d] + jw[d] - w[d];
    rt[d] = v;
    t[0] += v * v;
    if (!y) continue;
    T image = r[d] - v;
    y[d] = image;
    z[d] = w[d] - x[d];
    t[1] += image * image;
    t[2] += image * r[d];
  }
}

// y += sum_j c[j] images[j]; t[0] = y.y and t[1] = y.r afterwards.
template <class T, int U>
static inline void orthogonal_columns(const T* images, i64 D, i64 k, const T* c, T* y, const T* r, i64 d,
                                      typename Vec<T>::type* acc) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type A[U];
  add_columns<T, U>(images + d, D, k, c, y + d, A);
#pragma GCC unroll 8
  for (int u = 0; u < U; u++) {
    store(y + d + u * N, A[u]);
    acc[0] += A[u] * A[u];
    acc[1] += A[u] * load(r + d + u * N);
  }
}

template <class T>
static void orthogonalise(const T* images, i64 D, i64 k, const T* c, T* y, const T* r, i64 lo, i64 hi, T* t) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type acc[2] = {};
  i64 d = lo;
  for (; d + 8 * N <= hi; d += 8 * N) orthogonal_columns<T, 8>(images, D, k, c, y, r, d, acc);
  for (; d + N <= hi; d += N) orthogonal_columns<T, 1>(images, D, k, c, y, r, d, acc);
  t[0] = sum<T>(acc[0]), t[1] = sum<T>(acc[1]);
  for (; d < hi; d++) {
    for (i64 j = 0; j < k; j++) y[d] += c[j] * images[j * D + d];
    t[0] += y[d] * y[d];
    t[1] += y[d] * r[d];
  }
}

// The new pair, normalised: z = scale (z + sum_j h[j] directions[j]), y = scale y; then x += alpha z, r -= alpha y, kept = w where
// given, w = x + r.
template <class T, int U>
static inline void take_columns(const T* directions, i64 D, i64 k, const T* h, T scale, T alpha, T* y, T* z, T* x, T* r, T* w,
                                T* kept, i64 d) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type A[U];
  add_columns<T, U>(directions + d, D, k, h, z + d, A);
#pragma GCC unroll 4
  for (int u = 0; u < U; u++) {
    i64 e = d + u * N;
    auto direction = A[u] * scale, image = load(y + e) * scale;
    store(z + e, direction);
    store(y + e, image);
    auto iterate = load(x + e) + direction * alpha, residual = load(r + e) - image * alpha;
    store(x + e, iterate);
    store(r + e, residual);
    if (kept) store(kept + e, load(w + e));
    store(w + e, iterate + residual);
  }
}

template <class T>
static void take(const T* directions, i64 D, i64 k, const T* h, T scale, T alpha, T* y, T* z, T* x, T* r, T* w, T* kept, i64 lo,
                 i64 hi) {
  constexpr int N = Vec<T>::N;
  i64 d = lo;
  for (; d + 4 * N <= hi; d += 4 * N) take_columns<T, 4>(directions, D, k, h, scale, alpha, y, z, x, r, w, kept, d);
  for (; d + N <= hi; d += N) take_columns<T, 1>(directions, D, k, h, scale, alpha, y, z, x, r, w, kept, d);
  for (; d < hi; d++) {
    T direction = z[d];
    for (i64 j = 0; j < k; j++) direction += h[j] * directions[j * D + d];
    z[d] = direction *= scale;
    y[d] *= scale;
    x[d] += alpha * direction;
    r[d] -= alpha * y[d];
    if (kept) kept[d] = w[d];
    w[d] = x[d] + r[d];
  }
}

// Begin: x = 0, r = q, w = M q; norms[b] = |q_b|. Returns |q|.
template <class T>
static double gcr_start(const Gcr<T>* g) {
  const Broyden<T>* s = g->s;
  i64 D = s->D;
  start<T>(s, g->q);  // the best estimate is q until a residual is known: what a failed sample falls back to
  over_samples<T>(s->B, D, s->ld, s->threads, [&](Scratch<T>& scratch, i64 b, bool split) {
    const T* q = g->q + b * D;
    T *x = g->x + b * D, *r = g->r + b * D, *w = g->w + b * D, *parts = scratch.parts.data(), ignored, square = 0;
    std::memset(x, 0, sizeof(T) * D);
    over_chunks(D, s->threads, split, [&](i64 lo, i64 hi, i64 c) {
      residual<T>(q + lo, x + lo, r + lo, hi - lo, parts[c], ignored);
      std::memcpy(w + lo, q + lo, sizeof(T) * (hi - lo));
    });
    for (i64 c = 0; c < chunks_of(D); c++) square += parts[c];
    g->norms[b] = std::sqrt(square);
    add_operator<T>(scratch, g->m, b, D, q, w, s->threads, split);
  });
  double all = 0;
  for (i64 b = 0; b < s->B; b++) all += double(g->norms[b]) * double(g->norms[b]);
  return std::sqrt(all);
}

// The update of sample b, whose new pair is in its slot: x and r to the minimum over the basis, and the next trial.
template <class T>
static void extend(const Gcr<T>& g, Scratch<T>& scratch, i64 b, bool improved, bool split) {
  const Broyden<T>& s = *g.s;
  i64 D = s.D, M = s.M, ld = s.ld, threads = s.threads, k = next_pair(s, b), chunks = chunks_of(D);
  T *images = s.S + b * 2 * M * D, *directions = images + M * D, *y = images + k * D, *z = directions + k * D;
  T *x = g.x + b * D, *r = g.r + b * D, *w = g.w + b * D, *kept = improved ? s.z_best + b * D : nullptr;
  T *a = scratch.a.data(), *h = scratch.y.data(), *t = scratch.t.data(), *parts = scratch.parts.data();
  T before = g.sums[2 * b], along = g.sums[2 * b + 1], square = before;
  for (i64 j = 0; j < k; j++) h[j] = 0;
  for (int pass = 0; k > 0 && pass < 2; pass++) {  // classical Gram-Schmidt, always twice: once is not enough in fp32
    row_dots<T, false>(scratch, images, D, k, y, y, ld, threads, split);
    for (i64 j = 0; j < k; j++) t[j] = -a[j], h[j] -= a[j];
    over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64 c) {
      orthogonalise<T>(images, D, k, t, y, r, lo, hi, parts + 2 * c);
    });
    square = along = 0;
    for (i64 c = 0; c < chunks; c++) square += parts[2 * c], along += parts[2 * c + 1];
  }
  T tiny = T(g.tiny);
  if (square > tiny * tiny * before && finite(1 / square) && finite(along)) {
    T inverse = 1 / std::sqrt(square), alpha = along * inverse;
    over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64) {
      take<T>(directions, D, k, h, inverse, alpha, y, z, x, r, w, kept, lo, hi);
    });
    s.n[b] = int32_t(k + 1);
  } else {  // nothing new: begin again where the residual is known
    std::memcpy(x, w, sizeof(T) * D);
    std::memcpy(r, g.rt + b * D, sizeof(T) * D);
    if (kept) std::memcpy(kept, w, sizeof(T) * D);
    over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64) { add_scaled<T>(1, r, w, lo, hi); });
    s.n[b] = 0;
  }
  add_operator<T>(scratch, g.m, b, D, r, w, threads, split);
}

// Residual rt = q + jw - w and its norms; then, unless that of the batch is at most `stop`, the update of the samples that still
// run. Returns the batch's norm. A sample with norms[b] = 0 counts as solved.
template <class T>
static double gcr_step(Gcr<T>* g, const T* jw, i64 evaluation, i64 last) {
  const Broyden<T>* s = g->s;
  i64 D = s->D, B = s->B, M = s->M, going = 0, threads = s->threads;
  over_samples<T>(B, D, s->ld, threads, [&](Scratch<T>& scratch, i64 b, bool split) {
    T *images = s->S + b * 2 * M * D + next_pair(*s, b) * D, *parts = scratch.parts.data();
    T *y = s->done[b] == RUNNING && !last ? images : nullptr, *z = y ? images + M * D : nullptr, total[3] = {};
    i64 at = b * D;
    over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64 c) {
      judge<T>(g->q + at, jw + at, g->w + at, g->r + at, g->x + at, g->rt + at, y, z, lo, hi, parts + 4 * c);
    });
    for (i64 c = 0; c < chunks_of(D); c++)
      for (int i = 0; i < 3; i++) total[i] += parts[4 * c + i];
    g->relative[b] = g->norms[b] > 0 ? std::sqrt(total[0]) / g->norms[b] : T(0);
    g->sums[2 * b] = total[1], g->sums[2 * b + 1] = total[2];
  });
  double all = 0;
  for (i64 b = 0; b < B; b++) {
    double norm = double(g->relative[b]) * double(g->norms[b]);
    all += norm * norm;
  }
  all = std::sqrt(all);
  g->active = 0;
  if (all <= g->stop) return all;
  bool rows = B >= threads, split = threads > 1 && !rows;
#pragma omp parallel for num_threads(threads) reduction(+ : going) if (threads > 1 && rows)
  for (i64 b = 0; b < B; b++) {
    if (s->done[b] != RUNNING) continue;
    bool improved = false;
    if (!observe<T>(*s, b, g->w + b * D, g->relative[b], T(1), evaluation, last, improved)) continue;
    static thread_local Scratch<T> scratch;
    scratch.fit(s->ld, chunks_of(D));
    extend<T>(*g, scratch, b, improved, split);
    going++;
  }
  g->active = going;
  return all;
}

#define DEQ_GCR(SUFFIX, T)                                                                          \
  double gcr_start_##SUFFIX(const Gcr<T>* g) { return gcr_start(g); }                               \
  double gcr_step_##SUFFIX(Gcr<T>* g, const T* jw, int64_t evaluation, int64_t last) {              \
    return gcr_step(g, jw, evaluation, last);                                                       \
  }
extern "C" {
DEQ_GCR(f32, float)
DEQ_GCR(f64, double)
}
