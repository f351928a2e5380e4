// From cached latents to rows of numbers, in the core's cache: found in buffers or pages, and unpacked from codes. Bytes are
// read from memory once; what a tile has no tokens or latents for is 0.
#pragma once
#include "layouts.h"

namespace {

using cskv::Call;
using cskv::Latents;

INLINE int64_t whole_number(const char* p, int64_t bytes) {
  if (bytes == 8) return *reinterpret_cast<const int64_t*>(p);
  return *reinterpret_cast<const int32_t*>(p);
}

constexpr int MOST_BLOCKS = 16;  // of a token, whose parameters fit a register

// What unpacking takes beside the latents themselves.
struct Codes {
  uint8_t *bytes, *codes;   // of a token
  float *scale, *minimum;   // of every latent, for the row of blocks that was read last
  uint32_t* blocks;         // the block of every latent
  static Codes taken(Memory& memory, int64_t rank) {
    const int64_t latents = rank + SLACK;
    uint8_t *bytes = memory.take<uint8_t>(latents + SLACK), *codes = memory.take<uint8_t>(latents);
    float *scale = memory.take<float>(latents), *minimum = memory.take<float>(latents);
    return Codes{bytes, codes, scale, minimum, memory.take<uint32_t>(latents)};
  }
};

// The latents of one sequence: finds rows, and unpacks codes. The groups of a row are `width` numbers apart.
template <class E>
struct Reader {
  const Call& call;
  const Latents& latents;
  int64_t sequence, rank, width;
  Codes own;
  const char* parameters = nullptr;  // where the row of blocks is that was read last
  int shift = -1;                    // where blocks of codes have a power of 2 tokens: of which
  int64_t bits = 0;                  // of all codes, where these are taken from rows of bytes without a detour
  bool names_blocks = false;         // whether such latents find the parameters of their block in a register

  Reader(const Call& c, const Latents& l, int64_t of, int64_t r, int64_t w, Codes codes)
      : call(c), latents(l), sequence(of), rank(r), width(w), own(codes) {
    if (l.block_tokens > 0 && (l.block_tokens & (l.block_tokens - 1)) == 0) shift = __builtin_ctzll(l.block_tokens);
#if defined(__AVX512BF16__)
    bits = sizeof(E) == 2 && is_of_one_width() ? latents.runs[0] : 0;
    names_blocks = bits && name_blocks();
#endif
  }

  // Write `count` rows from token `start` on, and rows of zeros up to `size`.
  __attribute__((noinline)) void read(int64_t start, int64_t count, int64_t size, E* out) {
    const int64_t row = call.groups * width;
    parameters = nullptr;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(E) == 2) {
      if (bits == 8) rows_of_codes<8>(start, count, out);
      if (bits == 4) rows_of_codes<4>(start, count, out);
      if (bits == 2) rows_of_codes<2>(start, count, out);
    }
#endif
    for (int64_t t = 0; t < count && !bits; t++) token(start + t, out + t * row);
    zero(out + count * row, (size - count) * row * sizeof(E));
  }

  // The same by token, one group after the other: [size / 2][width][2] of 16-bit numbers, else rows. `rows` is room.
  __attribute__((noinline)) void read_by_token(int64_t start, int64_t count, int64_t size, E* out, E* rows) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(E) == 2) {
      const int64_t filled = (count + 1) / 2;
      if (latents.kind == cskv::BFLOAT16) {
        for (int64_t pair = 0; pair < filled; pair++) {
          const auto [even, odd] = find_two(start, count, pair);
          for (int64_t group = 0; group < call.groups; group++) {
            bf16* own_out = out + (group * size + 2 * pair) * width;
            join(even.data + 2 * group * rank, odd.data + 2 * group * rank, own_out);
          }
        }
      } else if (names_blocks) {
        if (bits == 8) pairs_of_codes<8>(start, count, out);
        if (bits == 4) pairs_of_codes<4>(start, count, out);
        if (bits == 2) pairs_of_codes<2>(start, count, out);
      } else {
        read(start, count, size, rows);
        for (int64_t group = 0; group < call.groups; group++) {
          by_token(rows + group * width, call.groups * width, width, size, out + group * size * width);
        }
        return;
      }
      for (int64_t group = 0; group < call.groups; group++) {
        zero(out + (group * size + 2 * filled) * width, (size - 2 * filled) * width * sizeof(E));
      }
      return;
    }
