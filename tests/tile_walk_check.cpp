// Drives csrc/tile_walk.h on the host: what the walk covers, and what the ring allows under any
// interleaving. Run by tests/test_tile_walk.py; says what is wrong and ends with 1.

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <vector>

#include "tile_walk.h"

using namespace loradrop;

#define CHECK(condition)                                                     \
  if (!(condition)) {                                                        \
    std::printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                            \
  }

// ---- Coverage --------------------------------------------------------------------------------

// Every element (m, n) belongs to one tile of one CTA, whatever the number of clusters.
void check_tiles(const Gemm& g, int clusters) {
  std::vector<int> seen(static_cast<std::size_t>(g.m) * g.n);
  for (int c = 0; c < clusters; ++c) {
    for (int index = c; index < tiles(g); index += clusters) {
      for (int rank = 0; rank < g.cluster; ++rank) {
        const Tile at = tile(g, index, rank);
        CHECK(at.m >= 0 && at.n >= 0 && at.n < g.n);
        CHECK(at.m < g.m || rank > 0);  // only the lower of a pair may be past the edge
        CHECK(tile(g, index, 0).n == at.n);
        for (int m = at.m; m < at.m + kTileM && m < g.m; ++m) {
          for (int n = at.n; n < at.n + g.tile_n && n < g.n; ++n) ++seen[m * g.n + n];
        }
      }
    }
  }
  for (int count : seen) CHECK(count == 1);
}

// Every k of the wide product once, then every k of the thin one.
void check_chunks(const Gemm& g) {
  std::vector<int> wide(g.k), thin(g.r);
  bool begun = false;
  for (int i = 0; i < chunks(g); ++i) {
    const Chunk now = chunk(g, i);
    CHECK(now.thin || !begun);
    begun = now.thin;
    std::vector<int>& seen = now.thin ? thin : wide;
    CHECK(now.k >= 0 && now.k < static_cast<int>(seen.size()));
    for (int k = now.k; k < now.k + kChunk && k < static_cast<int>(seen.size()); ++k) ++seen[k];
  }
  for (int count : wide) CHECK(count == 1);
  for (int count : thin) CHECK(count == 1);
}

void check_shares(const Gemm& g) {
  std::vector<int> seen(g.tile_n);
  for (int rank = 0; rank < g.cluster; ++rank) {
    const Share part = share(g, rank);
    CHECK(part.first % 64 == 0 && part.count % 64 == 0);  // whole boxes
    for (int n = part.first; n < part.first + part.count; ++n) ++seen.at(n);
  }
  for (int count : seen) CHECK(count == 1);
}

// Tiles that run at the same time stay within kGroup rows of tiles, and meet again in L2.
void check_groups(const Gemm& g) {
  const long per_group = static_cast<long>(kGroup / g.cluster) * tile_columns(g);
  for (int index = 0; index < tiles(g); ++index) {
    const int row = tile(g, index, 0).m / kTileM;
    CHECK(row / kGroup == index / per_group);
  }
}

void check_coverage() {
  const int sizes[] = {1, 7, 64, 127, 128, 129, 255, 257, 520};
  for (int cluster : {1, 2}) {
    for (int tile_n : {128, 256}) {
      for (int m : sizes) {
        for (int n : sizes) {
          const Gemm g{m, n, 64, 8, tile_n, cluster};
          for (int clusters : {1, 2, 3, 66, 132}) check_tiles(g, clusters);
        }
      }
      for (int sms = 1; sms <= 132; ++sms) {
        if (sms >= cluster) check_tiles({700, 900, 64, 8, tile_n, cluster}, sms / cluster);
      }
      check_tiles({4500, 300, 64, 8, tile_n, cluster}, 5);  // more than two groups of rows
      for (int k : {1, 8, 63, 64, 65, 128, 1000, 4096}) {
        for (int r : {0, 1, 8, 17, 63, 64, 65, 128, 200, 256}) {
          check_chunks({128, 128, k, r, tile_n, cluster});
        }
      }
      check_shares({1, 1, 1, 1, tile_n, cluster});
      check_groups({8192, 4096, 64, 8, tile_n, cluster});
      check_groups({5000, 11008, 64, 8, tile_n, cluster});
    }
  }
  const Gemm large{1 << 20, 1 << 20, 64, 8, 128, 1};
  CHECK(tiles(large) == (1L << 26) && tiles(large) <= kMaxTiles);
  CHECK(tile(large, static_cast<int>(tiles(large)) - 1, 0).m == (1 << 20) - 128);
}

