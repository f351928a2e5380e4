"""Answers of an engine in processes of its own, as `{"answers": [[tokens], ...], "tokens": size of the pool}`.

Usage: answer_program.py MODEL OPTIONS_AS_JSON PROMPTS_AS_JSON
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    model, options, asked = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(model=model, dtype="float32", max_model_len=512, skip_tokenizer_init=True, **options)
    settings = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], settings, use_tqdm=False)
    size = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    print(json.dumps({"answers": [list(output.outputs[0].token_ids) for output in outputs], "tokens": size}))


if __name__ == "__main__":
    main()