#endif
    (void)rows;
    read(start, count, size, out);
  }

  // Name the memory of `count` rows from token `start` on.
  void announce(int64_t start, int64_t count, Prefetch& prefetch) const {
    if (!latents.block_size) {
      prefetch.add(latents.data + sequence * latents.batch + start * latents.row, count * latents.row);
      return;
    }
    for (int64_t stop = start + count; start < stop;) {
      const int64_t in_page = start % latents.block_size, left = latents.block_size - in_page;
      const int64_t rows = left < stop - start ? left : stop - start;
      const char* entry = call.table + sequence * call.table_batch + start / latents.block_size * call.table_bytes;
      const int64_t page = whole_number(entry, call.table_bytes);
      prefetch.add(latents.data + page * latents.page + in_page * latents.row, rows * latents.row);
      start += rows;
    }
  }

 private:
  // Where a token's latents are, and the scales and minima of its codes.
  struct Where {
    const char *data, *scales, *minima;
  };

  INLINE Where find(int64_t token) const {
    const char *data = latents.data, *scales = latents.scales, *minima = latents.minima;
    int64_t in_page = token;
    if (latents.block_size) {
      const char* entry = call.table + sequence * call.table_batch + token / latents.block_size * call.table_bytes;
      const int64_t page = whole_number(entry, call.table_bytes);
      data += page * latents.page, scales += page * latents.parameters_page, minima += page * latents.parameters_page;
      in_page = token % latents.block_size;
    } else {
      data += sequence * latents.batch, scales += sequence * latents.parameters_batch;
      minima += sequence * latents.parameters_batch;
    }
    data += in_page * latents.row;
    if (latents.kind != cskv::PACKED) return Where{data, nullptr, nullptr};
    const int64_t block = latents.token_block ? latents.token_block[token]
                          : shift >= 0        ? in_page >> shift
                                              : in_page / latents.block_tokens;
    return Where{data, scales + block * latents.parameters_row, minima + block * latents.parameters_row};
  }

  INLINE void token(int64_t token, E* out) {
    auto [data, scales, minima] = find(token);
    if (latents.kind != cskv::PACKED) {
      const int64_t bytes = latents.kind == cskv::FLOAT32 ? 4 : 2;
      for (int64_t group = 0; group < call.groups; group++, out += width, data += rank * bytes) {
        convert(out, data, latents.kind, rank);
        zero(out + rank, (width - rank) * sizeof(E));
      }
      return;
    }
    if (scales != parameters) {
      spread(scales, own.scale), spread(minima, own.minimum);
      parameters = scales;
    }
    unpack(reinterpret_cast<const uint8_t*>(data));
    const uint8_t* codes = own.codes;
    const float *scale = own.scale, *minimum = own.minimum;
    for (int64_t group = 0; group < call.groups; group++, out += width, codes += rank, scale += rank, minimum += rank) {
      for (int64_t i = 0; i < rank; i += W) {
        store(out + i, load(minimum + i) + load(scale + i) * load(codes + i));
      }
      zero(out + rank, (width - rank) * sizeof(E));
    }
  }

