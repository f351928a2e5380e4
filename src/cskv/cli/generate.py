"""`cskv generate`: stream text from a compressed cache and say what the cache really takes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cskv.cli import options as opt
from cskv.cli.common import command, emit, say, set_logging
from cskv.cli.sizes import cache_lines
from cskv.errors import CSKVError, DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from cskv.data.lines import LinesCase

INPUT, SAMPLING = "Input", "Decoding"
Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt itself.", rich_help_panel=INPUT)]
PromptFile = Annotated[
    Path | None, typer.Option("--prompt-file", help="A UTF-8 text file; - is standard input.", rich_help_panel=INPUT)
]
Lines = Annotated[
    int,
    typer.Option("--lines", help="Without a prompt: ask a LongEval record of this many lines.", rich_help_panel=INPUT),
]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the chat template.", rich_help_panel=INPUT)]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", "-a", help="Adapter folder or hub id, instead of a root.", rich_help_panel=opt.FILES),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", help="The most tokens to generate.", rich_help_panel=SAMPLING)
]
Temperature = Annotated[
    float, typer.Option("--temperature", help="0 decodes greedily; above, samples.", rich_help_panel=SAMPLING)
]
CacheImplementation = Annotated[
    str | None,
    typer.Option(
        "--cache-implementation",
        help="transformers' cache. Compressed tokens fit the dynamic one only; others are refused.",
        rich_help_panel=SAMPLING,
    ),
]
Attention = Annotated[
    str,
    typer.Option(
        "--attention",
        help="What reads old tokens: auto, triton, torch or reference read latents; rebuild makes keys and values.",
        rich_help_panel=SAMPLING,
    ),
]
UseOrigin = Annotated[
    bool,
    typer.Option("--use-origin-model", help="The uncompressed baseline.", rich_help_panel=opt.COMPRESSION),
]
UseInit = Annotated[
    bool,
    typer.Option(
        "--use-init-params", help="Untrained SVD or ASVD factors, made now.", rich_help_panel=opt.COMPRESSION
    ),
]  # fmt: skip


@command
def generate(
    model_path: opt.OptionalModelPath = None,
    model_id: opt.ModelId = None,
    adapter: Adapter = None,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    lines: Lines = 100,
    chat: Chat = False,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = 0.0,
    cache_implementation: CacheImplementation = None,
    attention: Attention = "auto",
    k_density: opt.KDensity = 0.2,
    v_density: opt.VDensity = 0.2,
    use_asvd: opt.UseAsvd = None,
    init: opt.Init = None,
    key_factors: opt.KeyFactors = "joint",
    head_groups: opt.HeadGroups = 1,
    k_bits: opt.KBits = 16,
    v_bits: opt.VBits = 16,
    k_block: opt.KBlock = None,
    v_block: opt.VBlock = None,
    use_origin_model: UseOrigin = False,
    use_init_params: UseInit = False,
    use_window: opt.UseWindow = None,
    q_window_size: opt.QWindowSize = 32,
    window: opt.Window = None,
    group: opt.Group = None,
    kv_ckpt_root_path: opt.AdapterRoot = opt.DEFAULT_ADAPTER_ROOT,
    asvd_calib_root: opt.CalibrationRoot = opt.DEFAULT_CALIBRATION_ROOT,
    statistics: opt.Statistics = None,
    attn_impl: opt.AttnImpl = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "auto",
    device_map: opt.DeviceMap = None,
    seed: opt.Seed = 0,
    logging_level: opt.LoggingLevel = "WARNING",
) -> None:
    """Generate text from a compressed cache and print its real bytes beside the uncompressed ones.

    The adapter is `--adapter`, or the folder under `--kv-ckpt-root-path` that the model id and the compression options
    name, as `cskv train` wrote it. With `--adapter`, the window options change the adapter's own window.

    Examples:

    * `cskv generate --adapter outputs/adapters/my-model/k0.2-v0.2-asvd-window32-group32 --prompt "Once upon a time"`
    * `cskv generate --model_path my-model --k_density 0.2 --v_density 0.2 --use_asvd --use_window --lines 200`
    * `cskv generate --model_path my-model --use_init_params --k_density 0.5 --v_density 0.5 --prompt-file book.txt`
    * `cskv generate --model_path my-model --use_origin_model --prompt "The uncompressed baseline"`
    """
    set_logging(logging_level)
    from cskv.cli import choose
    from cskv.cli.loading import load_model, load_tokenizer

    text, expected = _prompt(prompt, prompt_file, lines)
    wanted = choose.AdapterChoice(
        model_path=model_path,
        model_id=model_id,
        adapter=adapter,
        origin=use_origin_model,
        init_only=use_init_params,
        settings=choose.settings_from(
            k_density=k_density,
            v_density=v_density,
            use_asvd=use_asvd,
            init=init,
            key_factors=key_factors,
            head_groups=head_groups,
            k_bits=k_bits,
            v_bits=v_bits,
            k_block=k_block,
            v_block=v_block,
            use_window=use_window,
            q_window_size=q_window_size,
            window=window,
            group=group,
        ),
        window_given=(use_window, window, group) != (None, None, None),
        root=kv_ckpt_root_path,
        statistics=statistics,
        calibration_root=asvd_calib_root,
    )
    compressor, base = wanted.find()
    tokenizer = load_tokenizer(base)
    input_ids = _encode(tokenizer, text, chat)
    model = load_model(base, attn_impl=attn_impl, dtype=dtype, device=device, device_map=device_map)
    if use_init_params and not use_origin_model:
        compressor = wanted.initial(model, base)
    if compressor is not None:
        import cskv

        cskv.attach(model, compressor, attention=attention)
    result = _run(model, tokenizer, input_ids, max_new_tokens, temperature, cache_implementation, seed)
    if expected is not None:
        from cskv.data.lines import score

        result |= {"expected": expected, "correct": score(result["text"], expected)}
        say(f"expected {expected}: {'correct' if result['correct'] else 'wrong'}")
    emit({"command": "generate", "model": base, "compressed": compressor is not None, **result})


def _prompt(prompt: str | None, prompt_file: Path | None, lines: int) -> tuple[str, int | None]:
    """The text to continue and, for a LongEval record, the number that is asked for."""
    if prompt is not None and prompt_file is not None:
        raise DataError("give either --prompt or --prompt-file, not both")
    if prompt_file is not None:
        prompt = _read(prompt_file)
    if prompt is None:
        case = _record(lines)
        return case.prompt, case.expected
    if not prompt.strip():
        raise DataError("the prompt is empty; give some text with --prompt or --prompt-file")
    return prompt, None


def _record(lines: int) -> LinesCase:
    from cskv.data.lines import make_case

    if lines < 1:
        raise DataError(f"lines is {lines}; expected a record of at least 1 line")
    try:
        return make_case(lines, seed=0)
    except ImportError as error:
        raise DataError(f"without a prompt a LongEval record is asked, and its words are missing: {error}") from error


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _encode(tokenizer: Any, text: str, chat: bool) -> torch.Tensor:
    """(1, tokens) token ids of the prompt."""
    if not chat:
        return tokenizer(text, return_tensors="pt")["input_ids"]
    if not tokenizer.chat_template:
        raise CSKVError("this model's tokenizer has no chat template; leave --chat out")
    messages = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded["input_ids"]


def _run(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float,
    cache_implementation: str | None,
    seed: int,
) -> dict[str, Any]:
    """Stream the continuation to standard output and return it with the cache's sizes, JSON-ready."""
    import torch
    from transformers import TextStreamer, set_seed

    import cskv
    from cskv.models.compat import output_cache

    if max_new_tokens < 1 or temperature < 0:
        raise CSKVError(
            f"max-new-tokens is {max_new_tokens} and temperature {temperature}; expected at least 1 and at least 0"
        )
    set_seed(seed)
    kwargs: dict[str, Any] = {"do_sample": temperature > 0}
    kwargs |= {"temperature": temperature} if temperature > 0 else {"temperature": None, "top_p": None, "top_k": None}
    kwargs |= {"cache_implementation": cache_implementation} if cache_implementation else {}
    input_ids = input_ids.to(model.device)
    start = time.perf_counter()
    outputs = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        return_dict_in_generate=True,
        **kwargs,
    )
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
