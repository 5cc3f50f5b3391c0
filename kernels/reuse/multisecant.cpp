// The weights of the type-II operator from the stored steps, one sample at a time. Same mathematics as multisecant.py, whose
// docstring has the formulas; matrices are rows of ld numbers, zero where nothing is said, so that loops run over whole vectors.

template <class T>
struct Algebra {
  std::vector<T> G, R, Q, K, E, c, parts;  // Gram matrix; coefficients; R G; ridge system, then its factor; right-hand sides
  void fit(i64 rows, i64 ld, i64 chunks) {
    i64 need = (rows + 1) * ld;
    if (i64(G.size()) < need)
      for (auto* m : {&G, &R, &Q, &K, &E, &c}) m->resize(need);
    if (i64(parts.size()) < chunks * need) parts.resize(chunks * need);
  }
};

template <class T>
static inline void clear(T* x, i64 ld) {
  for (i64 v = 0; v < ld; v += Vec<T>::N) store(x + v, typename Vec<T>::type{});
}

// out = scale (init + sign sum_j c[j] rows[j]) over U vectors of columns, which stay in registers; two chains of additions.
template <class T, int U>
static inline void combine_columns(const T* c, i64 stride, i64 count, const T* rows, i64 ld, const T* init, T sign, T scale,
                                   T* out) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type A[U], B[U];
  for (int u = 0; u < U; u++) A[u] = B[u] = broadcast(T(0));
  i64 j = 0;
  for (; j + 2 <= count; j += 2) {
    auto x = broadcast(c[j * stride]), y = broadcast(c[(j + 1) * stride]);
    const T* r = rows + j * ld;
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      A[u] += x * load(r + u * N);
      B[u] += y * load(r + ld + u * N);
    }
  }
  if (j < count) {
    auto x = broadcast(c[j * stride]);
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) A[u] += x * load(rows + j * ld + u * N);
  }
#pragma GCC unroll 4
  for (int u = 0; u < U; u++) {
    auto total = (A[u] + B[u]) * sign;
    store(out + u * N, (init ? load(init + u * N) + total : total) * scale);
  }
}

// The same over w numbers; out may be init, and no row that is read.
template <class T>
static void combine(const T* c, i64 stride, i64 count, const T* rows, i64 ld, const T* init, T sign, T scale, T* out, i64 w) {
  constexpr int N = Vec<T>::N;
  i64 v = 0;
  for (; v + 2 * N <= w; v += 2 * N)
    combine_columns<T, 2>(c, stride, count, rows + v, ld, init ? init + v : nullptr, sign, scale, out + v);
  if (v < w) combine_columns<T, 1>(c, stride, count, rows + v, ld, init ? init + v : nullptr, sign, scale, out + v);
}

template <class T>
static inline T dot_row(const T* x, const T* y, i64 ld) {
  typename Vec<T>::type acc = {};
  for (i64 v = 0; v < ld; v += Vec<T>::N) acc += load(x + v) * load(y + v);
  return sum<T>(acc);
}

// G = S S^T of n rows, both triangles. Chunk by chunk, so that a chunk of all rows stays in the cache; sums in the order of chunks.
template <class T>
static void gram(Algebra<T>& m, const T* S, i64 D, i64 n, i64 ld, i64 threads, bool split) {
  i64 count = chunks_of(D), size = n * ld;
  T* G = m.G.data();
  over_chunks(D, threads, split, [&](i64 lo, i64 hi, i64 c) {
    T* out = count == 1 ? G : m.parts.data() + c * size;
    for (i64 i = 0; i < n; i++) {
      clear(out + i * ld, ld);
      dots<T, false>(S + lo, D, hi - lo, i + 1, S + i * D + lo, S + i * D + lo, out + i * ld, out + i * ld);
    }
  });
  if (count > 1)
    for (i64 i = 0; i < n; i++) {
      clear(G + i * ld, ld);
      for (i64 c = 0; c < count; c++)
        for (i64 v = 0; v <= i; v++) G[i * ld + v] += m.parts[c * size + i * ld + v];
    }
  for (i64 i = 0; i < n; i++)
    for (i64 j = 0; j < i; j++) G[j * ld + i] = G[i * ld + j];
}