#if defined(__AVX512BF16__)
  // Whether all codes have one width, and no vector of them lies in more than two planes.
  bool is_of_one_width() const {
    const int64_t bits = latents.kind == cskv::PACKED ? latents.runs[0] : 0;
    const bool known = bits == 8 || bits == 4 || bits == 2;
    return known && call.groups == 1 && latents.runs[2] == 0 && (rank * bits + 7) / 8 >= W;
  }

  // Two rows of 16-bit numbers side by side.
  INLINE void join(const char* even, const char* odd, bf16* out) const {
    for (int64_t i = 0; i < width; i += W) {
      const int64_t left = rank - i;
      const __mmask16 some = left >= W ? __mmask16(0xffff) : left > 0 ? __mmask16((1u << left) - 1) : __mmask16(0);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, even + 2 * i));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, odd + 2 * i));
      _mm512_storeu_si512(out + 2 * i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }

  struct Two {
    Where even, odd;
  };

  // A pair of tokens. One without another is there twice: the second has no weight.
  INLINE Two find_two(int64_t start, int64_t count, int64_t pair) const {
    return Two{find(start + 2 * pair), find(start + (2 * pair + 1 < count ? 2 * pair + 1 : 2 * pair))};
  }

  template <int BITS>
  INLINE void pairs_of_codes(int64_t start, int64_t count, bf16* out) const {
    for (int64_t pair = 0; 2 * pair < count; pair++) {
      const auto [even, odd] = find_two(start, count, pair);
      join_codes<BITS>(even, odd, out + 2 * pair * width);
    }
  }

  template <int BITS>
  INLINE void join_codes(Where even, Where odd, bf16* out) const {
    const uint8_t *low = reinterpret_cast<const uint8_t*>(even.data), *high = reinterpret_cast<const uint8_t*>(odd.data);
    const VF scales[2] = {of_blocks(even.scales), of_blocks(odd.scales)};
    const VF minima[2] = {of_blocks(even.minima), of_blocks(odd.minima)};
    const auto both = [low, high](__mmask16 some, int64_t at) INLINE_LAMBDA {
      return _mm512_or_si512(bytes(low + at, some), _mm512_slli_epi32(bytes(high + at, some), 16));
    };
    const __m512i of_one = _mm512_set1_epi32((1 << BITS) - 1);
    const Codes own = this->own;
    each_vector<BITS>(both, [=, &scales, &minima](int64_t channel, __m512i codes) INLINE_LAMBDA {
      const VF x = latent<true>(own, number<BITS>(_mm512_and_si512(codes, of_one)), channel, scales[0], minima[0]);
      const __m512i second = _mm512_and_si512(_mm512_srli_epi32(codes, 16), of_one);
      store_pairs(out + 2 * channel, x, latent<true>(own, number<BITS>(second), channel, scales[1], minima[1]));
    });
    end_with_zeros(out + 2 * rank, width - rank);
    end_with_zeros(out + rank + width, width - rank);
  }

  // Write fewer than 32 zeros behind a row: a call of memset takes longer.
  static INLINE void end_with_zeros(bf16* out, int64_t count) {
    static_assert(LANES == 32, "a mask has 32 bits");
    _mm512_mask_storeu_epi16(out, (__mmask32(1) << count) - 1, _mm512_setzero_si512());
  }

  // The parameters of all blocks of a token, at most MOST_BLOCKS.
  INLINE VF of_blocks(const char* in) const {
    const int64_t n = (rank + latents.block_channels - 1) / latents.block_channels;
    return (VF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), in)), 16);
  }

  // Name the block of every latent, where there are at most MOST_BLOCKS of more than a latent each.
  bool name_blocks() const {
    if (latents.block_channels == 1 || latents.runs[2] || (rank + latents.block_channels - 1) / latents.block_channels > MOST_BLOCKS) {
      return false;
    }
    for (int64_t i = 0; i < rank; i++) own.blocks[i] = uint32_t(i / latents.block_channels);
    return true;
  }

  template <int BITS>
  INLINE void rows_of_codes(int64_t start, int64_t count, E* out) {
    for (int64_t t = 0; t < count; t++, out += width) {
      const auto [data, scales, minima] = find(start + t);
      const uint8_t* in = reinterpret_cast<const uint8_t*>(data);
      if (names_blocks) {
        one_width<BITS, true>(in, scales, minima, out);
      } else {
        one_width<BITS, false>(in, scales, minima, out);
      }
      end_with_zeros(out + rank, width - rank);
    }
  }

  template <int BITS, bool NAMED>
  INLINE void one_width(const uint8_t* in, const char* scales, const char* minima, E* out) {
    VF scale{}, minimum{};
    if (NAMED) {
      scale = of_blocks(scales), minimum = of_blocks(minima);
    } else if (scales != parameters) {
      spread(scales, own.scale), spread(minima, own.minimum);
      parameters = scales;
    }
    const auto at = [in](__mmask16 some, int64_t first) INLINE_LAMBDA { return bytes(in + first, some); };
    const Codes codes_of = own;
    each_vector<BITS>(at, [=](int64_t channel, __m512i codes) INLINE_LAMBDA {
      store(out + channel, latent<NAMED>(codes_of, number<BITS>(codes), channel, scale, minimum));
    });
  }

  // Take 16 codes after the other. They begin at whole vectors of latents, and not of the bytes that hold them: rows of
  // latents are written without crossing lines of the cache.
  template <int BITS, class Load, class Take>
  INLINE void each_vector(Load load_bytes, Take take) const {
    const int64_t rank = this->rank, size = (rank * BITS + 7) / 8;
    int64_t channel = 0;
#pragma GCC unroll 4
    for (int plane = 0; plane < 8 / BITS; plane++) {
      const int64_t begin = plane * size, end = begin + size < rank ? begin + size : rank;
      for (; channel + W <= end; channel += W) {
        take(channel, _mm512_srli_epi32(load_bytes(0xffff, channel - begin), unsigned(plane * BITS)));
      }
      if (channel >= end) continue;
      const __mmask16 low = __mmask16((1u << (end - channel)) - 1);
      __m512i codes = _mm512_srli_epi32(load_bytes(low, channel - begin), unsigned(plane * BITS));
      if (end < rank) {
        const __m512i others = _mm512_srli_epi32(load_bytes(__mmask16(~low), channel - end), unsigned((plane + 1) * BITS));
        codes = _mm512_mask_mov_epi32(codes, __mmask16(~low), others);
      }
      take(channel, codes);
      channel += W;
    }
  }

  static INLINE __m512i bytes(const uint8_t* in, __mmask16 some) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, in));
  }

  // Codes as numbers, by their lowest bits.
  template <int BITS>
  static INLINE VF number(__m512i codes) {
    if constexpr (BITS == 8) {
      return (VF)_mm512_cvtepi32_ps(codes);
    } else {
      return (VF)_mm512_permutexvar_ps(codes, (__m512)numbers<BITS>());
    }
  }

  // The number of every code, by the four bits that a register of 16 is looked up by.
  template <int BITS>
  static INLINE VF numbers() {
    constexpr int most = (1 << BITS) - 1;
    return VF{0, 1, 2 & most, 3 & most, 4 & most, 5 & most, 6 & most, 7 & most, 8 & most, 9 & most, 10 & most, 11 & most,
              12 & most, 13 & most, 14 & most, 15 & most};
  }

  template <bool NAMED>
  static INLINE VF latent(const Codes& own, VF number, int64_t channel, VF scale, VF minimum) {
    if (!NAMED) return load(own.minimum + channel) + load(own.scale + channel) * number;
    const __m512i block = _mm512_loadu_si512(own.blocks + channel);
    return (VF)_mm512_permutexvar_ps(block, (__m512)minimum) + (VF)_mm512_permutexvar_ps(block, (__m512)scale) * number;
  }
