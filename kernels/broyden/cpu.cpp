// The Broyden step for a CPU: one call an iteration over all samples. Same mathematics as aten.py, which is the reference for
// signs and guards; here every sample has its own number of stored steps, so nothing is computed for samples that stopped.
//
// A sample's row of S, f, z is read once for the residual, its steps once for both sets of dot products, and once for the
// update: 2n + 8 words a state element. Plain iteration is the same step with nothing stored: 6 words at most, no S and no C.
// Anderson acceleration shares the residual and the stopping rule.

#include <omp.h>

enum Flag : i64 { LAST = 1, NO_OBSERVATION = 2, RESIDUAL_GIVEN = 4, PRECONDITIONED = 8, PLAIN = 16, ANDERSON = 32 };

template <class T>
struct Broyden {
  i64 B, D, M, ld, threads, relative;  // ld: row stride of C
  double tol, floor, eta;
  T *S, *C, *best, *mark, *ceiling, *z_best;  // (B, M+1, D), (B, M, ld), (B,), (B,), (B,) or null, (B, D)
  int32_t *n, *iterations, *stall;  // (B,)
  int8_t* done;                     // (B,)
  float* solve_info;                     // (B, 3) or null: of each sample that has stopped, its residual, evaluations and code
  i64 converged;                    // samples that stopped with CONVERGED; set when none runs any more
};

// Call work(lo, hi, c) for the chunks of a row, over threads where `split` says so.
template <class F>
static inline void over_chunks(i64 D, i64 threads, bool split, F work) {
  i64 count = chunks_of(D);
  if (count == 1) return work(i64(0), D, i64(0));
#pragma omp parallel for num_threads(threads) if (split)
  for (i64 c = 0; c < count; c++) work(c * CHUNK, c * CHUNK + CHUNK < D ? c * CHUNK + CHUNK : D, c);
}

// g = f - z, stored where KEEP; returns |g|^2 and |f|^2 of a chunk.
template <class T, bool KEEP>
static inline void residual(const T* f, const T* z, T* g, i64 len, T& gg, T& ff) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type G[2], F[2];
  for (int u = 0; u < 2; u++) G[u] = F[u] = broadcast(T(0));
  i64 d = 0;
  for (; d + 2 * N <= len; d += 2 * N)
    for (int u = 0; u < 2; u++) {
      auto x = load(f + d + u * N), y = x - load(z + d + u * N);
      if (KEEP) store(g + d + u * N, y);
      G[u] += y * y;
      F[u] += x * x;
    }
  gg = sum<T>(G[0] + G[1]);
  ff = sum<T>(F[0] + F[1]);
  for (; d < len; d++) {
    T x = f[d], y = x - z[d];
    if (KEEP) g[d] = y;
    gg += y * y;
    ff += x * x;
  }
}

// A = g + sum_j c[j] S[j] over U vectors of columns, which stay in registers.
template <class T, int U>
static inline __attribute__((always_inline)) void add_columns(const T* S, i64 D, i64 rows, const T* c, const T* g,
                                                              typename Vec<T>::type (&A)[U]) {
  constexpr int N = Vec<T>::N;
#pragma GCC unroll 8
  for (int u = 0; u < U; u++) A[u] = load(g + u * N);
  for (i64 j = 0; j < rows; j++) {
    auto cj = broadcast(c[j]);
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) A[u] += cj * load(S + j * D + u * N);
  }
}

// g = scale * (g + sum_j c[j] S[j]); kept = z where given; z += g.
template <class T, int U>
static inline void update_columns(const T* S, i64 D, i64 rows, const T* c, T scale, T* g, T* z, T* kept, i64 d) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type A[U];
  add_columns<T, U>(S + d, D, rows, c, g + d, A);
#pragma GCC unroll 8
  for (int u = 0; u < U; u++) {
    auto p = A[u] * scale;
    store(g + d + u * N, p);
    if (!z) continue;
    auto old = load(z + d + u * N);
    if (kept) store(kept + d + u * N, old);
    store(z + d + u * N, old + p);
  }
}

template <class T>
static void update(const T* S, i64 D, i64 rows, const T* c, T scale, T* g, T* z, T* kept, i64 lo, i64 hi) {
  constexpr int N = Vec<T>::N;
  i64 d = lo;
  for (; d + 8 * N <= hi; d += 8 * N) update_columns<T, 8>(S, D, rows, c, scale, g, z, kept, d);
  for (; d + N <= hi; d += N) update_columns<T, 1>(S, D, rows, c, scale, g, z, kept, d);
  for (; d < hi; d++) {
    T p = g[d];
    for (i64 j = 0; j < rows; j++) p += c[j] * S[j * D + d];
    p *= scale;
    g[d] = p;
    if (!z) continue;
    if (kept) kept[d] = z[d];
    z[d] += p;
  }
}

