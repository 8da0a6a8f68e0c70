// SPDX-License-Identifier: Apache-2.0
// What one thread of the loss works in.
#pragma once

#include "group.h"

namespace MSDKERN_NAMESPACE {

struct ScratchSizes {
    int64_t samples;  // worked on together
    int exits, rows;  // rows: exits and external teachers
    int arrays;       // of exponentials, per row
    // Classes, in whole vectors: of exponentials, of a step's logits, of a target's mass.
    int64_t kept, window, mass;
};

template <class Real>
class Scratch {
    typedef VecOf<Real> V;
    static const int W = kLanes<Real>;

    // The parts one after another, each of whole vectors: [samples][rows][arrays][kept]
    // exponentials, [rows][window] logits where the sweeps cannot read the caller's, the target's
    // mass on [classes], W and D [exits][rows], and two vectors per row that are to be folded. The
    // group's scalars follow.
    enum Part { kExps, kLogits, kMass, kWeight, kMatrix, kFoldT, kFoldOne, kParts };
    static int64_t size(const ScratchSizes &s, int part) {
        const int64_t matrix = (s.exits * s.rows + W - 1) / W * W;
        const int64_t folded = (s.samples * s.rows + W - 1) / W * W * W;
        const int64_t sizes[kParts] = {s.samples * s.rows * s.arrays * s.kept,
                                       s.rows * s.window,
                                       s.mass,
                                       matrix,
                                       matrix,
                                       folded,
                                       folded};
        return sizes[part];
    }
    static int64_t offset(const ScratchSizes &s, int part) {
        int64_t at = 0;
        for (int p = 0; p < part; ++p) at += size(s, p);
        return at;
    }

    const int64_t row_size, rows, kept;

 public:
    Real *const exps, *const logits, *const mass, *const weight, *const matrix;
    V *const fold_t, *const fold_one;
    const Group<Real> group;

    static size_t bytes(const ScratchSizes &s) {
        return size_t(offset(s, kParts)) * sizeof(Real) + Group<Real>::bytes(s.samples * s.rows);
    }
    Scratch(void *memory, const ScratchSizes &s)
        : row_size(s.arrays * s.kept),
          rows(s.rows),
          kept(s.kept),
          exps(static_cast<Real *>(memory)),
          logits(exps + offset(s, kLogits)),
          mass(exps + offset(s, kMass)),
          weight(exps + offset(s, kWeight)),
          matrix(exps + offset(s, kMatrix)),
          fold_t(reinterpret_cast<V *>(exps + offset(s, kFoldT))),
          fold_one(reinterpret_cast<V *>(exps + offset(s, kFoldOne))),
          group(exps + offset(s, kParts), s.samples * s.rows, s.rows, 1) {}

    // Where the exponentials of a row are kept; those at T = 1 in the last array.
    RowStore<Real> store_of(int sample, int r) const {
        Real *const at = exps + (sample * rows + r) * row_size;
        return {at, at + (row_size - kept)};
    }
};

}  // namespace MSDKERN_NAMESPACE
