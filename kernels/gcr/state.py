"""What the adjoint iteration keeps, and what it computes.

Flexible GCR (Eisenstat, Elman & Schultz 1983; equal to GMRES with a right preconditioner in exact arithmetic) on A w = q with
A = I - J^T, in a form whose every vector-Jacobian product (VJP) is taken at an estimate that may be returned:

    w = x + M r                             the trial: minimal-residual iterate x with residual r, and one step of M, which is
                                            (I - J^T)^-1 as far as the forward solve knows it
    r(w) = q + J^T w - w                    the VJP gives the trial's true residual: small enough, and w is the answer
    z = w - x,  A z = r - r(w)              ... and the image of the step, hence one more direction of the basis
    orthonormalise A z against the images, z along with it;  x += alpha z,  r -= alpha A z,  alpha = (A z) . r
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..iteration import Progress
from ..recycle import Shared
from ..reuse.multisecant import Multisecant

# A new image counts as dependent on the basis when orthogonalising leaves less than this many eps of it.
DEPENDENT_EPS = 100.0


@dataclass(kw_only=True, eq=False)
class GcrState(Progress):
    """State of the adjoint iteration of a batch; of :class:`Progress`, `z_best` is the best trial and q before there is one.

    Attributes:
        q: (B, D) cotangents.
        norms: (B,) |q_b|.
        batch_norm: |q| over the batch; 0 where it lies on the device.
        operator: the preconditioner M; None is the identity.
        x, r: (B, D) minimal-residual iterate and its residual, by recursion.
        w: (B, D) the trial: where the next VJP is to be taken. Kept once the sample stops.
        basis: (B, 2, m, D) orthonormal images A z_j, and the directions z_j; on a GPU rows are padded.
        n: (B,) int32 pairs in the basis of each sample.
        true_residual: (B, D) r(w) of the last VJP; C++ does not keep it.
        residuals: (B,) |r(w)| / |q| of the last VJP, 0 where q = 0.
        batch: |r(w)| / |q| over the batch, of the last VJP; where nothing may synchronise, when the host last looked.
        count: pairs in the basis of every sample that still runs (the lockstep implementation's own).
        converged: whether the batch's residual reached `tol`.
        shared: P, which comes before M in every trial: w = x + P M r.
        spare: (B, D) for the step that it is applied to, in ATen; None where the launches apply it themselves.
    """

    q: Tensor
    norms: Tensor
    batch_norm: float
    operator: Multisecant | None
    x: Tensor
    r: Tensor
    w: Tensor
    basis: Tensor
    n: Tensor
    true_residual: Tensor
    residuals: Tensor
    batch: float = 0.0
    count: int = 0
    converged: bool = False
    shared: Shared | None = None
    spare: Tensor | None = None

    def unwatched(self) -> None:
        """Do not ask a device how far it is: the iteration goes on to its cap, as somebody else's capture needs."""

    @property
    def needed(self) -> int:
        """The VJP at which the iteration ended; more may have been observed before the host looked."""
        return self.evaluations

    @property
    def memory(self) -> int:
        """m, the number of pairs that fit before the basis is dropped."""
        return self.basis.shape[2]
