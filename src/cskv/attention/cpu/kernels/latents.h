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
  bool names_blocks = false;         // whether latents find the parameters of their block in a register

  Reader(const Call& c, const Latents& l, int64_t of, int64_t r, int64_t w, Codes codes)
      : call(c), latents(l), sequence(of), rank(r), width(w), own(codes) {
#if defined(__AVX512BF16__)
    names_blocks = latents.kind == cskv::PACKED && name_blocks();
#endif
  }

  // Write `count` rows from token `start` on, and rows of zeros up to `size`.
  __attribute__((noinline)) void read(int64_t start, int64_t count, int64_t size, E* out) {
    const int64_t row = call.groups * width;
    parameters = nullptr;
    for (int64_t t = 0; t < count; t++) token(start + t, out + t * row);
    zero(out + count * row, (size - count) * row * sizeof(E));
  }

  // The same by token, one group after the other: [size / 2][width][2] of 16-bit numbers, else rows. `rows` is room.
  __attribute__((noinline)) void read_by_token(int64_t start, int64_t count, int64_t size, E* out, E* rows) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(E) == 2) {
      if (latents.kind != cskv::BFLOAT16 && !(is_of_one_width() && names_blocks)) {
        read(start, count, size, rows);
        for (int64_t group = 0; group < call.groups; group++) {
          by_token(rows + group * width, call.groups * width, width, size, out + group * size * width);
        }
        return;
      }
      const int64_t filled = (count + 1) / 2;
      for (int64_t pair = 0; pair < filled; pair++) {
        // A token without another is there twice: the second has no weight.
        const Where even = find(start + 2 * pair), odd = find(start + (2 * pair + 1 < count ? 2 * pair + 1 : 2 * pair));
        for (int64_t group = 0; group < call.groups; group++) {
          bf16* own_out = out + (group * size + 2 * pair) * width;
          if (latents.kind == cskv::BFLOAT16) {
            join(even.data + 2 * group * rank, odd.data + 2 * group * rank, own_out);
          } else {
            join_codes(even, odd, own_out);
          }
        }
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
    const int64_t block = latents.token_block             ? latents.token_block[token]
                          : latents.block_tokens == 1 ? in_page
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
#if defined(__AVX512BF16__)
    if constexpr (sizeof(E) == 2) {
      if (is_of_one_width()) {
        const int64_t bits = latents.runs[0];
        const uint8_t* in = reinterpret_cast<const uint8_t*>(data);
        if (names_blocks) {
          of_width<true>(bits, in, scales, minima, out);
        } else {
          of_width<false>(bits, in, scales, minima, out);
        }
        zero(out + rank, (width - rank) * sizeof(E));
        return;
      }
    }
#endif
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
  bool is_of_one_width() const {
    const int64_t bits = latents.kind == cskv::PACKED ? latents.runs[0] : 0;
    return call.groups == 1 && bits && latents.runs[2] == 0 && (bits == 8 || bits == 4 || bits == 2);
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

  INLINE void join_codes(Where even, Where odd, bf16* out) {
    if (latents.runs[0] == 8) join_codes<8>(even, odd, out);
    if (latents.runs[0] == 4) join_codes<4>(even, odd, out);
    if (latents.runs[0] == 2) join_codes<2>(even, odd, out);
  }

  template <int BITS>
  INLINE void join_codes(Where even, Where odd, bf16* out) {
    const uint8_t *low = reinterpret_cast<const uint8_t*>(even.data), *high = reinterpret_cast<const uint8_t*>(odd.data);
    const VF scales[2] = {of_blocks(even.scales), of_blocks(odd.scales)};
    const VF minima[2] = {of_blocks(even.minima), of_blocks(odd.minima)};
    const int64_t bytes = (rank * BITS + 7) / 8;
#pragma GCC unroll 4
    for (int index = 0; index < 8 / BITS; index++) {
      const int64_t begin = index * bytes;
      if (begin >= rank) break;
      for (int64_t i = 0; i < bytes; i += W) {
        const VF x = latent<BITS, true>(low + i, bytes - i, index, begin + i, scales[0], minima[0]);
        const VF y = latent<BITS, true>(high + i, bytes - i, index, begin + i, scales[1], minima[1]);
        store_pairs(out + 2 * (begin + i), x, y);
      }
    }
    zero(out + 2 * rank, 2 * (width - rank) * sizeof(bf16));
  }

  // The parameters of all blocks of a token, at most 16.
  INLINE VF of_blocks(const char* in) const {
    const int64_t n = (rank + latents.block_channels - 1) / latents.block_channels;
    return (VF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), in)), 16);
  }

  // Name the block of every latent, where there are at most 16 of more than a latent each.
  bool name_blocks() const {
    if (latents.block_channels == 1 || latents.runs[2] || (rank + latents.block_channels - 1) / latents.block_channels > 16) {
      return false;
    }
    for (int64_t i = 0; i < rank; i++) own.blocks[i] = uint32_t(i / latents.block_channels);
    return true;
  }

  // Codes of one width, without a detour through memory.
  template <bool NAMED>
  INLINE void of_width(int64_t bits, const uint8_t* in, const char* scales, const char* minima, E* out) {
    if (bits == 8) one_width<8, NAMED>(in, scales, minima, out);
    if (bits == 4) one_width<4, NAMED>(in, scales, minima, out);
    if (bits == 2) one_width<2, NAMED>(in, scales, minima, out);
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
    const int64_t bytes = (rank * BITS + 7) / 8;
#pragma GCC unroll 4
    for (int index = 0; index < 8 / BITS; index++) {
      const int64_t begin = index * bytes;
      if (begin >= rank) break;
      for (int64_t i = 0; i < bytes; i += 2 * W) {
        const int64_t j = i + W;
        const VF low = latent<BITS, NAMED>(in + i, bytes - i, index, begin + i, scale, minimum);
        const VF high = latent<BITS, NAMED>(in + j, bytes - j, index, begin + j, scale, minimum);
        _mm512_storeu_si512(out + begin + i, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
      }
    }
  }

  // 16 latents, of which `left` bytes can be read.
  template <int BITS, bool NAMED>
  INLINE VF latent(const uint8_t* in, int64_t left, int index, int64_t channel, VF scale, VF minimum) {
    const __mmask16 some = left >= W ? __mmask16(0xffff) : left > 0 ? __mmask16((1u << left) - 1) : __mmask16(0);
    __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, in));
    if (index) code = _mm512_srli_epi32(code, unsigned(index * BITS));
    if ((index + 1) * BITS < 8) code = _mm512_and_si512(code, _mm512_set1_epi32((1 << BITS) - 1));
    const VF number = (VF)_mm512_cvtepi32_ps(code);
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