// V = -W^T of one sample with n steps; false where it is not finite. All matrices are made row after row.
template <class T>
static bool weights(Algebra<T>& m, const T* kappa, i64 stride, i64 n, i64 ld, i64 skip, T ridge, T ridge_far, T* V) {
  constexpr int N = Vec<T>::N;
  T *G = m.G.data(), *R = m.R.data(), *Q = m.Q.data(), *K = m.K.data(), *E = m.E.data(), *c = m.c.data(), *far = c + ld;
  i64 pairs = n - 1, w = (n + N - 1) / N * N;  // w: numbers of a row that are in use
  // R[k+1][j+1] = ((I + diag(kappa) triu(G[:-1, 1:]))^-1)[j][k], a lower triangle; R[0] = e_0
  clear(R, w);
  R[0] = 1;
  for (i64 k = 0; k < pairs; k++) {
    T* row = R + (k + 1) * ld;
    for (i64 j = 0; j < k; j++) c[j] = kappa[j * stride] * G[(k + 1) * ld + j];
    clear(row, w);
    row[k + 1] = 1;
    T pivot = 1 + kappa[k * stride] * G[(k + 1) * ld + k];
    combine<T>(c, 1, k, R + ld, ld, row, T(-1), 1 / pivot, row, w);
  }
  // Q = R G, far[k] = |g_k|
  for (i64 k = 0; k < n; k++) {
    combine<T>(R + k * ld, 1, k + 1, G, ld, nullptr, T(1), T(1), Q + k * ld, w);
    T square = dot_row<T>(Q + k * ld, R + k * ld, w);
    far[k] = square > 0 ? std::sqrt(square) : T(0);
  }
  // T over R and T G over Q, in place; E = T + 1 / |s|; T^T over G, which is not needed any more but for its diagonal
  T largest = 0;
  for (i64 k = 0; k < pairs; k++) {
    T square = G[k * ld + k];
    bool live = square > 0 && k >= skip;
    T inverse = live ? 1 / std::sqrt(square) : T(0);
    far[k] = live ? (far[k] > far[k + 1] ? far[k] : far[k + 1]) : T(-1);  // -1: this pair is left out
    if (far[k] > largest) largest = far[k];
    for (i64 v = 0; v < w; v += N) {
      store(R + k * ld + v, (load(R + (k + 1) * ld + v) - load(R + k * ld + v)) * inverse);
      store(Q + k * ld + v, (load(Q + (k + 1) * ld + v) - load(Q + k * ld + v)) * inverse);
      store(E + k * ld + v, load(R + k * ld + v));
    }
    E[k * ld + k] += inverse;
  }
  for (i64 i = 0; i < n; i++) {
    clear(G + i * ld, w);
    for (i64 k = i > 0 ? i - 1 : 0; k < pairs; k++) G[i * ld + k] = R[k * ld + i];
  }
  // K = T G T^T + Lambda; a pair that is left out has a row and a column of zeros, and a ridge of 1
  for (i64 i = 0; i < pairs; i++) {
    T* row = K + i * ld;
    combine<T>(Q + i * ld, 1, n, G, ld, nullptr, T(1), T(1), row, w);
    T x = row[i];
    bool live = far[i] >= 0;
    row[i] += live ? (x > 1 ? x : T(1)) * (ridge + (largest > 0 ? ridge_far * far[i] / largest : T(0))) : T(1);
  }
  // Cholesky, K = U^T U: U over the upper triangle of K
  for (i64 k = 0; k < pairs; k++) {
    T* row = K + k * ld;
    combine<T>(K + k, ld, k, K, ld, row, T(-1), T(1), row, w);
    if (!(row[k] > 0)) return false;
    T inverse = 1 / std::sqrt(row[k]);
    for (i64 v = k / N * N; v < w; v += N) store(row + v, load(row + v) * inverse);
    for (i64 v = 0; v < k; v++) row[v] = 0;
    c[k] = inverse;
  }
  for (i64 i = 0; i < pairs; i++) combine<T>(K + i, ld, i, E, ld, E + i * ld, T(-1), c[i], E + i * ld, w);
  for (i64 i = pairs - 1; i >= 0; i--)
    combine<T>(K + i * ld + i + 1, 1, pairs - 1 - i, E + (i + 1) * ld, ld, E + i * ld, T(-1), c[i], E + i * ld, w);
  typename Vec<T>::type check = {};
  for (i64 j = 0; j < n; j++) {  // V[j] = -sum_k E[k][j] T[k]
    combine<T>(E + j, ld, pairs, R, ld, nullptr, T(-1), T(1), V + j * ld, w);
    for (i64 v = 0; v < w; v += N) check += load(V + j * ld + v) * T(0);
    clear(V + j * ld + w, ld - w);
  }
  return sum<T>(check) == 0;
}

