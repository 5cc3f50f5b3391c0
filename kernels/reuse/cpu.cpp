// Products with the stored factors, for a CPU. Follows broyden/cpu.cpp in one translation unit.

// y += sum_i d_i to_i, d = V^T b, b_j = from_j . x for `rows` rows of one sample; V has row stride ld, and is lower triangular
// where `lower` says so. Columns of V up to the next whole vector are finite.
template <class T>
static void add_rows(Scratch<T>& w, const T* from, const T* to, i64 D, i64 rows, const T* V, i64 ld, bool lower, const T* x,
                     T* y, i64 threads, bool split) {
  if (rows < 1) return;
  row_dots<T, false>(w, from, D, rows, x, x, ld, threads, split);
  constexpr int N = Vec<T>::N;
  T *a = w.a.data(), *d = w.t.data();
  for (i64 v = 0; v < ld; v += N) store(d + v, typename Vec<T>::type{});
  for (i64 j = 0; j < rows; j++) {
    auto bj = broadcast(a[j]);
    for (i64 v = 0; v <= (lower ? j : rows - 1); v += N) store(d + v, load(d + v) + bj * load(V + j * ld + v));
  }
  over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64) { update<T>(to, D, rows, d, T(1), y, nullptr, nullptr, lo, hi); });
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

// Call work(scratch, b, split) for the samples, over threads; where there are fewer samples than threads, the threads share a row.
template <class T, class F>
static void over_samples(i64 B, i64 D, i64 ld, i64 threads, F work) {
  bool rows = B >= threads;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows)
  for (i64 b = 0; b < B; b++) {
    static thread_local Scratch<T> w;
    w.fit(ld, chunks_of(D));
    work(w, b, threads > 1 && !rows);
  }
}

// y = -H^T x = x + sum_j d_j s_j, d = C^T b, b_j = s_{j+1} . x for the n - 1 pairs of each sample.
template <class T>
static void transpose(const Broyden<T>* s, const T* x, T* y) {
  i64 D = s->D, ld = s->ld;
  over_samples<T>(s->B, D, ld, s->threads, [&](Scratch<T>& w, i64 b, bool split) {
    const T *S = s->S + b * (s->M + 1) * D, *C = s->C + b * s->M * ld;
    std::memcpy(y + b * D, x + b * D, sizeof(T) * D);
    add_rows<T>(w, S + D, S, D, s->n[b] - 1, C, ld, true, x + b * D, y + b * D, s->threads, split);
  });
}

extern "C" {
void reuse_transpose_f32(const Broyden<float>* s, const float* x, float* y) { transpose(s, x, y); }
void reuse_transpose_f64(const Broyden<double>* s, const double* x, double* y) { transpose(s, x, y); }
}