#endif

  // Repeat the parameters of a row of blocks for every channel of each.
  INLINE void spread(const char* in, float* out) {
    const bf16* p = reinterpret_cast<const bf16*>(in);
    for (const int64_t* run = latents.runs; run[0]; run += 2) {
      if (latents.block_channels == 1) {
        convert(out, reinterpret_cast<const char*>(p), cskv::BFLOAT16, run[1]);
        out += run[1], p += run[1];
        continue;
      }
      for (int64_t left = run[1]; left > 0; left -= latents.block_channels) {
        const int64_t channels = left < latents.block_channels ? left : latents.block_channels;
        const VF x = broadcast(widened(*p++));
        for (int64_t i = 0; i < channels; i += W) store(out + i, x);  // what is too much is written over next
        out += channels;
      }
    }
  }

  // Codes of a token as bytes. Whole vectors are read and written: what is too much is written over next.
  INLINE void unpack(const uint8_t* row) {
    uint8_t* out = own.codes;
    for (const int64_t* run = latents.runs; run[0]; run += 2) {
      const int64_t bits = run[0], channels = run[1];
      int shift = 0;
      for (int width = 8; width; width >>= 1) {
        if (!(bits & width)) continue;
        const int64_t bytes = (channels * width + 7) / 8;
#if defined(__AVX512BW__)
        const uint8_t* in = row;  // masks keep from reading behind it
#else
        const uint8_t* in = own.bytes;
        std::memcpy(own.bytes, row, bytes);
#endif
        for (int index = 0; index < 8 / width && index * bytes < channels; index++) {
          plane(in, bytes, index * width, (1 << width) - 1, shift, out + index * bytes);
        }
        row += bytes, shift += width;
      }
      out += channels;
    }
  }

  INLINE void plane(const uint8_t* in, int64_t bytes, int right, int mask, int left, uint8_t* out) {
    typedef uint8_t Bytes __attribute__((vector_size(4 * W)));
    typedef uint16_t Words __attribute__((vector_size(4 * W)));
    const Bytes kept = Bytes{} + uint8_t(mask << left);
    for (int64_t i = 0; i < bytes; i += 4 * W) {
#if defined(__AVX512BW__)
      const __mmask64 some = bytes - i < 64 ? (uint64_t(1) << (bytes - i)) - 1 : ~uint64_t(0);
      Bytes code = (Bytes)_mm512_maskz_loadu_epi8(some, in + i);
      code = (Bytes)(((Words)code >> right) << left) & kept;
      if (left) code |= (Bytes)_mm512_maskz_loadu_epi8(some, out + i);
      _mm512_mask_storeu_epi8(out + i, some, (__m512i)code);
      continue;
#endif
      Bytes x, y{};
      std::memcpy(&x, in + i, 4 * W);
      x = (Bytes)(((Words)x >> right) << left) & kept;  // without the bits that come from or go to a neighbour
      if (!left) {
        std::memcpy(out + i, &x, 4 * W);
        continue;
      }
      const int64_t size = bytes - i < 4 * W ? bytes - i : 4 * W;  // nothing is written over codes' lower bits
      std::memcpy(&y, out + i, size);
      x |= y;
      std::memcpy(out + i, &x, size);
    }
  }
};

}  // namespace
