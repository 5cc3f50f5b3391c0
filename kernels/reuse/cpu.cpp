// Products with the stored factors, and the adjoint residual, for a CPU. Follows broyden/cpu.cpp in one translation unit.

// y = -H^T x = x + sum_j d_j s_j, d = C^T b, b_j = s_{j+1} . x for the n - 1 pairs of each sample.
template <class T>
static void transpose(const Broyden<T>* s, const T* x, T* y) {
  bool rows = s->B >= s->threads;
#pragma omp parallel for num_threads(s->threads) if (s->threads > 1 && rows)
  for (i64 b = 0; b < s->B; b++) {
    static thread_local Scratch<T> w;
    i64 D = s->D, ld = s->ld, pairs = s->n[b] - 1;
    bool split = s->threads > 1 && !rows;
    w.fit(ld, chunks_of(D));
    const T *S = s->S + b * (s->M + 1) * D, *C = s->C + b * s->M * ld, *xb = x + b * D;
    T* yb = y + b * D;
    std::memcpy(yb, xb, sizeof(T) * D);
    if (pairs < 1) continue;
    row_dots<T, false>(w, S + D, D, pairs, xb, xb, ld, s->threads, split);
    constexpr int N = Vec<T>::N;
    T *a = w.a.data(), *d = w.t.data();
    for (i64 v = 0; v < ld; v += N) store(d + v, typename Vec<T>::type{});
    for (i64 j = 0; j < pairs; j++) {
      auto bj = broadcast(a[j]);
      for (i64 v = 0; v <= j; v += N) store(d + v, load(d + v) + bj * load(C + j * ld + v));
    }
    over_chunks(D, s->threads, split,
                [&](i64 lo, i64 hi, i64) { update<T>(S, D, pairs, d, T(1), yb, nullptr, nullptr, lo, hi); });
  }
}

// r = q + jw - w, relative[b] = |r_b| / scale[b], and the norm of all; samples with scale 0 count as solved.
template <class T>
static double adjoint_residual(i64 B, i64 D, const T* q, const T* jw, const T* w, const T* scale, T* r, T* relative) {
  constexpr int N = Vec<T>::N;
  double all = 0;
  for (i64 b = 0; b < B; b++) {
    typename Vec<T>::type acc = {};
    i64 d = b * D, end = d + D;
    for (; d + N <= end; d += N) {
      auto v = load(q + d) + load(jw + d) - load(w + d);
      store(r + d, v);
      acc += v * v;
    }
    T total = sum<T>(acc);
    for (; d < end; d++) {
      T v = q[d] + jw[d] - w[d];
      r[d] = v;
      total += v * v;
    }
    relative[b] = scale[b] > 0 ? std::sqrt(total) / scale[b] : T(0);
    if (scale[b] > 0) all += double(total);
  }
  return std::sqrt(all);
}

extern "C" {
void reuse_transpose_f32(const Broyden<float>* s, const float* x, float* y) { transpose(s, x, y); }
void reuse_transpose_f64(const Broyden<double>* s, const double* x, double* y) { transpose(s, x, y); }
double adjoint_residual_f32(int64_t B, int64_t D, const float* q, const float* jw, const float* w, const float* scale, float* r,
                            float* relative) {
  return adjoint_residual(B, D, q, jw, w, scale, r, relative);
}
double adjoint_residual_f64(int64_t B, int64_t D, const double* q, const double* jw, const double* w, const double* scale,
                            double* r, double* relative) {
  return adjoint_residual(B, D, q, jw, w, scale, r, relative);
}
}
