// SPDX-License-Identifier: Apache-2.0
// How the samples of a loss are worked on, by their size. All numbers are as measured.
#pragma once

#include "simd.h"

namespace MSDKERN_NAMESPACE {

// Gradients that no cache will hold are written past them; then there is room for the logits, and
// less for exponentials. These are kept between the sweeps up to so many bytes per sample: beyond,
// sweeps take them again, a window at a time. With the widest vectors that takes less than reading
// them from the second cache; else, and for two sweeps, it pays only where no cache holds them.
constexpr int64_t kCacheBytes = 32 << 20;
constexpr bool kWidest = kBytes == 64;
constexpr int64_t kKeptStreaming = kWidest ? 256 << 10 : 2 << 20;
constexpr int64_t kKeptForOne = kWidest ? 480 << 10 : 2 << 20, kKeptForTwo = 8 << 20;
// Values are summed over at most this many classes before they are added up: fewer roundings in a
// row.
constexpr int64_t kBlock = 4096;
constexpr int kFewVectors = 32;  // from here on a row is worth fetching while another is worked on
constexpr int64_t kGroupBytes = 16 << 10;  // of exponentials kept for samples worked on together

// How samples are worked on: one after the other; or as many at once as a vector has lanes, turned
// into columns or in place.
enum class Way { kRows, kColumns, kInPlace };
// Columns have the quickest sweeps, but memory takes what is written row by row much
// sooner. In place until the exponentials of a sample take so much that those of a group are better
// worked on in fewer samples.
constexpr int64_t kColumnsRead = 128, kColumnsWritten = 32;  // classes
constexpr int64_t kColumnBytes = 96 << 10;                   // of a group's logits
constexpr int64_t kInPlaceBytes = (kWidest ? 12 : 8) << 10;  // of a sample's exponentials

}  // namespace MSDKERN_NAMESPACE
