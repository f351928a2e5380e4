"""Train the tiny model: `python tinymodel/train.py --run /tmp/tinymodel/run`. It resumes where it stopped."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from pathlib import Path

import torch
from batches import FIRST_DIGIT, Batch, BatchMaker, Stage
from initialise import align_outputs, start_with_induction
from rich.console import Console
from tokenizer import load_tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LONG = {"shared_nouns": 0.2, "prefixed": 0.3}
STAGES = [
    Stage("short", 2_400_000, 512, 2, 6, lines=(4, 28), official=0.3, shared_nouns=0.2),
    Stage("medium", 2_500_000, 1024, 1, 3, lines=(8, 60), official=0.5, shared_nouns=0.2, prefixed=0.2),
    Stage("long", 2_400_000, 2048, 1, 2, lines=(20, 150), official=0.5, shared_nouns=0.2, prefixed=0.3),
    Stage("aligned", 1_200_000, 2048, 1, 2, lines=(20, 150), official=0.5, shared_nouns=0.2, prefixed=0.3, align=True),
    Stage("full", 500_000, 4096, 1, 1, lines=(40, 210), official=0.6, align=True, **LONG, keep_words=True),
    Stage("decay", 475_136, 4096, 1, 1, lines=(40, 210), official=0.6, **LONG, keep_words=True, rate=(1.0, 0.83)),
    Stage("end", 1_800_000, 2560, 1, 2, lines=(40, 210), official=0.6, **LONG, keep_words=True, rate=(0.83, 0.0)),
]
SEED = 0
RATE = 2e-3
WARMUP_STEPS = 60
CHECKPOINT_SECONDS = 180
LOG_STEPS = 25


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Four layers, four key-value heads of 64: a KV width of 256, as wide as the hidden state."""
    return LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )


class Meter:
    """Means of the step results since it was made, and the time a step took."""

    def __init__(self) -> None:
        self.started, self.steps, self.sums = time.monotonic(), 0, {}

    def add(self, results: dict[str, float]) -> None:
        self.steps += 1
        for name, value in results.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        return {name: round(value / self.steps, 4) for name, value in self.sums.items()}

    def seconds_per_step(self) -> float:
        return (time.monotonic() - self.started) / self.steps


class Trainer:
    """Model, optimizers and the place in the stage table; knows how to save and restore all of it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.tokenizer = load_tokenizer(run / "tokenizer")
        self.batches = BatchMaker(self.tokenizer, SEED)
        self.words = self.batches.key_words()
        torch.manual_seed(SEED)
        self.model = LlamaForCausalLM(tiny_config(self.tokenizer))
        start_with_induction(self.model)
        hidden = self.model.model.layers.parameters()
        matrices = [parameter for parameter in hidden if parameter.ndim == 2]
        others = [parameter for parameter in self.model.parameters() if all(parameter is not m for m in matrices)]
        self.optimizers = [
            torch.optim.Muon([{"params": matrices, "scale": 1.0}], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([{"params": others, "scale": 0.5}], betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0),
        ]
        self.stage, self.step, self.total_steps, self.tokens = 0, 0, 0, 0
        self.loss = torch.compile(self._losses, dynamic=False)
        self.console = Console()
        self.stopping = False
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        """On SIGTERM finish the step, save, leave."""
        self.stopping = True

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean loss over the answers and over the text, and the share of the numbers' first digits predicted right."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model(input_ids=batch.inputs, use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden.flatten(0, 1)[batch.positions])
        losses = functional.cross_entropy(logits.float(), batch.targets, reduction="none") * batch.weights
        split = batch.num_record
        first = batch.weights[:split] == FIRST_DIGIT
        right = (logits[:split].argmax(-1) == batch.targets[:split]) & first
        record = losses[:split].sum() / batch.weights[:split].sum().clamp(min=1.0)
        text = losses[split:].sum() / batch.weights[split:].sum().clamp(min=1.0)
        return record, text, right.sum() / first.sum().clamp(min=1.0)

    def train_step(self, stage: Stage) -> dict[str, float]:
        progress = self.step * stage.tokens_per_step / stage.tokens
        factor = stage.rate[0] + (stage.rate[1] - stage.rate[0]) * min(1.0, progress)
        factor *= min(1.0, (self.total_steps + 1) / WARMUP_STEPS)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * factor * group["scale"]
        record, text, right = self.loss(self.batches.batch(stage, self.step))
        (record + text).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        tables = [self.model.lm_head.weight, self.model.model.embed_tokens.weight] if stage.keep_words else []
        kept = [table.detach()[self.words] for table in tables]
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for table, rows in zip(tables, kept, strict=True):
            table.data[self.words] = rows
        self.step, self.total_steps = self.step + 1, self.total_steps + 1
        self.tokens += stage.tokens_per_step
        return {"record": record.item(), "text": text.item(), "found": right.item()}

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "place": (self.stage, self.step, self.total_steps, self.tokens),
        }
        partial = self.run / "state.partial"
        torch.save(state, partial)
        os.replace(partial, self.run / "state.pt")

    def restore(self) -> None:
        if (self.run / "state.pt").exists():
            state = torch.load(self.run / "state.pt")
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.stage, self.step, self.total_steps, self.tokens = state["place"]

    def export(self, folder: Path) -> None:
        """Write model and tokenizer in Hugging Face format, weights in bfloat16."""
        model = LlamaForCausalLM(self.model.config)
        model.load_state_dict(self.model.state_dict())
        model.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            do_sample=False,
        )
        model.to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every release of transformers knows
        kept = {
            name: value for name, value in config.items() if name not in ("backend", "is_local", "local_files_only")
        }
        path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")

    def train(self) -> None:
        while self.stage < len(STAGES) and not self.stopping:
            self._train_stage(STAGES[self.stage])
            if not self.stopping:
                self.stage, self.step = self.stage + 1, 0
            self.save()
            torch.compiler.reset()

    def _train_stage(self, stage: Stage) -> None:
        steps = stage.tokens // stage.tokens_per_step
        if stage.align and self.step == 0:
            align_outputs(self.model, self.words)
        meter = Meter()
        saved = time.monotonic()
        while self.step < steps and not self.stopping:
            meter.add(self.train_step(stage))
            if self.step % LOG_STEPS == 0 or self.step >= steps:
                self.log(stage, steps, meter)
                meter = Meter()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()

    def log(self, stage: Stage, steps: int, meter: Meter) -> None:
        """One line to the console, one JSON line to the run's log."""
        minutes_left = meter.seconds_per_step() * (steps - self.step) / 60
        entry = {
            "time": time.strftime("%H:%M:%S"),
            "stage": stage.name,
            "step": self.step,
            "of": steps,
            "tokens": self.tokens,
            **meter.means(),
            "tokens_per_second": round(stage.tokens_per_step / meter.seconds_per_step()),
            "minutes_left_in_stage": round(minutes_left, 1),
        }
        with (self.run / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        self.console.print(" ".join(f"{name} {value}" for name, value in entry.items()), highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder for the log and the training state")
    parser.add_argument("--export", type=Path, help="write the saved state to this folder instead of training")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments.run)
    trainer.restore()
    if arguments.export:
        trainer.export(arguments.export)
    else:
        trainer.train()


if __name__ == "__main__":
    main()
