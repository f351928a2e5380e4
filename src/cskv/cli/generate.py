"""`cskv generate`: stream text from a compressed cache and say what the cache really takes."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cskv
from cskv.cli import options as opt
from cskv.cli.choose import AdapterChoice
from cskv.cli.common import command, emit, say, set_logging
from cskv.cli.groups import CompressionOptions, LoadingOptions
from cskv.cli.settings import MOST_LINES
from cskv.cli.tables import cache_lines
from cskv.errors import CSKVError, DataError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

input_option, decoding_option = opt.panel("Input"), opt.panel("Decoding")
LEAST_TEMPERATURE = 1e-6  # below it, logits divided by it leave fp32


@dataclass(frozen=True)
class DecodingOptions:
    """Options of text generation."""

    max_new_tokens: Annotated[int, decoding_option("--max-new-tokens", "-n", help="The most tokens to generate.")] = 100
    temperature: Annotated[float, decoding_option(help="0 decodes greedily; above, samples.")] = 0.0
    cache_implementation: Annotated[
        str | None,
        decoding_option(help="transformers' cache. Compressed tokens fit the dynamic one only; others are refused."),
    ] = None
    attention: Annotated[
        str,
        decoding_option(
            help="What reads old tokens: auto, triton, cpu, torch or reference, latents; rebuild, keys and values."
        ),
    ] = "auto"
    seed: opt.Seed = 0

    def check(self, compressed: bool) -> None:
        """Find out before the model is loaded that it cannot generate so.

        Raises:
            CSKVError: a number is out of range, or there is no such cache or attention, or not with latents.
        """
        import torch
        from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

        if self.max_new_tokens < 1 or not (self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE):
            raise CSKVError(
                f"max-new-tokens is {self.max_new_tokens} and temperature {self.temperature}; expected at least 1, and "
                f"0 or at least {LEAST_TEMPERATURE}"
            )
        # Streaming is not for paged caches, and offloading is from a GPU.
        here = {name for name in ALL_CACHE_IMPLEMENTATIONS if torch.cuda.is_available() or "offloaded" not in name}
        known = ["dynamic"] if compressed else sorted({"dynamic", *here} - {"paged"})
        if self.cache_implementation not in (None, *known):
            reason = ", which cannot hold compressed tokens" if compressed else ""
            raise CSKVError(
                f"cache implementation is {self.cache_implementation!r}{reason}; expected {', '.join(known)}"
            )

    def arguments(self) -> dict[str, Any]:
        """Return them as arguments of transformers' `generate`."""
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            arguments["temperature"] = self.temperature
        else:
            arguments |= {"temperature": None, "top_p": None, "top_k": None}
        return arguments | ({"cache_implementation": self.cache_implementation} if self.cache_implementation else {})