// V (B, M+1, vld) for all samples; rows from n on are not written.
template <class T>
static void multisecant(const Broyden<T>* s, T* V, i64 vld, i64 skip, double ridge, double ridge_far) {
  i64 D = s->D, slots = s->M + 1;
  over_samples<T>(s->B, D, vld, s->threads, [&](Scratch<T>&, i64 b, bool split) {
    static thread_local Algebra<T> m;
    i64 n = s->n[b];
    T* out = V + b * slots * vld;
    bool good = n >= 2;
    if (good) {
      m.fit(n, vld, chunks_of(D));
      gram<T>(m, s->S + b * slots * D, D, n, vld, s->threads, split);
      good = weights<T>(m, s->C + b * s->M * s->ld, s->ld + 1, n, vld, skip, T(ridge), T(ridge_far), out);
    }
    if (!good)
      for (i64 j = 0; j < n; j++) clear(out + j * vld, vld);
  });
}

// The operator M = I + S^T V^T S of a forward solve; S null: the identity.
template <class T>
struct Operator {
  i64 slots, ld;
  const T *S, *V;    // (B, slots, D), (B, slots, ld)
  const int32_t* n;  // (B,)
};

// y += (M - I) x
template <class T>
static void add_operator(Scratch<T>& w, const Operator<T>* m, i64 b, i64 D, const T* x, T* y, i64 threads, bool split) {
  if (!m->S) return;
  const T *S = m->S + b * m->slots * D, *V = m->V + b * m->slots * m->ld;
  add_rows<T>(w, S, S, D, m->n[b] < 2 ? 0 : m->n[b], V, m->ld, false, x, y, threads, split);
}

template <class T>
static void multisecant_apply(const Operator<T>* m, i64 B, i64 D, i64 threads, const T* x, T* y) {
  over_samples<T>(B, D, m->ld, threads, [&](Scratch<T>& w, i64 b, bool split) {
    std::memcpy(y + b * D, x + b * D, sizeof(T) * D);
    add_operator<T>(w, m, b, D, x + b * D, y + b * D, threads, split);
  });
}

#define DEQ_MULTISECANT(SUFFIX, T)                                                                                  \
  void multisecant_##SUFFIX(const Broyden<T>* s, T* V, int64_t ld, int64_t skip, double ridge, double ridge_far) {  \
    multisecant(s, V, ld, skip, ridge, ridge_far);                                                                  \
  }                                                                                                                 \
  void multisecant_apply_##SUFFIX(const Operator<T>* m, int64_t B, int64_t D, int64_t threads, const T* x, T* y) {  \
    multisecant_apply(m, B, D, threads, x, y);                                                                      \
  }
extern "C" {
DEQ_MULTISECANT(f32, float)
DEQ_MULTISECANT(f64, double)
}
