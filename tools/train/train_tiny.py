"""Trains the model that is embedded in pyengine, from seed 1729, with transformers' own code.

    python tools/train/train_tiny.py -o OUT                # the whole of it: 40 minutes of two cores
    python tools/train/train_tiny.py -o OUT --resume       # goes on from OUT/state.pt
    python tools/train/train_tiny.py -o OUT --steps 3      # the same on a small scale: does it run

A few million parameters in the shape of the 35B-A3B: three delta-net layers and one of full
attention, 16 routed experts and a shared one, its own tokenizer of 2,048.  It learns the King James
Bible (`tiny_text.py` says whence and under which terms): runs of chapters, and conversations made of
its verses, a fifth of what is read, and half at last.  Whole chapters are held out.

OUT then has a Hugging Face checkpoint in bfloat16, the same as `bf16.gguf`, and the chapters held out,
`held_out.txt`.  `tests/trained/bf16.gguf` and `tests/held_out/kjv.txt` are copies, and
`tools/golden/make_default.py` makes the package's files of the first.

The same processor, packages and number of threads give the same bytes: seen on a few steps, not on all
1,300, of which the committed model's ran in two parts (--resume, after 800).  Other processors sum in
other orders, and what comes of that is another model of about the same quality.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

import tokenizers
from gguf_writer import write_gguf
from tiny_text import (
    CHAT_TEMPLATE,
    CONTROL_TOKENS,
    END_OF_TEXT,
    SEED,
    THINK_TOKENS,
    Conversations,
    bible_text,
    chapters,
    split,
    train_tokenizer,
)

from pyengine.text.gguf_vocabulary import CONTROL, NORMAL, USER_DEFINED

CONFIG = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "dtype": "bfloat16",
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
    },
}
STEPS, WARMUP, DECAY = 1300, 40, 0.35  # DECAY: the last part of the steps, in which the rate falls to 0
BATCH, WINDOW = 2, 1024  # sequences in a step, tokens in a sequence
LEARNING_RATE, WEIGHT_DECAY, MOMENTUM = 4e-3, 0.1, 0.95
BALANCE = 0.01  # weight of the loss that keeps experts alive
CONVERSATIONS, CONVERSATIONS_AT_LAST = 2600, 10400  # in an epoch, beside all chapters
SAVE_EVERY = 50


# ---- data ----------------------------------------------------------------------------------------


class Data:
    """Token ids of what is read, of a training of so many steps.

    Epoch by epoch the same chapters in other runs and another order, and other conversations; in the
    last part, in which the learning rate falls, about as much of one as of the other.
    """

    def __init__(self, deb: Path | None, steps: int):
        self.training, self.validation, self.held_out = split(chapters(bible_text(deb)))
        self.conversations = Conversations(self.training)
        samples = self.draw_conversations(0, CONVERSATIONS)[: CONVERSATIONS // 4]
        self.tokenizer = train_tokenizer(
            [chapter.text for chapter in self.training] + samples, CONFIG["vocab_size"]
        )
        self.end = self.tokenizer.token_to_id(END_OF_TEXT)
        self.chapters = self.encode([chapter.text for chapter in self.training])
        self.follows = [
            (a.book, a.number + 1) == (b.book, b.number) for a, b in zip(self.training, self.training[1:])
        ]
        self.last_part = math.ceil((1 - DECAY) * steps)
        self.steps_per_epoch = len(self.stream(0, CONVERSATIONS)) // (BATCH * WINDOW)
        self.epoch, self.windows = None, None

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    def draw_conversations(self, epoch: int, count: int) -> list[str]:
        generator = random.Random(f"{SEED} conversations {epoch}")
        return [self.conversations.draw(generator) for _ in range(count)]

    def stream(self, epoch: int, conversations: int) -> list[int]:
        """One epoch's documents, one after another."""
        generator = random.Random(f"{SEED} order {epoch}")
        documents = self.encode(self.draw_conversations(epoch, conversations))
        run: list[int] = []
        for i, ids in enumerate(self.chapters):
            run = run + ids
            if i == len(self.follows) or not self.follows[i] or generator.random() < 0.4:
                documents.append([*run, self.end])
                run = []
        generator.shuffle(documents)
        return [token for document in documents for token in document]

    def batch(self, step: int) -> torch.Tensor:
        """int64 [BATCH, WINDOW + 1], of step 0, 1, ..."""
        epochs_before = -(-self.last_part // self.steps_per_epoch)
        if step < self.last_part:
            epoch, index = divmod(step, self.steps_per_epoch)
        else:
            epoch, index = divmod(step - self.last_part, self.steps_per_epoch)
            epoch += epochs_before
        if epoch != self.epoch:
            ids = torch.tensor(
                self.stream(epoch, CONVERSATIONS if epoch < epochs_before else CONVERSATIONS_AT_LAST)
            )
            starts = torch.arange(self.steps_per_epoch * BATCH) * WINDOW % (len(ids) - WINDOW)
            order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(SEED + epoch))
            self.epoch, self.windows = epoch, (ids, starts[order])
        ids, starts = self.windows
        return torch.stack(
            [ids[start : start + WINDOW + 1] for start in starts[index * BATCH : (index + 1) * BATCH]]
        )