@command
def generate(
    choice: AdapterChoice,
    compression: CompressionOptions,
    decoding: DecodingOptions,
    loading: LoadingOptions,
    prompt: Annotated[str | None, input_option("--prompt", "-p", help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, input_option(help="A UTF-8 text file; - is standard input.")] = None,
    lines: Annotated[int, input_option(help="Without a prompt: ask a LongEval record of this many lines.")] = 100,
    chat: Annotated[bool, input_option("--chat", help="Wrap the prompt in the chat template.")] = False,
    logging_level: opt.LoggingLevel = "WARNING",
) -> None:
    """Generate text from a compressed cache and print its real bytes beside the uncompressed ones.

    The adapter is `--adapter`, or the folder under `--kv-ckpt-root-path` that the model id and the compression options
    name, as `cskv train` wrote it. With `--adapter`, the window options change the adapter's own window.

    Examples:

    * `cskv generate --adapter outputs/adapters/m/k0.2-v0.2-fisher-pca-window32-group32-sinks4-untrained -p "It was"`
    * `cskv generate --model_path my-model --k_density 0.2 --v_density 0.2 --use_asvd --use_window --lines 200`
    * `cskv generate --model_path my-model --use_init_params --k_density 0.5 --v_density 0.5 --prompt-file book.txt`
    * `cskv generate --model_path my-model --use_origin_model --prompt "The uncompressed baseline"`
    """
    set_logging(logging_level)
    from cskv.cli.loading import load_tokenizer

    text, expected = _prompt(prompt, prompt_file, lines)
    choice = replace(choice, model_path=loading.optional_name(choice.model_path))
    compressor, base = choice.find(compression)
    untrained = choice.use_init_params and not choice.use_origin_model
    decoding.check(compressed=untrained or compressor is not None)
    tokenizer = load_tokenizer(base)
    input_ids = _encode(tokenizer, text, chat)
    model = loading.model(base)
    if untrained:
        compressor = choice.initial(model, base, compression.config())
    if compressor is not None:
        cskv.attach(model, compressor, attention=decoding.attention)
    result = _run(model, tokenizer, input_ids, decoding)
    if expected is not None:
        from cskv.data.lines import score

        result |= {"expected": expected, "correct": score(result["text"], expected)}
        say(f"expected {expected}: {'correct' if result['correct'] else 'wrong'}")
    emit({"command": "generate", "model": base, "compressed": compressor is not None, **result})


def _prompt(prompt: str | None, prompt_file: Path | None, lines: int) -> tuple[str, int | None]:
    """Return the text to continue and, for a LongEval record, the number that is asked for."""
    if prompt is not None and prompt_file is not None:
        raise DataError("give either --prompt or --prompt-file, not both")
    if prompt_file is not None:
        prompt = _read(prompt_file)
    if prompt is None:
        return _record(lines)
    if not prompt.strip():
        raise DataError("the prompt is empty; give some text with --prompt or --prompt-file")
    return prompt, None


def _record(lines: int) -> tuple[str, int]:
    from cskv.data.lines import make_case

    if not 1 <= lines <= MOST_LINES:
        raise DataError(f"lines is {lines}; expected a record of at least 1 line and at most {MOST_LINES}")
    try:
        case = make_case(lines, seed=0)
    except ImportError as error:
        raise DataError(f"without a prompt a LongEval record is asked, and its words are missing: {error}") from error
    return case.prompt, case.expected


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _encode(tokenizer: Any, text: str, chat: bool) -> torch.Tensor:
    """Return the (1, tokens) token ids of the prompt."""
    if not chat:
        return tokenizer(text, return_tensors="pt")["input_ids"]
    if not tokenizer.chat_template:
        raise CSKVError("this model's tokenizer has no chat template; leave --chat out")
    messages = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded["input_ids"]


def _run(
    model: Any, tokenizer: PreTrainedTokenizerBase, input_ids: torch.Tensor, decoding: DecodingOptions
) -> dict[str, Any]:
    """Stream the continuation to standard output and return it with the cache's sizes, JSON-ready."""
    import torch
    from transformers import TextStreamer, set_seed

    from cskv.models.compat import output_cache

    set_seed(decoding.seed)
    input_ids = input_ids.to(model.device)
    start = time.perf_counter()
    try:
        outputs = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            return_dict_in_generate=True,
            **decoding.arguments(),
        )
    except ImportError as error:  # of a package behind one of transformers' caches
        raise CSKVError(f"cannot generate with this cache or attention: {first_line(error)}") from error
    seconds = time.perf_counter() - start
    new = outputs.sequences[0, input_ids.shape[1] :]
    cache = output_cache(outputs)
    if cache is None:
        raise CSKVError("generate returned no cache; leave --cache-implementation out")
    sizes = cskv.cache_report(cache, model).to_dict()
    for line in cache_lines(sizes):
        say(line)
    say(f"{len(new)} tokens in {seconds:.1f} s, the prefill of {input_ids.shape[1]} tokens included")
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "prompt_tokens": input_ids.shape[1],
        "new_tokens": len(new),
        "seconds": seconds,
        "cache": sizes,
    }
