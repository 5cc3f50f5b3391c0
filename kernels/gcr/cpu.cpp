// The adjoint iteration for a CPU: one call between two vector-Jacobian products. Same mathematics as aten.py; every sample has
// its own basis. Progress (best, done, ...) lies in a Broyden struct, whose S holds the basis: (B, 2, M, D), images first.
//
// A move is two sweeps over the samples, because the batch as a whole may be good enough: the first makes norms only, the second
// all the rest. With k pairs in the basis they read and write 5k + 29 words a state element, of which 2k + 14 are first uses (the
// others come from the cache that a sample's rows fit into), and 2n + 2 more for an operator of n steps.

template <class T>
struct Gcr {
  const Operator<T>* m;
  const Broyden<T>* s;
  const T* q;                    // (B, D)
  T *x, *r, *w;                  // (B, D): iterate, its residual, trial. Before the first move x = 0, r = q, and w = M q
  T *norms, *relative;           // (B,): |q|, and |r(w)| / |q| of the last product
  double tol, tiny, batch_norm;  // of the batch's residual; share of an image that counts as new; |q|
  i64 active;                    // samples that go on
};

// Where the next pair of sample b goes; a full basis is dropped, x and r stay.
template <class T>
static inline i64 next_pair(const Broyden<T>& s, i64 b) {
  return s.n[b] < s.M ? s.n[b] : 0;
}

// |q + jw - w|^2 and |q|^2 of a chunk.
template <class T>
static void norms_of(const T* q, const T* jw, const T* w, i64 lo, i64 hi, T* t) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type a[2], b[2];
  for (int u = 0; u < 2; u++) a[u] = b[u] = broadcast(T(0));
  i64 d = lo;
  for (; d + 2 * N <= hi; d += 2 * N)
    for (int u = 0; u < 2; u++) {
      auto given = load(q + d + u * N), v = given + load(jw + d + u * N) - load(w + d + u * N);
      a[u] += v * v;
      b[u] += given * given;
    }
  t[0] = sum<T>(a[0] + a[1]), t[1] = sum<T>(b[0] + b[1]);
  for (; d < hi; d++) {
    T v = q[d] + jw[d] - w[d];
    t[0] += v * v;
    t[1] += q[d] * q[d];
  }
}

// The image y = r - r(w) of the step z = w - x, where r(w) = q + jw - w; t[0] = y.y and t[1] = y.r. No x is x = 0.
template <class T, bool ZERO>
static void new_pair(const T* q, const T* jw, const T* w, const T* r, const T* x, T* y, T* z, i64 lo, i64 hi, T* t) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type b = {}, c = {};
  i64 d = lo;
  for (; d + N <= hi; d += N) {
    auto trial = load(w + d), old = load(r + d), image = old - (load(q + d) + load(jw + d) - trial);
    store(y + d, image);
    store(z + d, ZERO ? trial : trial - load(x + d));
    b += image * image;
    c += image * old;
  }
  t[0] = sum<T>(b), t[1] = sum<T>(c);
  for (; d < hi; d++) {
    T image = r[d] - (q[d] + jw[d] - w[d]);
    y[d] = image;
    z[d] = ZERO ? w[d] : w[d] - x[d];
    t[0] += image * image;
    t[1] += image * r[d];
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
  typename Vec<T>::type acc[2];
  acc[0] = acc[1] = broadcast(T(0));
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

// The new pair, normalised: z = scale (z + sum_j h[j] directions[j]), y = scale y; then x += alpha z, r = before - alpha y,
// kept = w where given, w = x + r. ZERO: x is 0.
template <class T, int U, bool ZERO>
static inline void take_columns(const T* directions, i64 D, i64 k, const T* h, T scale, T alpha, T* y, T* z, T* x,
                                const T* before, T* r, T* w, T* kept, i64 d) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type A[U];
  add_columns<T, U>(directions + d, D, k, h, z + d, A);
#pragma GCC unroll 4
  for (int u = 0; u < U; u++) {
    i64 e = d + u * N;
    auto direction = A[u] * scale, image = load(y + e) * scale;
    store(z + e, direction);
    store(y + e, image);
    auto iterate = ZERO ? direction * alpha : load(x + e) + direction * alpha, residual = load(before + e) - image * alpha;
    store(x + e, iterate);
    store(r + e, residual);
    if (kept) store(kept + e, load(w + e));
    store(w + e, iterate + residual);
  }
}

