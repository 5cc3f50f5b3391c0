// Vectors as wide as the machine's registers, in the compiler's own extension: x86 and Arm, gcc and clang, no intrinsics of one
// machine. (Wider ones work everywhere, but gcc keeps them on the stack: the 64-byte build was 2 to 5 times slower on AVX2.)
// Inductor's flags switch the loop vectoriser off, so the loops below say what they want.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

using i64 = int64_t;

#if defined(__AVX512F__)
#define DEQ_VECTOR_BYTES 64
#elif defined(__AVX__)
#define DEQ_VECTOR_BYTES 32
#else
#define DEQ_VECTOR_BYTES 16
#endif

template <class T>
struct Vec {
  static constexpr int N = DEQ_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(DEQ_VECTOR_BYTES)));
};

template <class T>
static inline typename Vec<T>::type load(const T* p) {
  typename Vec<T>::type v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
static inline void store(T* p, typename Vec<T>::type v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
static inline typename Vec<T>::type broadcast(T x) {
  return x - typename Vec<T>::type{};  // x + {} would turn -0 into 0
}

// Sum of the lanes, halves first.
template <class T>
static inline T sum(typename Vec<T>::type v) {
  typedef T quarter __attribute__((vector_size(16)));
  constexpr int Q = DEQ_VECTOR_BYTES / 16;
  quarter q[Q];
  std::memcpy(q, &v, sizeof v);
#pragma GCC unroll 4
  for (int half = Q / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) q[i] += q[i + half];
  quarter b = q[0];
  T s = b[0] + b[1];
  if (sizeof(T) == 4) s = (b[0] + b[2 % (16 / sizeof(T))]) + (b[1] + b[3 % (16 / sizeof(T))]);
  return s;
}

// The sums of the lanes of four vectors, out[i] = sum(v[i]) to the last bit, in a few shuffles of whole vectors: one at a time they
// cost more than the products they sum, and scalar stores would hold up the vector loads that follow.
static inline void sum_four(const Vec<float>::type* v, float* out) {
#if defined(__clang__) || __GNUC__ >= 12
  typedef float quarter __attribute__((vector_size(16)));
  constexpr int Q = DEQ_VECTOR_BYTES / 16;
  quarter b[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    quarter q[Q];
    std::memcpy(q, v + i, sizeof q);
#pragma GCC unroll 4
    for (int half = Q / 2; half > 0; half /= 2)
      for (int j = 0; j < half; j++) q[j] += q[j + half];
    b[i] = q[0];
  }
  auto pairs = [](quarter x, quarter y) -> quarter {  // x0 + x2, y0 + y2, x1 + x3, y1 + y3
    return __builtin_shufflevector(x, y, 0, 4, 1, 5) + __builtin_shufflevector(x, y, 2, 6, 3, 7);
  };
  quarter low = pairs(b[0], b[1]), high = pairs(b[2], b[3]);
  low = __builtin_shufflevector(low, high, 0, 1, 4, 5) + __builtin_shufflevector(low, high, 2, 3, 6, 7);
  std::memcpy(out, &low, sizeof low);
#else
  for (int i = 0; i < 4; i++) out[i] = sum<float>(v[i]);
#endif
}

static inline void sum_four(const Vec<double>::type* v, double* out) {
  for (int i = 0; i < 4; i++) out[i] = sum<double>(v[i]);
}

// Elements of a row that are worked on at a time: a chunk of every operand stays in the second-level cache. Sums run over
// chunks in order, so that splitting a row over threads changes no bit.
static constexpr i64 CHUNK = 8192;

static inline i64 chunks_of(i64 D) { return D > CHUNK ? (D + CHUNK - 1) / CHUNK : 1; }

// a[i] = S[i] . g and, where r is given, r[i] = S[i] . s for R rows of S at a time; row stride D, length len.
template <class T, int R, bool TWO>
static inline void dots_rows(const T* S, i64 D, i64 len, const T* g, const T* s, T* a, T* r) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type A[R], Q[R];
  for (int i = 0; i < R; i++) A[i] = Q[i] = broadcast(T(0));  // braces would clear them by a string instruction, 30 cycles each
  i64 d = 0;
  for (; d + N <= len; d += N) {
    auto x = load(g + d);
    auto y = TWO ? load(s + d) : x;
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      auto v = load(S + i * D + d);
      A[i] += v * x;
      if (TWO) Q[i] += v * y;
    }
  }
  if (d == len && R % 4 == 0) {
#pragma GCC unroll 2
    for (int i = 0; i + 4 <= R; i += 4) {
      sum_four(A + i, a + i);
      if (TWO) sum_four(Q + i, r + i);
    }
    return;
  }
  for (int i = 0; i < R; i++) {
    T t = sum<T>(A[i]), u = TWO ? sum<T>(Q[i]) : T(0);
    for (i64 e = d; e < len; e++) {
      t += S[i * D + e] * g[e];
      if (TWO) u += S[i * D + e] * s[e];
    }
    a[i] = t;
    if (TWO) r[i] = u;
  }
}

template <class T, bool TWO>
static void dots(const T* S, i64 D, i64 len, i64 rows, const T* g, const T* s, T* a, T* r) {
  constexpr int R = TWO ? 4 : 8;
  i64 j = 0;
  for (; j + R <= rows; j += R) dots_rows<T, R, TWO>(S + j * D, D, len, g, s, a + j, r + j);
  for (; j + 2 <= rows; j += 2) dots_rows<T, 2, TWO>(S + j * D, D, len, g, s, a + j, r + j);
  if (j < rows) dots_rows<T, 1, TWO>(S + j * D, D, len, g, s, a + j, r + j);
}

// What `algebra` does for U vectors of columns from v on, whose sums stay in registers.
template <class T, int U>
static inline void algebra_columns(const T* C, i64 ld, i64 n, const T* a, const T* r, T* t, T* part, i64 v) {
  constexpr int N = Vec<T>::N;
  typename Vec<T>::type A[U], S[U];
  for (int u = 0; u < U; u++) A[u] = load(a + v + u * N), S[u] = broadcast(T(0));
  for (i64 j = v; j < n; j++) {  // the rows above are zero here
    auto rj = broadcast(r[j]), p = v ? load(part + j * N) : broadcast(T(0));
    for (int u = 0; u < U; u++) {
      auto c = load(C + j * ld + v + u * N);
      S[u] += rj * c;
      p += c * A[u];
    }
    store(part + j * N, p);
  }
  for (int u = 0; u < U; u++) store(t + v + u * N, S[u]);
}

// The n x n algebra of one row: y[j] = C[j] . a for j < n, and t = sum_j r[j] C[j]. C has row stride ld, a multiple of the
// vector's length, and zeros right of its diagonal; a is padded with zeros to ld, y and t have room for ld, part for n vectors.
template <class T>
static void algebra(const T* C, i64 ld, i64 n, const T* a, const T* r, T* y, T* t, T* part) {
  constexpr int N = Vec<T>::N;
  i64 v = 0;
  for (; v + 2 * N <= ld; v += 2 * N) algebra_columns<T, 2>(C, ld, n, a, r, t, part, v);
  if (v < ld) algebra_columns<T, 1>(C, ld, n, a, r, t, part, v);
  i64 j = 0;
  for (; j + 4 <= n; j += 4) {
    typename Vec<T>::type sums[4];
    std::memcpy(sums, part + j * N, sizeof sums);
    sum_four(sums, y + j);
  }
  for (; j < n; j++) y[j] = sum<T>(load(part + j * N));
}
