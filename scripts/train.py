"""Trains a causal language model: `accelerate launch scripts/train.py --model sdnc-tiny --dataset prose --output runs/first`.

Settings come from `--config FILE.yaml` and from flags, which win; `--help` lists them all. What is reusable lives in memzoo/training.
"""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, send_to_device, set_seed

from memzoo.training import checkpoint, run
from memzoo.training.data import Data, load_data
from memzoo.training.errors import BadInput, refusing, run_or_refuse
from memzoo.training.export import export
from memzoo.training.loss import batch_loss, items
from memzoo.training.model import build_model, load_tokenizer
from memzoo.training.optim import build_optimizer, learning_rate, set_learning_rate
from memzoo.training.progress import Reporter, quiet
from memzoo.training.settings import Settings, parse_settings

# Gloo's process group can wait for ever in its destructor: it joins its threads while it holds the interpreter's lock that one of them
# wants. So a process of several keeps what refers to the group until it leaves, and leaves without destroying it.
_KEPT: list = []


def build_accelerator(settings: Settings) -> Accelerator:
    """Devices, precision and trackers. Batches and accumulation are ours: a step's examples depend on the step only."""
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    tracker = settings.tracker
    if tracker == "auto":
        tracker = "tensorboard" if is_tensorboard_available() else "none"
    with refusing("--precision or --tracker"):
        return Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision={"fp32": "no", "bf16": "bf16"}[precision],
            log_with=None if tracker == "none" else tracker,
            project_dir=settings.output,
        )


def evaluate(accelerator: Accelerator, model: torch.nn.Module, data: Data, settings: Settings) -> dict[str, float]:
    """Mean loss over the held-out examples, and the share of answer tokens that were right where there are answers."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)  # loss, items, right, answers
    loader, mine = data.evaluation_loader(settings, accelerator.process_index, accelerator.num_processes)
    with torch.no_grad():
        for number, batch in enumerate(loader):
            batch = send_to_device(batch, accelerator.device)
            loss, right, answers = batch_loss(model, batch, 1.0)
            if number < mine:  # the rest are there so that every process makes as many forwards
                sums += torch.stack([loss.double(), items(batch), right.double(), answers.double()])
    model.train()
    loss, count, right, answers = accelerator.reduce(sums, "sum").tolist()
    return {"eval_loss": loss / count} | ({"eval_accuracy": right / answers} if answers else {})


def optimizer_step(accelerator: Accelerator, model: torch.nn.Module, optimizer, batches: list[dict], clip: float):
    """One step on a window of batches; returns this process's part of the mean loss, and the gradient's norm.

    The mean is over all items of all batches of all processes: each part is divided by their number.
    """
    batches = [send_to_device(batch, accelerator.device) for batch in batches]
    total = accelerator.reduce(torch.stack([items(batch) for batch in batches]).sum(), "sum").float()
    part = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        with accelerator.no_sync(model) if number < len(batches) else nullcontext():
            loss, _, _ = batch_loss(model, batch, total)
            accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes, ours is a sum
        part += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), clip or float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    return part, norm


def train(settings: Settings) -> dict[str, float]:
    """One run, from its first step or the one it goes on from, to its last; returns the last values logged."""
    output = Path(settings.output)
    start = run.inspect(settings)
    if run.complete(settings):
        if os.environ.get("RANK", "0") == "0":
            print(f"{output}: the run is complete, its model is in {output / run.FINAL}")
        return {}
    accelerator = build_accelerator(settings)
    rank, processes = accelerator.process_index, accelerator.num_processes
    tokenizer = load_tokenizer(settings)
    model = build_model(settings, tokenizer)
    with accelerator.main_process_first():  # the others find the tokenised text in the cache
        data = load_data(settings, tokenizer)
    state = {"processes": processes, "examples": len(data.train), "tokens": 0, "seconds": 0.0, "values": {}}
    state |= {"loss": 0.0, "steps": 0}  # the sum of losses, and their number, since the last line of the log
    if start:
        state = checkpoint.read_state(output, start, state)

    accelerator.wait_for_everyone()  # all is well, and every process has looked at the folder: now it may change
    if accelerator.is_main_process:
        run.prepare(settings, start)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tracker", config={name: str(value) for name, value in settings.identity().items()})
    parameters = sum(p.numel() for p in model.parameters())
    if settings.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, build_optimizer(model, settings))
    set_seed(settings.seed + rank)  # dropout differs between processes
    if start:
        checkpoint.load(accelerator, output, start)

    with Reporter(accelerator, output / run.LOG, start, settings.steps) as report:
        report.say(f"model: {settings.model}, {parameters:,} parameters, {processes} x {accelerator.device.type}")
        report.say(f"data: {data.about}")
        if settings.resume:
            report.say(f"going on after step {start}" if start else "no checkpoint to go on from: starting anew")
        batches = iter(data.train_loader(settings, start, rank, processes))
        loss_sum = torch.full((), state["loss"] if accelerator.is_main_process else 0.0, device=accelerator.device)
        clock, tokens, values = time.perf_counter(), state["tokens"], state["values"]
        model.train()
        last = min(settings.steps, settings.stop_after or settings.steps)
        for step in range(start + 1, last + 1):
            set_learning_rate(optimizer, learning_rate(settings, step))
            window = [next(batches) for _ in range(settings.gradient_accumulation)]
            part, norm = optimizer_step(accelerator, model, optimizer, window, settings.clip)
            loss_sum += part
            state["steps"] += 1
            state["tokens"] += sum(batch["input_ids"].numel() for batch in window) * processes
            report.step(step)

            if step % settings.log_every == 0 or step == settings.steps:
                loss = accelerator.reduce(loss_sum, "sum").item() / state["steps"]
                elapsed = time.perf_counter() - clock
                state |= {"steps": 0, "seconds": state["seconds"] + elapsed}
                logged = {"loss": loss, "learning_rate": learning_rate(settings, step), "gradient_norm": float(norm)}
                logged |= {"tokens": state["tokens"], "tokens_per_second": (state["tokens"] - tokens) / elapsed}
                report.record(step, logged)
                values |= logged
                if not math.isfinite(loss):
                    raise BadInput(f"the loss is {loss} at step {step}: try a lower --learning_rate or a longer --warmup")
                loss_sum.zero_()
                clock, tokens = time.perf_counter(), state["tokens"]

            pause = time.perf_counter()
            if data.evaluation is not None and (step == settings.steps or run.due(step, settings.eval_every)):
                evaluated = evaluate(accelerator, model, data, settings)
                report.record(step, evaluated)
                values |= evaluated
            if run.due(step, settings.save_every) or step == last < settings.steps:
                state |= {"loss": accelerator.reduce(loss_sum, "sum").item(), "values": values}
                checkpoint.save(accelerator, output, step, state, settings.keep)
            clock += time.perf_counter() - pause

        if last == settings.steps:
            facts = {"parameters": parameters, "steps": last, "tokens": state["tokens"], "seconds": round(state["seconds"], 1)}
            facts |= {name: value for name, value in values.items() if "loss" in name or "accuracy" in name}
            report.say(f"model: {export(accelerator, model, tokenizer, settings, facts)}")
        else:
            report.say(f"stopped after step {last}; --resume goes on")
    if processes > 1:
        _KEPT.append((accelerator, model))
    return values


def main(argv: list[str] | None = None) -> int:
    settings = parse_settings(argv)
    quiet()
    train(settings)
    return 0


if __name__ == "__main__":
    code = run_or_refuse(main)
    if _KEPT:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