struct Cut {
  int m, n, tile_n, cluster;
  long time;  // 25600 a wave of 128 x 256, 13568 one of 128 x 128
};

// The tiles that take least time, on 132 SMs.
void check_cuts() {
  const Cut cuts[] = {
      {512, 11008, 128, 2, 3 * 13568},   {1024, 5120, 128, 2, 3 * 13568},
      {1024, 6144, 128, 2, 3 * 13568},   {1536, 4096, 128, 2, 3 * 13568},
      {2048, 5120, 128, 2, 5 * 13568},   {1536, 6144, 128, 2, 5 * 13568},
      {2176, 4096, 128, 2, 5 * 13568},   {1024, 14336, 128, 2, 7 * 13568},
      {2176, 6144, 128, 2, 7 * 13568},   {2048, 11008, 128, 2, 11 * 13568},
      {1024, 4096, 256, 2, 25600},       {4096, 1024, 256, 2, 25600},
      {8192, 4096, 256, 2, 8 * 25600},   {8192, 14336, 256, 2, 28 * 25600},
      {8192, 11008, 256, 2, 21 * 25600}, {512, 1024, 128, 2, 13568},
      {128, 4096, 128, 1, 13568},  // nothing to share
      {384, 5120, 128, 1, 13568},  // pairs: a second wave, for a row of tiles beyond the edge
  };
  for (const Cut& c : cuts) {
    const Gemm found = cut({c.m, c.n, 64, 8, 0, 0}, 132);
    CHECK(found.tile_n == c.tile_n && found.cluster == c.cluster);
    CHECK(gemm_time(found, 132) == c.time);
    CHECK(found.m == c.m && found.n == c.n && found.k == 64 && found.r == 8);
  }
  for (int sms : {1, 2, 7, 66, 132}) {
    for (int m : {1, 128, 129, 500, 1024, 3000}) {
      for (int n : {8, 256, 1000, 5120, 11008}) {
        const Gemm best = cut({m, n, 64, 8, 0, 0}, sms);
        CHECK(m > kTileM || best.cluster == 1);
        for (int tile_n : {128, 256}) {
          for (int cluster : {1, 2}) {
            const Gemm asked = cut({m, n, 64, 8, tile_n, cluster}, sms);
            CHECK(asked.tile_n == tile_n && asked.cluster == cluster);
            CHECK(gemm_time(best, sms) <= gemm_time(asked, sms));
          }
          CHECK(cut({m, n, 64, 8, tile_n, 0}, sms).tile_n == tile_n);
        }
      }
    }
  }
}

// ---- The ring under any interleaving -----------------------------------------------------------

struct Barrier {
  int expected = 0, pending = 0, completed = 0;
  long bytes = 0;

  void init(int arrivals) { expected = pending = arrivals; }
  void settle() {
    if (pending == 0 && bytes == 0) {
      pending = expected;
      ++completed;
    }
  }
  void arrive() {
    CHECK(pending > 0);
    --pending;
    settle();
  }
  void add(long count) {
    bytes += count;
    settle();
  }
  // Passes if the phase of that parity is complete: the one under way has the other.
  bool passes(unsigned parity) const { return (static_cast<unsigned>(completed) & 1u) != parity; }
};

struct Slot {
  std::vector<int> parts;  // the chunk whose p, and whose shares of q, lie there
  int reading = 0;         // warps between their wait and their release
  int unread = 0;          // warps that have still to read the present fill
  Barrier filled, emptied;
};

struct Event {  // on its way to a CTA: bytes of a part, or the release by a warp
  int cta, slot, part, chunk;
};

class Cluster {
 public:
  // `tile_chunks` of each of `tile_count` tiles through `slots`, on CTAs that take turns at random.
  Cluster(int size, int slots, int tile_count, int tile_chunks, unsigned seed)
      : size_(size), slots_(slots), total_(tile_count * tile_chunks), random_(seed),
        memory_(size, std::vector<Slot>(slots)), producers_(size),
        warps_(size, std::vector<Warp>(kConsumerWarps)) {
    for (auto& cta : memory_) {
      for (Slot& slot : cta) {
        slot.parts.assign(1 + size, -1);
        slot.filled.init(1);
        slot.emptied.init(releases(size));
      }
    }
    // One group of wgmma stays in flight: a chunk is released when the next one has been issued, the
    // last of a tile at its end.
    for (int t = 0, i = 0; t < tile_count; ++t) {
      for (int c = 0; c < tile_chunks; ++c, ++i) {
        program_.push_back({true, i});
        if (c > 0) program_.push_back({false, i - 1});
      }
      program_.push_back({false, i - 1});
    }
  }

