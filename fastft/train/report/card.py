"""Write the model card, README.md of an exported model: data, recipe and measured figures, all from the run's own files.

The trainer and `fastft export` both call `model_card`. The card gives only the last part of files' paths, which does not
tell where they are.
"""

import html
from collections.abc import Iterable
from typing import Any

from fastft.common.files import short_name
from fastft.common.html import compact, duration, percent, precise, visible
from fastft.config import TrainConfig, sources_of, stages_of
from fastft.train.report.curves import Training
from fastft.train.report.run_dir import Run

LAST_STEPS = 10  # the final loss is their mean, because the loss of one step is noisy

USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{path}")
model = AutoModelForCausalLM.from_pretrained("{path}")
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello!"}}], add_generation_prompt=True, return_tensors="pt"
)
answer = model.generate(**prompt, max_new_tokens=256)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def model_card(run: Run, step: int, path: str = "path/to/this/directory") -> str:
    """The card of the model that `run` had after `step`. `path` is the argument of from_pretrained in the example."""
    run = run.until(step)
    config, facts = run.config, run.facts
    how = "LoRA adapters, merged into it," if config.lora.r else "all of its weights"
    part = (
        "" if step == facts["steps"] else f" This is an intermediate checkpoint: step {step:,} of {facts['steps']:,}."
    )
    sections = [
        _front_matter(facts["model"], bool(config.lora.r)),
        f"# {_inline(run.name)}",
        f"A chat model: {_inline(facts['model'])} with {how} trained on conversations.{part}",
        USE.format(path=path),
        "It was trained with the chat template that its tokenizer carries, and ends its turn with "
        f"`{facts['end_of_turn']}`. The licences of its base model and of the data apply to it, too.",
        "## Data",
        _table(("file", "conversations", "tokens", "trained tokens", "used"), _data_rows(run)),
        f"Chat template: {_inline(facts['template'])}. The loss covers the assistant's answers and their end-of-turn tokens, "
        f"nothing else. Conversations are packed into rows of {config.seq_len:,} tokens and do not attend to each other.",
        "## Recipe",
        _table(("setting", "value"), recipe(run, step)),
        "## Measured",
        _table(("figure", "value"), measured(run)),
        "The training loss is the mean over the trained tokens of a step, the held-out loss the mean over all trained tokens "
        "of the held-out files. MFU counts neither padding nor what gradient checkpointing computes again.",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(model: str, adapters: bool) -> str:
    import yaml

    values = {
        "base_model": model,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fastft", "sft", "conversational", *(["lora"] if adapters else [])],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _data_rows(run: Run) -> Iterable[tuple[str, ...]]:
    """The rows of the card's table of files: those of all stages, and the held-out ones."""
    facts = run.facts
    parts = [(f"stage {i}" if len(facts["data"]) > 1 else "", files) for i, files in enumerate(facts["data"], 1)]
    for stage, files in [*parts, ("held out", facts["eval_data"])]:
        for file in files:
            counts = (f"{file[key]:,}" for key in ("conversations", "tokens", "trained_tokens"))
            often = "not trained on" if stage == "held out" else _often(file, stage)
            yield file["file"], *counts, often


def _often(file: dict[str, Any], stage: str) -> str:
    """How often the conversations of a file are trained on."""
    times = "once an epoch" if file["weight"] == 1 else f"{precise(file['weight'])} times an epoch"
    epochs = f", first {file['epochs']} epochs only" if file["epochs"] else ""
    return f"{stage + ': ' if stage else ''}{times}{epochs}"


def recipe(run: Run, step: int) -> list[tuple[str, str]]:
    """(setting, value) of every setting that the result depends on."""
    config, facts = run.config, run.facts
    rows = [
        ("trained", _what_is_trained(config)),
        ("steps", f"{step:,} of {facts['steps']:,}"),
        ("batch", f"{config.global_batch_size:,} rows x {config.seq_len:,} tokens"),
        (
            "sequence length",
            f"{config.seq_len:,} tokens{'' if config.extend == 'none' else f', positions scaled ({config.extend})'}",
        ),
    ]
    for number, (stage, total) in enumerate(zip(stages_of(config), facts["steps_of_stages"]), 1):
        name = f"stage {number}: " if config.stages else ""
        files = ", ".join(short_name(source.path) for source in sources_of(stage.data))
        rows += [(f"{name}data", f"{files}; {total:,} steps")] if config.stages else []
        rows += [
            (f"{name}epochs", _epochs(stage)),
            (f"{name}peak learning rate", precise(stage.optimizer.lr)),
            (f"{name}schedule", _schedule(stage)),
        ]
    optimizer = config.optimizer
    moments = "8-bit" if optimizer.name == "adamw_8bit" else optimizer.state_dtype
    decay = f"weight decay {precise(optimizer.weight_decay)}"
    on_gpu = not facts["devices"].endswith("CPU")
    return [
        *rows,
        ("optimizer", f"AdamW, betas {optimizer.betas[0]}, {optimizer.betas[1]}, {decay}, {moments} moments"),
        ("gradient norm", f"at most {precise(config.max_grad_norm)}" if config.max_grad_norm else "not limited"),
        *([("z-loss", precise(config.z_loss))] if config.z_loss else []),
        (
            "precision",
            ("bfloat16 arithmetic" if on_gpu else "float32 arithmetic")
            + (", float8 matrix products" if config.float8 else "")
            + ", float32 trained weights",
        ),
        ("seed", str(config.seed)),
        ("software", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
    ]


def _what_is_trained(config: TrainConfig) -> str:
    lora = config.lora
    if not lora.r:
        return "all weights"
    over = ", over 4-bit weights (nf4)" if lora.quantize == "nf4" else ""
    dropout = f", dropout {precise(lora.dropout)}" if lora.dropout else ""
    return f"LoRA of rank {lora.r} on {lora.targets}, alpha {precise(lora.alpha)}{dropout}{over}"


def _epochs(stage: TrainConfig) -> str:
    return str(stage.epochs) + (f", {stage.max_steps:,} steps at most" if stage.max_steps else "")


def _schedule(stage: TrainConfig) -> str:
    schedule = stage.schedule
    end = f", down to {percent(schedule.min_ratio)} of the peak" if schedule.name != "constant" else ""
    decay = f" over the last {percent(schedule.decay_ratio)} of the steps" if schedule.name == "wsd" else ""
    return f"{schedule.name}, warm-up over {percent(schedule.warmup_ratio)} of the steps{end}{decay}"


def measured(run: Run) -> list[tuple[str, str]]:
    """(figure, value) from the rows of metrics.jsonl, without figures that were not measured."""
    found, facts = Training(run.metrics), run.facts
    losses = [loss for _, loss in found.loss]
    rows = []
    if losses:
        last = losses[-LAST_STEPS:]
        rows += [("training loss, first step", precise(losses[0]))]
        rows += [(f"training loss, mean of the last {len(last)} steps", precise(sum(last) / len(last)))]
    if found.held_out:
        step, loss = found.held_out[-1]
        rows += [("held-out loss", f"{precise(loss)} at step {step:,.0f}")]
        step, loss = found.best_held_out
        rows += [("best held-out loss", f"{precise(loss)} at step {step:,.0f}")]
    if found.tokens:
        rows += [
            ("trained tokens", f"{found.trained:,.0f} (of {found.tokens:,.0f} tokens read)"),
            ("padding", f"{percent(found.padding / (found.tokens + found.padding))} of positions"),
        ]
    if found.seconds:
        rows += [("speed", f"{compact(found.tokens / found.seconds)} tokens/s on {facts['devices']}")]
    if found.mfu:
        rows += [("MFU", percent(found.mfu))]
    if found.elapsed:
        hours = f"{found.elapsed / 3600:.2f} hours"
        rows += [
            (
                "time over all starts",
                f"{hours} ({duration(found.elapsed)}), of which {duration(found.seconds)} in steps",
            )
        ]
    if found.cost is not None:
        rows += [("cost", f"${found.cost:,.2f}")]
    if found.memory:
        rows += [("peak memory of a process", f"{found.memory:.1f} GiB")]
    if found.skipped:
        rows += [("skipped steps", f"{found.skipped:,} (their loss or gradient was not a finite number)")]
    return rows


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_inline, line))} |" for line in lines)


def _inline(text: str) -> str:
    """One line of Markdown that shows a text literally: no HTML, no characters that end a table's cell, nothing
    invisible."""
    flat = " ".join(visible(str(text)).split())
    return html.escape(flat, quote=False).replace("|", "\\|").replace("[", "\\[").replace("`", "\\`")