// Scratch of one thread: vectors of coefficients, partial dot products, and a row for the residual of a full sample.
template <class T>
struct Scratch {
  std::vector<T> a, r, y, t, vectors, parts, row;
  void fit(i64 ld, i64 chunks) {
    if (i64(a.size()) < ld + 16) {
      for (auto* v : {&a, &r, &y, &t}) v->resize(ld + 16);
      vectors.resize((ld + 16) * Vec<T>::N);
    }
    if (i64(parts.size()) < chunks * 2 * (ld + 16)) parts.resize(chunks * 2 * (ld + 16));
  }
};

// a[i] = S[i] . g, r[i] = S[i] . s for i < rows, over the chunks of the row.
template <class T, bool TWO>
static void row_dots(Scratch<T>& w, const T* S, i64 D, i64 rows, const T* g, const T* s, i64 ld, i64 threads, bool split) {
  i64 count = chunks_of(D), room = ld + 16;
  if (count == 1) return dots<T, TWO>(S, D, D, rows, g, s, w.a.data(), w.r.data());
  T* parts = w.parts.data();
  over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64 c) {
    T* p = parts + c * 2 * room;
    dots<T, TWO>(S + lo, D, hi - lo, rows, g + lo, s + lo, p, p + room);
  });
  for (i64 i = 0; i < rows; i++) {
    T a = 0, r = 0;
    for (i64 c = 0; c < count; c++) {
      a += parts[c * 2 * room + i];
      if (TWO) r += parts[c * 2 * room + room + i];
    }
    w.a[i] = a;
    if (TWO) w.r[i] = r;
  }
}

// One step of sample b with residual g (its slot of S, or scratch where S is full); keep: z is the best iterate so far.
template <class T>
static void advance(const Broyden<T>& s, Scratch<T>& w, i64 b, T* z, T* g, bool keep, bool split) {
  i64 D = s.D, M = s.M, ld = s.ld, n = s.n[b];
  T* S = s.S + b * (M + 1) * D;
  T* C = s.C + b * M * ld;
  T* kept = keep ? s.z_best + b * D : nullptr;
  T denominator = 1;
  i64 rows = 0;
  if (n > 0) {
    row_dots<T, true>(w, S, D, n, g, S + (n - 1) * D, ld, s.threads, split);
    T *a = w.a.data(), *r = w.r.data(), *y = w.y.data(), *t = w.t.data();
    T sigma = r[n - 1], minus_tau = a[n - 1];
    rows = n - 1;
    for (i64 i = rows; i < ld; i++) a[i] = 0;
    algebra<T>(C, ld, rows, a, r + 1, y, t, w.vectors.data());  // y = C a = -c, t = r^T C
    for (i64 j = 0; j < rows; j++) minus_tau += y[j] * r[j + 1];
    // Powell's guard: see _guard in aten.py
    T gamma = 1 - minus_tau / sigma, kappa = 1 / sigma;
    denominator = gamma;
    if (s.eta > 0 && std::fabs(gamma) < T(s.eta)) {
      denominator = gamma >= 0 ? T(s.eta) : -T(s.eta);
      kappa = (1 - denominator) / minus_tau;
    }
    if (!finite(kappa / denominator)) denominator = 1, kappa = 0;
    if (n > M) {  // full: keep the last step only, as the first of a new product
      std::memcpy(S, S + M * D, sizeof(T) * D);
      n = 1;
      for (i64 v = 0; v < ld; v++) t[v] = 0;
    }
    T* row = C + (n - 1) * ld;
    std::memset(row, 0, sizeof(T) * ld);
    for (i64 v = 0; kappa != 0 && v < n - 1; v++) {
      T x = kappa * t[v];
      row[v] = finite(x) ? x : T(0);
    }
    row[n - 1] = kappa;
  }
  T scale = 1 / denominator;
  T* slot = S + n * D;
  const T* first = S + D;
  const T* weights = w.y.data();
  if (g != slot) {  // the memory was full: S[0] has been overwritten, the rows that are read here have not
    over_chunks(D, s.threads, split, [&](i64 lo, i64 hi, i64) {
      update<T>(first, D, rows, weights, scale, g, z, kept, lo, hi);
      std::memcpy(slot + lo, g + lo, sizeof(T) * (hi - lo));
    });
  } else {
    over_chunks(D, s.threads, split,
                [&](i64 lo, i64 hi, i64) { update<T>(first, D, rows, weights, scale, g, z, kept, lo, hi); });
  }
  s.n[b] = int32_t(n + 1);
}