  void run() {
    const int actors = size_ * (1 + kConsumerWarps);
    int idle = 0;
    while (true) {
      const int choice = static_cast<int>(random_() % (actors + 2 * size_));
      bool moved = choice < actors ? step(choice) : deliver();
      if (moved) {
        idle = 0;
      } else if (++idle > 40 * actors) {
        moved = false;  // sure now that nothing can move: try all of them
        for (int a = 0; a < actors && !moved; ++a) moved = step(a);
        moved = moved || deliver();
        if (!moved) break;
        idle = 0;
      }
    }
    for (int c = 0; c < size_; ++c) {
      CHECK(producers_[c].chunk == total_);  // otherwise: a deadlock
      for (const Warp& warp : warps_[c]) CHECK(warp.next == program_.size());
    }
  }

 private:
  struct Action {
    bool wait;  // for the fill of a chunk; or else its release
    int chunk;
  };
  struct Producer {
    int chunk = 0;
    Ring ring;
  };
  struct Warp {
    std::size_t next = 0;
    Ring ring;
    std::map<int, int> slot_of;
  };
  static constexpr int kBytes = 16;

  bool step(int actor) {
    const int cta = actor / (1 + kConsumerWarps), role = actor % (1 + kConsumerWarps);
    return role == 0 ? produce(cta) : consume(cta, warps_[cta][role - 1]);
  }

  bool produce(int cta) {
    Producer& me = producers_[cta];
    if (me.chunk == total_) return false;
    Slot& slot = memory_[cta][me.ring.slot];
    if (!slot.emptied.passes(me.ring.emptied())) return false;
    CHECK(slot.emptied.completed == me.chunk / slots_);  // of this round, not of another
    slot.filled.add(kBytes * (1 + size_));
    slot.filled.arrive();
    events_.push_back({cta, me.ring.slot, 0, me.chunk});
    for (int to = 0; to < size_; ++to) events_.push_back({to, me.ring.slot, 1 + cta, me.chunk});
    me.ring.advance(slots_);
    ++me.chunk;
    return true;
  }

  bool consume(int cta, Warp& warp) {
    if (warp.next == program_.size()) return false;
    const Action now = program_[warp.next];
    if (now.wait) {
      Slot& slot = memory_[cta][warp.ring.slot];
      if (!slot.filled.passes(warp.ring.filled())) return false;
      CHECK(slot.filled.completed == now.chunk / slots_ + 1);
      for (int part : slot.parts) CHECK(part == now.chunk);
      ++slot.reading;
      --slot.unread;
      warp.slot_of[now.chunk] = warp.ring.slot;
      warp.ring.advance(slots_);
    } else {
      const int slot = warp.slot_of.at(now.chunk);
      for (int part : memory_[cta][slot].parts) CHECK(part == now.chunk);  // unchanged while read
      --memory_[cta][slot].reading;
      for (int to = 0; to < size_; ++to) events_.push_back({to, slot, -1, now.chunk});
    }
    ++warp.next;
    return true;
  }

  bool deliver() {
    if (events_.empty()) return false;
    std::swap(events_[random_() % events_.size()], events_.back());
    const Event event = events_.back();
    events_.pop_back();
    Slot& slot = memory_[event.cta][event.slot];
    if (event.part < 0) {
      slot.emptied.arrive();
      return true;
    }
    // Nobody reads, and nobody has still to read, what is overwritten.
    const int before = event.chunk - slots_;
    CHECK(slot.reading == 0);
    CHECK(slot.parts[event.part] == (before < 0 ? -1 : before));
    bool begun = false;
    for (int part : slot.parts) begun = begun || part == event.chunk;
    CHECK(begun || slot.unread == 0);
    if (!begun) slot.unread = kConsumerWarps;
    slot.parts[event.part] = event.chunk;
    slot.filled.add(-kBytes);
    return true;
  }

