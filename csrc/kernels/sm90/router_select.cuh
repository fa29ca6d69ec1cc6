// Selection of the K best key blocks of one router row by one warp, from order-preserving keys in
// shared memory. Passes over all T_n keys are what costs: there are two, one to find a bound that
// hardly more than K keys reach, one to copy these to a short list; the bisection for the K-th
// largest key sees the short list only.
#pragma once

#include <stdint.h>

namespace sla2 {

// Floats as unsigned keys of the same order; 0 is below all of them. NaN ranks above +inf, as in
// torch, so that a row always has K entries. `x` must come from float32 arithmetic, whose only NaN
// is 0x7fffffff.
__device__ __forceinline__ uint32_t order_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t sign = static_cast<uint32_t>(static_cast<int>(bits) >> 31);
  return bits ^ (sign | 0x80000000u);
}
constexpr uint32_t kPinnedKey = 0xffffffffu;  // also the key of NaN until prepare_row
constexpr uint32_t kNanKey = 0xfffffffeu;

// A row of keys: lane l owns the 2 * lane_pairs() columns from 2 * lane_pairs() * l on. An odd
// number of pairs, so that the lanes' 8-byte reads fall into different banks; eight words more, so
// that eight rows' 32-byte stores do. Columns past T_n are 0.
__host__ __device__ constexpr int lane_pairs(int num_keys) { return (num_keys + 63) / 64 | 1; }
__host__ __device__ constexpr int row_pitch(int num_keys) { return 64 * lane_pairs(num_keys) + 8; }
constexpr int kMaxLanePairs = 48;

constexpr uint32_t kAllLanes = 0xffffffffu;

// Zeros past the keys, and pinned key blocks above all others; indices out of range are ignored.
__device__ __forceinline__ void prepare_row(uint32_t* row, int num_keys, const int* pinned,
                                            int num_pinned) {
  const int lane = threadIdx.x % 32, pitch = row_pitch(num_keys);
#pragma unroll 1
  for (int i = num_keys + lane; i < pitch; i += 32) row[i] = 0u;
  if (num_pinned > 0) {
#pragma unroll 4
    for (int i = lane; i < num_keys; i += 32) row[i] = min(row[i], kNanKey);
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < num_pinned; i += 32) {
      if (pinned[i] >= 0 && pinned[i] < num_keys) row[pinned[i]] = kPinnedKey;
    }
  }
  __syncwarp();
}

constexpr int kShortList = 256;
struct ShortList {
  uint32_t keys[kShortList];
  uint16_t columns[kShortList];  // ascending
};

// What is listed: the keys above `key`, then the first K - above of those equal to it. `above` may
// be fewer than the keys above `key` if all equal ones are listed.
struct Cut {
  uint32_t key;
  int above;
};

// Bisection between `low`, which at least `wanted` keys reach, and `high`, which none exceeds.
// Stops as soon as a key is reached by `wanted` to `enough` keys.
template <typename CountReaching>
__device__ __forceinline__ Cut bisect(uint32_t low, uint32_t high, int wanted, int enough,
                                      CountReaching count_reaching) {
  int above = 0;
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2 + 1;
    const int count = count_reaching(middle);
    if (count < wanted) {
      high = middle - 1;
      above = count;
    } else {
      low = middle;
      if (count <= enough) break;
    }
  }
  return {low, above};
}

// The largest keys of each lane's columns, dealt to kGroups groups: the K-th largest of the warp's
// 32 kGroups maxima is reached by K keys at least, and for small K by few more.
constexpr int kGroups = 8;
constexpr int kMaxGroupRank = 32 * kGroups * 3 / 4;
struct GroupMaxima {
  uint32_t key[kGroups] = {};

  __device__ __forceinline__ explicit GroupMaxima(const uint2* columns, int pairs) {
    constexpr int kStep = kGroups / 2;
    int first = 0;
#pragma unroll 1
    for (; first + kStep <= pairs; first += kStep) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) add(i, columns[first + i]);
    }
#pragma unroll
    for (int i = 0; i < kStep - 1; ++i) {
      if (first + i < pairs) add(i, columns[first + i]);
    }
  }
  __device__ __forceinline__ void add(int i, uint2 two) {
    key[2 * i] = max(key[2 * i], two.x);
    key[2 * i + 1] = max(key[2 * i + 1], two.y);
  }
  __device__ __forceinline__ uint32_t largest() const {
    uint32_t result = 0u;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) result = max(result, key[i]);
    return result;
  }
  __device__ __forceinline__ int count_reaching(uint32_t bound) const {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) count += key[i] >= bound;
    return __reduce_add_sync(kAllLanes, count);
  }
};

