// What a call of attention is told: plain numbers and addresses, written by ../arguments.py in this order.
//
// Every field takes 8 bytes. Strides are in bytes. An address of 0 stands for a tensor that there is not.
#pragma once
#include <cstdint>

namespace cskv {

enum Kind : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, PACKED = 3, BOOL = 4 };

// Latents of sealed tokens: rows of numbers or of codes, in buffers or in pages.
struct Latents {
  const char* data;
  int64_t kind, rank, batch, row;              // numbers per token; from sequence to sequence, from token to token
  const char *scales, *minima;                 // bfloat16, of the blocks of codes
  int64_t parameters_batch, parameters_row;    // the strides of both
  int64_t block_tokens, block_channels;        // of a block
  const int64_t* runs;                         // bits and channels of every run, then two zeros
  const int64_t* token_block;                  // the row of scales and minima of every token; 0: one after another
  int64_t block_size, page, parameters_page;   // tokens of a page (0: no pages); from page to page
};

// Factors and what follows from them: rows of numbers of the kind that is computed in.
struct Factors {
  const char* up;
  int64_t row;
  const char* bias;
};

// What every step changes, and behind it what stays while no token is sealed.
struct Call {
  int64_t batch, q_heads, kv_heads, added, head_dim;  // added: new tokens
  int64_t kind;                                       // of the query, factors and exact tokens
  const char* query;
  int64_t query_batch, query_head, query_token;
  const char *keys, *values;  // of exact tokens
  int64_t keys_batch, keys_head, keys_token, values_batch, values_head, values_token;
  int64_t recent;
  const char* exists;  // (batch, recent): bool
  int64_t exists_batch;
  double scaling, softcap;  // 0: none
  const char* mask;
  int64_t mask_kind, mask_batch, mask_head, mask_query, mask_token;
  const char* sink_logits;  // fp32, (q_heads)
  char* output;             // of the query's kind, (batch, q_heads, added, head_dim), packed together

  int64_t sealed, groups;
  Latents k, v;
  const char* table;  // of pages
  int64_t table_batch, table_bytes;
  const char* lengths;
  int64_t lengths_bytes;
  Factors k_factors, v_factors;
  int64_t rotary;  // channels of a head that are rotated, when keys are rebuilt or their constant is added
  const char *cos, *sin;
  int64_t cos_batch, cos_row, sin_batch, sin_row, is_symmetric;
  int64_t rebuilds;      // whether keys are normalised or rotated after they were rebuilt
  const char* norm;      // weights of that norm
  double norm_eps;
  const char* constant;  // fp32, (kv_dim): what latents leave out of keys
};

}  // namespace cskv