# ---- the model -----------------------------------------------------------------------------------


def experts_in_order(module, x, selected, weights):
    """transformers' experts [T, hidden], each run once on all its tokens: the training's speed.

    selected [T, k] int64, weights [T, k].
    """
    flat = selected.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=module.num_experts).tolist()
    rows = x[order // selected.shape[1]].split(counts)
    outputs = []
    for row, gate_up, down in zip(rows, module.gate_up_proj.unbind(), module.down_proj.unbind()):
        gate, up = F.linear(row, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, down))
    weighted = torch.cat(outputs) * weights.flatten()[order, None].to(x.dtype)
    return weighted[order.argsort()].view(len(x), selected.shape[1], -1).sum(dim=1)


ALL_EXPERTS_FUNCTIONS["in_order"] = experts_in_order


def new_model(config: dict = CONFIG, seed: int = SEED) -> Qwen3_5MoeForCausalLM:
    """float32, from the seed.  Time steps start as Mamba 2's do: decays from slow to fast."""
    torch.manual_seed(seed)
    config = Qwen3_5MoeTextConfig(
        **{key: value for key, value in config.items() if key != "dtype"},
        use_cache=False,
        initializer_range=0.04,
        experts_implementation="in_order",
    )
    model = Qwen3_5MoeForCausalLM(config).float()
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            step = torch.empty_like(parameter).uniform_(math.log(0.001), math.log(0.1)).exp()
            parameter.data = step + torch.log(-torch.expm1(-step))  # softplus backwards
    return model


def loss_of(model, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> mean negative log-likelihood of a token in nats, and the experts' balance (1: even)."""
    logits, balance = logits_of(model, batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), balance


def logits_of(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T] -> float32 [B, T, vocabulary], and the experts' balance (1: even)."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=ids, output_router_logits=True)
    k = model.config.num_experts_per_tok
    balance = torch.stack([balance_of(router, k) for router in output.router_logits]).mean()
    return output.logits.float(), balance


def balance_of(router_logits: torch.Tensor, k: int) -> torch.Tensor:
    """Sum over a layer's experts of share of tokens times mean probability, times their number."""
    probabilities = router_logits.float().softmax(-1)
    experts = probabilities.shape[-1]
    chosen = probabilities.topk(k, dim=-1).indices.flatten()
    share = torch.bincount(chosen, minlength=experts) / len(chosen)
    return experts * (share * probabilities.mean(dim=0)).sum()


# ---- optimising ----------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices [.., rows, cols]; the step's root mean square is that of
    0.2 * learning rate, so that AdamW's learning rate fits.  Source: Jordan et al., "Muon" (2024);
    Liu et al., "Muon is scalable for LLM training" (2025)."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                update = orthogonal(parameter.grad.lerp(momentum, MOMENTUM))
                parameter.mul_(1 - group["lr"] * WEIGHT_DECAY)
                parameter.add_(update, alpha=-0.2 * group["lr"] * max(parameter.shape[-2:]) ** 0.5)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """[.., rows, cols] with singular values near 1: five Newton-Schulz steps."""
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).bfloat16()
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = y @ y.mT
        y = 3.4445 * y + (-4.7750 * square + 2.0315 * square @ square) @ y
    return (y.mT if tall else y).float()


def optimizers(model) -> list[torch.optim.Optimizer]:
    """Muon for the layers' large matrices, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        large = parameter.ndim >= 2 and min(parameter.shape[-2:]) >= 32 and "embed" not in name
        (matrices if large else others).append(parameter)
    return [
        Muon(matrices, {"lr": LEARNING_RATE}),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """Of the learning rate: up, level, and down over the last part."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


# ---- training ------------------------------------------------------------------------------------


