// The stopping rule for one sample; reference.py is the one to read. Constants as in state.py.

#include <cmath>
#include <cstdint>
#include <limits>

enum Code : int8_t { RUNNING, CONVERGED, FLOOR, MAX_ITER, NONFINITE };

template <class T>
static inline bool finite(T x) {
  return std::fabs(x) <= std::numeric_limits<T>::max();
}

// One residual: `stop` is what the tolerance is for, `scale` what the floor is relative to; `norm` is |g|, `ceiling` what that must
// have fallen below.
template <class T>
struct Residual {
  T stop, scale, norm, ceiling;
  bool last;
};

template <class T>
static inline Code classify(const Residual<T>& r, T tol, T floor, T& best, T& mark, int32_t& stall, bool& improved) {
  improved = r.stop < best;
  if (improved) best = r.stop;
  if (!finite(r.stop)) return NONFINITE;
  Code code = r.last ? MAX_ITER : RUNNING;
  if (floor > 0) {
    bool below = best < floor * r.scale, gained = below && best < T(0.9) * mark;
    if (gained) mark = best;
    stall = gained || !below ? 0 : stall + 1;
    if (stall >= 5 && r.norm <= T(floor > T(0.1) ? 0.5 : 0.1) * r.ceiling) code = FLOOR;
  }
  return r.stop <= tol && r.norm <= T(0.1) * r.ceiling ? CONVERGED : code;
}