template <class T, bool ZERO>
static void take(const T* directions, i64 D, i64 k, const T* h, T scale, T alpha, T* y, T* z, T* x, const T* before, T* r, T* w,
                 T* kept, i64 lo, i64 hi) {
  constexpr int N = Vec<T>::N;
  i64 d = lo;
  for (; d + 4 * N <= hi; d += 4 * N) take_columns<T, 4, ZERO>(directions, D, k, h, scale, alpha, y, z, x, before, r, w, kept, d);
  for (; d + N <= hi; d += N) take_columns<T, 1, ZERO>(directions, D, k, h, scale, alpha, y, z, x, before, r, w, kept, d);
  for (; d < hi; d++) {
    T direction = z[d];
    for (i64 j = 0; j < k; j++) direction += h[j] * directions[j * D + d];
    z[d] = direction *= scale;
    y[d] *= scale;
    x[d] = (ZERO ? T(0) : x[d]) + alpha * direction;
    r[d] = before[d] - alpha * y[d];
    if (kept) kept[d] = w[d];
    w[d] = x[d] + r[d];
  }
}

// Begin: nothing is known of any sample; w = M q, which is q itself where there is no operator.
template <class T>
static void gcr_start(const Gcr<T>* g) {
  const Broyden<T>* s = g->s;
  start<T>(s, nullptr, nullptr);
  i64 D = s->D;
  over_samples<T>(s->B, D, s->ld, s->threads, [&](Scratch<T>& scratch, i64 b, bool split) {
    std::memcpy(g->w + b * D, g->q + b * D, sizeof(T) * D);
    add_operator<T>(scratch, g->m, b, D, g->q + b * D, g->w + b * D, s->threads, split);
  });
}

// The update of sample b by the product jw: a new pair, x and r to the minimum over the basis, and the next trial.
template <class T, bool FIRST>
static void extend(const Gcr<T>& g, Scratch<T>& scratch, i64 b, const T* jw, bool improved, bool split) {
  const Broyden<T>& s = *g.s;
  i64 D = s.D, M = s.M, ld = s.ld, threads = s.threads, k = next_pair(s, b), chunks = chunks_of(D);
  T *images = s.S + b * 2 * M * D, *directions = images + M * D, *y = images + k * D, *z = directions + k * D;
  T *x = g.x + b * D, *r = g.r + b * D, *w = g.w + b * D, *kept = improved ? s.z_best + b * D : nullptr;
  const T *q = g.q + b * D, *before = FIRST ? q : r;
  T *a = scratch.a.data(), *h = scratch.y.data(), *t = scratch.t.data(), *parts = scratch.parts.data();
  T whole = 0, square = 0, along = 0;
  auto add_up = [&] {
    square = along = 0;
    for (i64 c = 0; c < chunks; c++) square += parts[2 * c], along += parts[2 * c + 1];
  };
  over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64 c) {
    new_pair<T, FIRST>(q, jw, w, before, x, y, z, lo, hi, parts + 2 * c);
  });
  add_up();
  whole = square;
  for (i64 j = 0; j < k; j++) h[j] = 0;
  for (int pass = 0; k > 0 && pass < 2; pass++) {  // classical Gram-Schmidt, always twice: once is not enough in fp32
    row_dots<T, false>(scratch, images, D, k, y, y, ld, threads, split);
    for (i64 j = 0; j < k; j++) t[j] = -a[j], h[j] -= a[j];
    over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64 c) {
      orthogonalise<T>(images, D, k, t, y, before, lo, hi, parts + 2 * c);
    });
    add_up();
  }
  T tiny = T(g.tiny);
  if (square > tiny * tiny * whole && finite(1 / square) && finite(along)) {
    T inverse = 1 / std::sqrt(square), alpha = along * inverse;
    over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64) {
      take<T, FIRST>(directions, D, k, h, inverse, alpha, y, z, x, before, r, w, kept, lo, hi);
    });
    s.n[b] = int32_t(k + 1);
  } else {  // nothing new: begin again where the residual is known
    for (i64 d = 0; d < D; d++) r[d] = q[d] + jw[d] - w[d];
    std::memcpy(x, w, sizeof(T) * D);
    if (kept) std::memcpy(kept, w, sizeof(T) * D);
    over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64) { add_scaled<T>(1, r, w, lo, hi); });
    s.n[b] = 0;
  }
  add_operator<T>(scratch, g.m, b, D, r, w, threads, split);
}