  int size_, slots_, total_;
  std::mt19937 random_;
  std::vector<std::vector<Slot>> memory_;
  std::vector<Producer> producers_;
  std::vector<std::vector<Warp>> warps_;
  std::vector<Action> program_;
  std::vector<Event> events_;
};

// ---- Making h beside the tiles ---------------------------------------------------------------

// Every row block is made once, whatever the number of streaming CTAs; slots and barriers fit.
void check_streams() {
  for (int m : {1, 128, 129, 1000, 8192}) {
    for (int streams : {1, 2, 3, 40}) {
      const Gemm g{m, 256, 64, 8, 256, 2, streams};
      std::vector<int> made(row_blocks(g));
      for (int cta = 0; cta < 2 * streams; ++cta) {
        const RowBlocks blocks = stream_blocks(g, cta);
        for (int b = blocks.first; b < blocks.end; b += blocks.step) ++made.at(b);
      }
      for (int count : made) CHECK(count == 1);
      CHECK(128 * row_blocks(g) >= m);
    }
  }
  for (int r = 1; r <= kStreamMaxRank; ++r) {
    for (bool k_major : {true, false}) {
      const StreamSlots slots = stream_slots(r, k_major, 229000);
      CHECK(slots.bytes % 1024 == 0 && slots.count >= 6 && slots.count <= kStreamMaxSlots);
      CHECK(slots.count * (slots.bytes + 16) <= 229000);
      CHECK(stream_ranks(r) >= r && slots.bytes >= 128 * (128 + (k_major ? r : 64)));
    }
  }
}

// What 66 clusters of 2 spare, and whether h is made there.
void check_plans_of_h() {
  const struct {
    int m, n, k, r, spare, forward, backward;
  } plans[] = {
      {8192, 4096, 4096, 16, 2, 2, 2}, {8192, 14336, 4096, 16, 2, 2, 2},
      {8192, 4096, 4096, 64, 2, 2, 2}, {8192, 4096, 14336, 16, 2, 2, 2},
      {2048, 4096, 4096, 16, 2, 2, 2}, {512, 4096, 4096, 16, 34, 2, 2},
      {8192, 2048, 2048, 16, 2, 2, 0}, {8192, 1024, 4096, 16, 2, 0, 0},  // few tiles
      {8192, 11008, 4096, 16, 0, 0, 0},  // 1376 tiles: the last wave is full
      {8192, 4096, 4096, 129, 2, 0, 0}, {8192, 4096, 4096, 0, 2, 0, 0},
  };
  for (const auto& plan : plans) {
    Gemm g{plan.m, plan.n, plan.k, plan.r, 256, 2};
    CHECK(spare_clusters(g, 66) == plan.spare);
    CHECK(streams(g, 66, true) == plan.forward && streams(g, 66, false) == plan.backward);
    const int waves = ceil_div(tiles(g), 66);
    CHECK(ceil_div(tiles(g), 66 - smaller(plan.spare, plan.forward)) == waves);
    g.cluster = 1;
    CHECK(streams(g, 132, true) == 0);
  }
}

// Sixteens of the last chunk: all of its k, and no more than twice as many.
void check_last_steps() {
  for (int r = 0; r <= 300; ++r) {
    for (int k : {1, 16, 17, 64, 65, 4096}) {
      const int of = r > 0 ? r : k, steps = last_steps({1, 8, k, r, 128, 1});
      const int left = of - (of - 1) / 64 * 64;
      CHECK(16 * steps >= left && (steps == 1 || 8 * steps < left));
      CHECK(steps == 1 || steps == 2 || steps == 4);
    }
  }
}

void check_ring() {
  for (int size : {1, 2}) {
    for (int slots : {1, 2, 3, 4, 6}) {
      for (int tile_chunks : {1, 2, 3, 5, 9}) {
        if (slots == 1 && tile_chunks > 1) continue;  // one in flight needs a second slot
        for (unsigned seed = 0; seed < 10; ++seed) {
          Cluster(size, slots, 4, tile_chunks, seed).run();
        }
      }
    }
  }
}

// ---- decode ----------------------------------------------------------------------------------