// A bound that at least `wanted` keys of the row reach, at least 1.
__device__ __forceinline__ uint32_t lower_bound(const GroupMaxima& groups, uint32_t largest,
                                                int wanted) {
  const auto count_reaching = [&](uint32_t bound) { return groups.count_reaching(bound); };
  // Every lane's largest key reaches the first guess, so that it is rarely negative: a bisection of
  // float bits across zero starts with seven useless steps.
  const uint32_t guess = __reduce_min_sync(kAllLanes, groups.largest());
  const bool reached = count_reaching(guess) >= wanted;
  const Cut cut = bisect(reached ? guess : 0u, reached ? largest : guess - 1u, wanted,
                         wanted + wanted / 8 + 2, count_reaching);
  return max(cut.key, 1u);
}

// Copies the columns whose key reaches `bound`, in ascending order, if they fit; returns how many
// there are.
__device__ __forceinline__ int collect(const uint32_t* row, int pairs, uint32_t bound,
                                       ShortList& list) {
  constexpr int kWords = kMaxLanePairs / 16;
  const int lane = threadIdx.x % 32;
  const uint2* columns = reinterpret_cast<const uint2*>(row) + lane * pairs;
  uint32_t reaching[kWords];
  int mine = 0;
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    uint32_t bits = 0u;
#pragma unroll
    for (int first = 0; first < 16; first += 4) {
      if (16 * word + first >= pairs) continue;
#pragma unroll
      for (int i = first; i < first + 4; ++i) {
        const uint2 two = columns[16 * word + i];
        if (two.x >= bound) bits |= 1u << 2 * i;
        if (two.y >= bound) bits |= 2u << 2 * i;
      }
    }
    const int valid = 2 * pairs - 32 * word;  // the last four pairs reach into the next lane's
    if (valid < 32) bits &= valid > 0 ? (1u << valid) - 1u : 0u;
    reaching[word] = bits;
    mine += __popc(bits);
  }
  int position = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, position, step);
    if (lane >= step) position += other;
  }
  const int total = __shfl_sync(kAllLanes, position, 31);
  if (total > kShortList) return total;
  position -= mine;
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
#pragma unroll 1
    for (uint32_t bits = reaching[word]; bits != 0u; bits &= bits - 1u) {
      const int column = 2 * lane * pairs + 32 * word + __ffs(bits) - 1;
      list.keys[position] = row[column];
      list.columns[position] = static_cast<uint16_t>(column);
      ++position;
    }
  }
  __syncwarp();
  return total;
}

// Calls visit(position, column) for the `wanted` largest of the row's keys, ties to the lowest
// column, in ascending order of columns.
template <typename Visit>
__device__ __forceinline__ void select_largest(const uint32_t* row, int num_keys, int wanted,
                                               ShortList& list, Visit visit) {
  const int lane = threadIdx.x % 32, pairs = lane_pairs(num_keys);
  const GroupMaxima groups(reinterpret_cast<const uint2*>(row) + lane * pairs, pairs);
  const uint32_t largest = __reduce_max_sync(kAllLanes, groups.largest());

  const uint32_t* keys = row;
  int count = num_keys;
  uint32_t bound = 1u;
  if (wanted <= kMaxGroupRank) {
    bound = lower_bound(groups, largest, wanted);
    const int reaching = collect(row, pairs, bound, list);
    if (reaching <= kShortList) {
      keys = list.keys;
      count = reaching;
    }
  } else {
    uint32_t smallest = largest;
#pragma unroll 4
    for (int i = lane; i < num_keys; i += 32) smallest = min(smallest, row[i]);
    bound = __reduce_min_sync(kAllLanes, smallest);
  }
  const bool is_short = keys != row;

  Cut cut = {bound, 0};
  if (count > 64) {
    if (count > wanted) {
      cut = bisect(bound, largest, wanted, wanted, [&](uint32_t middle) {
        int reaching = 0;
#pragma unroll 4
        for (int i = lane; i < count; i += 32) reaching += keys[i] >= middle;
        return __reduce_add_sync(kAllLanes, reaching);
      });
    }
  } else if (count > wanted) {  // the usual case: two keys a lane, in registers
    const uint32_t first = lane < count ? keys[lane] : 0u;
    const uint32_t second = lane + 32 < count ? keys[lane + 32] : 0u;
    cut = bisect(bound, largest, wanted, wanted, [&](uint32_t middle) {
      return __popc(__ballot_sync(kAllLanes, first >= middle)) +
             __popc(__ballot_sync(kAllLanes, second >= middle));
    });
  }

  const uint32_t lanes_below = (1u << lane) - 1u;
  int equal_left = wanted - cut.above, visited = 0;
#pragma unroll 1
  for (int i = lane; i - lane < count; i += 32) {
    const uint32_t key = i < count ? keys[i] : 0u;
    const uint32_t equal = __ballot_sync(kAllLanes, key == cut.key);
    const bool take = key > cut.key || (key == cut.key && __popc(equal & lanes_below) < equal_left);
    const uint32_t taken = __ballot_sync(kAllLanes, take);
    if (take) visit(visited + __popc(taken & lanes_below), is_short ? list.columns[i] : i);
    visited += __popc(taken);
    equal_left -= __popc(equal);
  }
}

}  // namespace sla2