// The norms of r(w) = q + jw - w; then, unless that of the batch is small enough, the update of the samples that still run.
// Returns the batch's residual, relative to |q|. A sample with q = 0 counts as solved.
template <class T>
static double gcr_step(Gcr<T>* g, const T* jw, i64 evaluation, i64 last) {
  const Broyden<T>* s = g->s;
  i64 D = s->D, B = s->B, going = 0, threads = s->threads;
  bool first = evaluation == 1;
  over_samples<T>(B, D, s->ld, threads, [&](Scratch<T>& scratch, i64 b, bool split) {
    T *parts = scratch.parts.data(), residual = 0, whole = 0;
    i64 at = b * D;
    over_chunks(D, threads, split,
                [&](i64 lo, i64 hi, i64 c) { norms_of<T>(g->q + at, jw + at, g->w + at, lo, hi, parts + 2 * c); });
    for (i64 c = 0; c < chunks_of(D); c++) residual += parts[2 * c], whole += parts[2 * c + 1];
    if (first) g->norms[b] = std::sqrt(whole);
    g->relative[b] = g->norms[b] == 0 ? T(0) : std::sqrt(residual) / g->norms[b];  // NaN stays NaN
  });
  double all = 0, scale = 0;
  for (i64 b = 0; b < B; b++) {
    double whole = double(g->norms[b]), norm = double(g->relative[b]) * whole;
    all += norm * norm;
    scale += whole * whole;
  }
  if (first) g->batch_norm = std::sqrt(scale);
  all = g->batch_norm == 0 ? 0 : std::sqrt(all) / g->batch_norm;
  g->active = 0;
  if (all <= g->tol) return all;
  bool rows = B >= threads, split = threads > 1 && !rows;
#pragma omp parallel for num_threads(threads) reduction(+ : going) if (threads > 1 && rows)
  for (i64 b = 0; b < B; b++) {
    if (s->done[b] != RUNNING) continue;
    T stop = g->relative[b];
    bool improved = false;
    if (first && !finite(stop)) std::memcpy(s->z_best + b * D, g->q + b * D, sizeof(T) * D);  // no trial to fall back to
    if (!observe<T>(*s, b, g->w + b * D, stop, T(1), evaluation, last, improved)) continue;
    static thread_local Scratch<T> scratch;
    scratch.fit(s->ld, chunks_of(D));
    if (first)
      extend<T, true>(*g, scratch, b, jw + b * D, improved, split);
    else
      extend<T, false>(*g, scratch, b, jw + b * D, improved, split);
    going++;
  }
  g->active = going;
  return all;
}

#define DEQ_GCR(SUFFIX, T)                                                                          \
  void gcr_start_##SUFFIX(const Gcr<T>* g) { gcr_start(g); }                                        \
  double gcr_step_##SUFFIX(Gcr<T>* g, const T* jw, int64_t evaluation, int64_t last) {              \
    return gcr_step(g, jw, evaluation, last);                                                       \
  }
extern "C" {
DEQ_GCR(f32, float)
DEQ_GCR(f64, double)
}