def train(out: Path, steps: int, deb: Path | None, resume: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    data, model = Data(deb, steps), new_model()
    optimizing, first, log = optimizers(model), 0, []
    if resume:
        state = torch.load(out / "state.pt")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizing, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first, log = state["step"], state["log"]
    start = time.monotonic()
    print(
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters; an epoch is "
        f"{data.steps_per_epoch} steps of {BATCH * WINDOW} tokens",
        flush=True,
    )
    for step in range(first, steps):
        loss, balance = one_step(model, optimizing, data.batch(step), rate(step, steps))
        log.append((step, loss, balance, time.monotonic() - start))
        if (step + 1) % 10 == 0:
            recent = np.mean([entry[1] for entry in log[-10:]])
            print(
                f"step {step + 1}/{steps}  loss {recent:.3f}  balance {balance:.3f}  "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_state(out / "state.pt", model, optimizing, step + 1, log)
        if (step + 1) % (5 * SAVE_EVERY) == 0:
            print(f"step {step + 1}  validation {report(data, model, data.validation)}", flush=True)
    write(out, data.tokenizer, model.state_dict())
    (out / "held_out.txt").write_text("".join(chapter.text for chapter in data.held_out))
    print(f"validation {report(data, model, data.validation)}")
    print(f"held out   {report(data, model, data.held_out)}")


def one_step(model, optimizing, batch, rate) -> tuple[float, float]:
    loss, balance = loss_of(model, batch)
    descend(model, optimizing, loss + BALANCE * balance, rate)
    return loss.item(), balance.item()


def descend(model, optimizing, loss: torch.Tensor, rate: float) -> None:
    """One step down the loss, at a part of the learning rate."""
    for optimizer in optimizing:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizing:
        optimizer.step()


def save_state(path: Path, model, optimizing, step: int, log: list) -> None:
    torch.save(
        {
            "model": model.state_dict(),
            "optimizers": [each.state_dict() for each in optimizing],
            "step": step,
            "log": log,
        },
        path.with_suffix(".new"),
    )
    os.replace(path.with_suffix(".new"), path)


@torch.no_grad()
def report(data: Data, model, part) -> str:
    """The perplexity of chapters, each by itself after the end of another text."""
    total, tokens = 0.0, 0
    for ids in data.encode([chapter.text for chapter in part]):
        for start in range(0, len(ids), WINDOW):
            batch = torch.tensor([[data.end, *ids[start : start + WINDOW]]])
            total += loss_of(model, batch)[0].item() * (batch.shape[1] - 1)
            tokens += batch.shape[1] - 1
    size = sum(len(chapter.text) for chapter in part)
    return (
        f"perplexity {math.exp(total / tokens):.2f} per token, "
        f"{total / math.log(2) / size:.3f} bits per byte, {tokens} tokens, {size} bytes"
    )


# ---- files ---------------------------------------------------------------------------------------


def write(out: Path, tokenizer: tokenizers.Tokenizer, weights: dict[str, torch.Tensor]) -> None:
    """The checkpoint: weights in bfloat16, A_log float32; configuration, tokenizer; and a GGUF."""
    weights = {
        name: tensor.clone() if name.endswith("A_log") else tensor.bfloat16()
        for name, tensor in weights.items()
        if name != "lm_head.weight"
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    ends = [tokenizer.token_to_id(text) for text in ("<|im_end|>", END_OF_TEXT)]
    config = {**CONFIG, "eos_token_id": ends[0], "pad_token_id": ends[1]}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": ends, "pad_token_id": ends[1]}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer.save(str(out / "tokenizer.json"))
    write_gguf(
        out / "bf16.gguf",
        config,
        weights,
        file_type="BF16",
        name="pyengine tiny",
        tokenizer=gguf_tokenizer(tokenizer),
    )


def gguf_tokenizer(tokenizer: tokenizers.Tokenizer) -> dict:
    """In the form that `write_gguf` takes."""
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=ids.get)
    kinds = dict.fromkeys(CONTROL_TOKENS, CONTROL) | dict.fromkeys(THINK_TOKENS, USER_DEFINED)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokens": tokens,
        "types": [kinds.get(token, NORMAL) for token in tokens],
        "merges": [" ".join(pair) for pair in merges],
        "eos_id": ids["<|im_end|>"],
        "pad_id": ids[END_OF_TEXT],
        "chat_template": CHAT_TEMPLATE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--deb", type=Path, help="the Debian package bible-kjv-text, if already here")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    parser.add_argument("-t", "--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    train(options.out, options.steps, options.deb, options.resume)


if __name__ == "__main__":
    main()