// gamma = argmin |g - sum_j gamma_j dg_j| from the Gram matrix G (m x m) of `held` differences and a[j] = dg_j . g, as in
// anderson/aten.py: in double, with a ridge of ten eps of each diagonal element. Zeros where it cannot be solved. By L D L^T without
// a square root, column by column: what follows a division can be worked on at a time.
// H: how many, where the compiler is to know it and to unroll the loops; else 0.
template <class T, int H>
static void least_squares(const T* G, i64 m, i64 rows, const T* a, T* gamma) {
  static thread_local std::vector<double> room;
  const int held = H ? H : int(rows);
  double fixed[H ? H * (H + 2) : 1];
  if (!H && i64(room.size()) < held * (held + 2)) room.resize(held * (held + 2));
  double *A = H ? fixed : room.data(), *b = A + held * held, *inverse = b + held;
#pragma GCC unroll 8
  for (int i = 0; i < held; i++) {
#pragma GCC unroll 8
    for (int j = 0; j < i; j++) A[i * held + j] = G[i * m + j];
    double size = G[i * m + i];
    A[i * held + i] = size > 0 ? size * (1 + 10.0 * std::numeric_limits<T>::epsilon()) : 1.0;
    b[i] = a[i];
  }
  bool usable = true;
#pragma GCC unroll 8
  for (int k = 0; k < held; k++) {
    usable = usable && A[k * held + k] > 0;
    inverse[k] = 1 / A[k * held + k];
#pragma GCC unroll 8
    for (int i = k + 1; i < held; i++) {
      double l = A[i * held + k] * inverse[k];
#pragma GCC unroll 8
      for (int j = k + 1; j <= i; j++) A[i * held + j] -= l * A[j * held + k];
      b[i] -= l * b[k];
    }
  }
#pragma GCC unroll 8
  for (int k = held - 1; k >= 0; k--) {
#pragma GCC unroll 8
    for (int i = k + 1; i < held; i++) b[k] -= A[i * held + k] * b[i];
    b[k] *= inverse[k];
  }
  for (int i = 0; i < held; i++) gamma[i] = T(b[i]), usable = usable && finite(gamma[i]);
  if (!usable) std::fill(gamma, gamma + held, T(0));
}

// x = beta g + x and y = g - y, over a chunk.
template <class T>
static void complete(const T* g, T* x, T* y, T beta, i64 len) {
  constexpr int N = Vec<T>::N;
  i64 d = 0;
  for (; d + N <= len; d += N) {
    auto now = load(g + d);
    store(x + d, beta * now + load(x + d));
    store(y + d, now - load(y + d));
  }
  for (; d < len; d++) x[d] += beta * g[d], y[d] = g[d] - y[d];
}

// q = sum_j c[j] u[j]; kept = z where given; z += beta g + q; copy = g. q may be a row of u.
template <class T, int V>
static inline void mix_columns(const T* u, i64 D, i64 rows, const T* c, T beta, const T* g, T* z, T* kept, T* q, T* copy, i64 d) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type A[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) A[v] = broadcast(T(0));
  for (i64 j = 0; j < rows; j++) {
    auto cj = broadcast(c[j]);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) A[v] += cj * load(u + j * D + d + v * N);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) {
    i64 e = d + v * N;
    auto old = load(z + e), now = load(g + e);
    if (kept) store(kept + e, old);
    store(z + e, old + (beta * now + A[v]));
    store(q + e, A[v]);
    store(copy + e, now);
  }
}