void check_decode() {
  for (int cluster : {1, 2, 4, 8}) {
    for (int k : {1, 64, 128, 129, 384, 1000, 4096, 14336}) {
      const int count = ceil_div(k, kDecodeChunk);
      std::vector<int> contributions(count);
      for (int rank = 0; rank < cluster; ++rank) {
        const DecodeWalk walk = decode_walk(k, cluster, rank);
        CHECK(walk.chunks == count && walk.own >= 0 && walk.own <= count);
        std::vector<int> seen(count);
        for (int step = 0; step < walk.chunks; ++step) {
          const int c = walk.chunk(step);
          CHECK(c >= 0 && c < count);
          ++seen[c];
          if (step < walk.own) ++contributions[c];
        }
        for (int times : seen) CHECK(times == 1);
      }
      for (int times : contributions) CHECK(times == 1);
    }
    for (int n : {1, 8, 100, 1024, 4096, 11008, 14336, 128256}) {
      for (int sms = 1; sms <= 132; ++sms) {
        const int rows = decode_rows(n, sms), ctas = decode_ctas(n, rows, cluster);
        const int waves = ceil_div(n, static_cast<long>(kDecodeMaxRows) * sms);
        CHECK(rows % 16 == 0 && rows >= 16 && rows <= kDecodeMaxRows);
        CHECK(ceil_div(n, rows) <= waves * sms);  // and no lower slab does it
        CHECK(rows == 16 || ceil_div(n, rows - 16) > waves * sms);
        CHECK(ctas % cluster == 0 && static_cast<long>(ctas) * rows >= n);
        CHECK(static_cast<long>(ctas - cluster) * rows < n);
      }
    }
  }
}

bool is(const DecodePlan& plan, int rows, int cluster, int ctas) {
  return plan.rows == rows && plan.cluster == cluster && plan.ctas == ctas;
}

void check_plans() {
  const Occupancy even{{132, 66, 33, 16}}, uneven{{132, 66, 32, 15}}, sparse{{132, 66, 31, 15}};
  const Occupancy pairs{{14, 7, 0, 0}}, singles{{7, 0, 0, 0}}, nothing{{0, 0, 0, 0}};
  // 16 clusters of 8 hold 4096 rows in slabs of 32; 15 would need slabs of 48.
  CHECK(is(decode_plan(4096, 16, even, 0), 32, 8, 128));
  CHECK(is(decode_plan(4096, 16, uneven, 0), 32, 4, 128));
  CHECK(is(decode_plan(4096, 16, sparse, 0), 32, 2, 128));
  CHECK(is(decode_plan(4096, 16, uneven, 8), 48, 8, 88));
  CHECK(is(decode_plan(4096, 16, uneven, 1), 32, 1, 128));
  CHECK(is(decode_plan(5120, 16, uneven, 0), 48, 8, 112));  // nothing is saved
  CHECK(is(decode_plan(4096, 128, sparse, 0), 48, 8, 88));  // A would cost more than W
  CHECK(is(decode_plan(16384, 16, even, 0), 128, 8, 128));
  CHECK(is(decode_plan(16384, 16, uneven, 0), 128, 4, 128));  // 15 clusters of 8: a second wave
  CHECK(is(decode_plan(20000, 16, even, 0), 80, 8, 256));
  CHECK(is(decode_plan(100, 16, pairs, 0), 16, 2, 8));
  CHECK(decode_plan(100, 16, pairs, 8).ctas == 0 && decode_plan(100, 16, singles, 0).ctas == 0);
  CHECK(is(decode_plan(100, 16, singles, 1), 16, 1, 7));
  CHECK(decode_plan(100, 16, nothing, 1).ctas == 0);
  for (const Occupancy& on : {even, uneven, sparse, pairs}) {
    for (int n : {1, 100, 1024, 2048, 4096, 8192, 11008, 14336, 32000, 128256}) {
      for (int r : {1, 16, 64, 128}) {
        const DecodePlan best = decode_plan(n, r, on, 0);
        CHECK(static_cast<long>(best.ctas) * best.rows >= n && best.ctas % best.cluster == 0);
        for (int cluster : {1, 2, 4, 8}) {
          const DecodePlan plan = decode_plan(n, r, on, cluster);
          if (on.of(cluster) == 0) continue;
          CHECK(plan.cluster == cluster);
          CHECK(cluster == 1 || decode_load(best, r, on) <= decode_load(plan, r, on));
        }
      }
    }
  }
}

int main() {
  check_coverage();
  check_cuts();
  check_streams();
  check_plans_of_h();
  check_last_steps();
  check_ring();
  check_decode();
  check_plans();
  return 0;
}