// One step of Anderson's for sample b: z += beta g - sum_j gamma_j u_j with u_j = dz_j + beta dg_j, see anderson/aten.py. S holds m
// rows dg and m rows u (M = 2 m - 1), C the Gram matrix of the dg, m x m; eta is beta. What the next evaluation completes lies in the
// rows it will have, over the oldest: g, and the last step less beta g, which is - sum_j gamma_j u_j. So no iterate is stored.
template <class T>
static void mix(const Broyden<T>& s, Scratch<T>& w, i64 b, T* z, const T* g, bool keep, bool split) {
  constexpr int N = Vec<T>::N;
  i64 D = s.D, m = (s.M + 1) / 2, before = s.n[b], held = std::min(before, m), next = before % m;
  T *dg = s.S + b * (s.M + 1) * D, *u = dg + m * D, *G = s.C + b * s.M * s.ld;
  T *kept = keep ? s.z_best + b * D : nullptr, *gamma = w.y.data(), beta = T(s.eta);
  if (before > 0) {
    i64 slot = (before - 1) % m;
    over_chunks(D, s.threads, split, [&](i64 lo, i64 hi, i64) {
      complete<T>(g + lo, u + slot * D + lo, dg + slot * D + lo, beta, hi - lo);
    });
    row_dots<T, true>(w, dg, D, held, g, dg + slot * D, s.ld, s.threads, split);
    for (i64 j = 0; j < held; j++) G[slot * m + j] = G[j * m + slot] = w.r[j];
    static constexpr decltype(&least_squares<T, 0>) solvers[] = {
        least_squares<T, 1>, least_squares<T, 2>, least_squares<T, 3>, least_squares<T, 4>, least_squares<T, 5>,
        least_squares<T, 6>, least_squares<T, 7>, least_squares<T, 8>, least_squares<T, 0>};
    solvers[std::min<i64>(held, 9) - 1](G, m, held, w.a.data(), gamma);
    for (i64 j = 0; j < held; j++) gamma[j] = -gamma[j];
  }
  T *q = u + next * D, *copy = dg + next * D;
  over_chunks(D, s.threads, split, [&](i64 lo, i64 hi, i64) {
    i64 d = lo;
    for (; d + 8 * N <= hi; d += 8 * N) mix_columns<T, 8>(u, D, held, gamma, beta, g, z, kept, q, copy, d);
    for (; d + N <= hi; d += N) mix_columns<T, 1>(u, D, held, gamma, beta, g, z, kept, q, copy, d);
    for (; d < hi; d++) {
      T p = 0;
      for (i64 j = 0; j < held; j++) p += gamma[j] * u[j * D + d];
      if (kept) kept[d] = z[d];
      z[d] += beta * g[d] + p;
      q[d] = p, copy[d] = g[d];
    }
  });
  s.n[b] = int32_t(before + 1);
}

// What iteration/aten.py's `observe` does, for one sample: whether it goes on. norm and ceiling: |g|, and what it is measured
// against; f: body(z) where that is known.
template <class T>
static bool observe(const Broyden<T>& s, i64 b, T* z, T stop, T scale, i64 evaluation, bool last, bool& improved, T norm = 0,
                    T ceiling = std::numeric_limits<T>::infinity(), const T* f = nullptr) {
  T *best = s.best + b, *z_best = s.z_best + b * s.D;
  Code code = classify<T>({stop, scale, norm, ceiling, last}, T(s.tol), T(s.floor), *best, s.mark[b], s.stall[b], improved);
  if (code == RUNNING) return true;
  if (code == NONFINITE) {
    std::memcpy(z, z_best, sizeof(T) * s.D);
    if (f && !finite(*best)) std::memcpy(z_best, f, sizeof(T) * s.D);  // none was finite: what a plain iteration has
    if (s.n[b] > 0) s.n[b]--;  // the step that led here is no good to anybody
  }
  if (improved) std::memcpy(z_best, z, sizeof(T) * s.D);
  s.done[b] = code;
  s.iterations[b] = int32_t(evaluation);
  if (s.solve_info) s.solve_info[3 * b] = float(*best), s.solve_info[3 * b + 1] = float(evaluation), s.solve_info[3 * b + 2] = float(code);
  return false;
}

// One sample: residual, stopping test, step. Returns whether it still runs. moved: what to move by in place of f - z, where another
// inverse than -I begins.
template <class T>
static bool sample(const Broyden<T>& s, i64 b, T* z, const T* f, const T* norms, const T* moved, i64 evaluation, i64 flags,
                   bool split) {
  static thread_local Scratch<T> w;
  w.fit(s.ld, chunks_of(s.D));
  i64 D = s.D, n = s.n[b];
  bool plain = flags & PLAIN, mixing = flags & ANDERSON;
  if ((n > s.M || mixing) && i64(w.row.size()) < D) w.row.resize(D);
  T* g = plain ? nullptr : n > s.M || mixing ? w.row.data() : s.S + (b * (s.M + 1) + n) * D;
  T stop, scale = 1, norm = 0, ceiling = std::numeric_limits<T>::infinity();
  if (flags & RESIDUAL_GIVEN) {
    std::memcpy(g, f, sizeof(T) * D);
    stop = norms ? norms[b] : T(0);
  } else {
    i64 count = chunks_of(D);
    T gg = 0, ff = 0;
    T* parts = w.parts.data();
    over_chunks(D, s.threads, split, [&](i64 lo, i64 hi, i64 c) {
      if (plain) residual<T, false>(f + lo, z + lo, nullptr, hi - lo, parts[2 * c], parts[2 * c + 1]);
      else residual<T, true>(f + lo, z + lo, g + lo, hi - lo, parts[2 * c], parts[2 * c + 1]);
    });
    for (i64 c = 0; c < count; c++) gg += parts[2 * c], ff += parts[2 * c + 1];
    stop = norms ? norms[b] : std::sqrt(gg);
    if (!norms) scale = std::sqrt(ff) + T(1e-9);
    if (!norms) {  // Progress.ceiling_at in state.py
      double slack = s.floor > 0.1 ? 4 * s.floor : 20 * s.floor;
      if (evaluation == 1 && s.relative) s.ceiling[b] = std::max(stop, T(std::max(20 * s.tol, slack)) * scale);
      if (evaluation == 1 && !s.relative) s.ceiling[b] = std::max(std::max(stop, T(slack) * scale), T(10 * s.tol));
      norm = std::max(stop, 2 * std::numeric_limits<T>::epsilon() * scale), ceiling = s.ceiling[b];
      if (s.relative) stop /= scale, scale = 1;
    }
  }
  bool improved = false;
  if (!(flags & NO_OBSERVATION)) {
    const T* image = flags & RESIDUAL_GIVEN ? nullptr : f;
    if (!observe<T>(s, b, z, stop, scale, evaluation, flags & LAST, improved, norm, ceiling, image)) return false;
  }
  if (plain) {
    if (improved) std::memcpy(s.z_best + b * D, z, sizeof(T) * D);
    std::memcpy(z, f, sizeof(T) * D);
    return true;
  }
  if (mixing) {
    mix<T>(s, w, b, z, g, improved, split);
    return true;
  }
  if (moved) std::memcpy(g, moved, sizeof(T) * D);
  advance<T>(s, w, b, z, g, improved, split);
  return true;
}

template <class T>
static i64 step(Broyden<T>* s, T* z, const T* f, const T* norms, i64 evaluation, i64 flags) {
  i64 active = 0;
  const T* moved = flags & PRECONDITIONED ? norms : nullptr;  // (B, D)
  if (moved) norms = nullptr;
  bool rows = s->B >= s->threads;  // else the threads share the chunks of one row after the other
#pragma omp parallel for num_threads(s->threads) reduction(+ : active) if (s->threads > 1 && rows)
  for (i64 b = 0; b < s->B; b++)
    if (s->done[b] == RUNNING)
      active += sample<T>(*s, b, z + b * s->D, f + b * s->D, norms, moved ? moved + b * s->D : nullptr, evaluation, flags,
                          s->threads > 1 && !rows);
  if (!active) s->converged = std::count(s->done, s->done + s->B, int8_t(CONVERGED));
  return active;
}

// Nothing is known of any sample yet; where z0 is given, it is the best iterate so far, and z, the one to begin with.
template <class T>
static void start(const Broyden<T>* s, const T* z0, T* z) {
  if (z0) std::memcpy(s->z_best, z0, sizeof(T) * s->B * s->D);
  if (z0) std::memcpy(z, z0, sizeof(T) * s->B * s->D);
  for (i64 b = 0; b < s->B; b++) {
    s->n[b] = s->iterations[b] = s->stall[b] = 0;
    s->done[b] = RUNNING;
    s->best[b] = s->mark[b] = std::numeric_limits<T>::infinity();
    if (s->ceiling) s->ceiling[b] = std::numeric_limits<T>::infinity();
  }
}

extern "C" {
void broyden_start_f32(const Broyden<float>* s, const float* z0, float* z) { start(s, z0, z); }
void broyden_start_f64(const Broyden<double>* s, const double* z0, double* z) { start(s, z0, z); }
int64_t broyden_step_f32(Broyden<float>* s, float* z, const float* f, const float* norms, int64_t evaluation,
                         int64_t flags) {
  return step(s, z, f, norms, evaluation, flags);
}
int64_t broyden_step_f64(Broyden<double>* s, double* z, const double* f, const double* norms, int64_t evaluation,
                         int64_t flags) {
  return step(s, z, f, norms, evaluation, flags);
}
}
