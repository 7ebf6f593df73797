"""TRL's own losses and gradients on batches of ours: what preference learning is held against."""

from types import SimpleNamespace

import torch

from src.data.encoding import Comparison
from src.models.batch import Sequence
from src.trainer.losses import Knobs
from tests.trainer.tiny import PAD

# Our names → TRL's.
DPO_TYPES = {
    "dpo": "sigmoid",
    "ipo": "ipo",
    "robust": "robust",
    "sppo": "sppo_hard",
    "hinge": "hinge",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
}
Found = tuple[float, dict[str, torch.Tensor]]  # the loss, and each weight's gradient


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(64)}
    rust = Tokenizer(models.WordLevel(words, unk_token="w0"))
    names = dict(pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=rust, **names)


def common(folder, knobs: Knobs) -> dict:
    return dict(
        output_dir=str(folder),
        beta=knobs.beta,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        max_length=None,
        per_device_train_batch_size=4,
        disable_tqdm=True,
    )


def parts(sequence: Sequence) -> tuple[list[int], list[int]]:
    """Prompt and response."""
    n = sequence.prompt_length
    return list(sequence.tokens[:n]), list(sequence.tokens[n:])


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def dpo(model, reference, rows: list[Comparison], loss: list[str], knobs: Knobs, folder) -> Found:
    """DPOTrainer's, of rows with one output on each side; several losses weigh 1, 0.5."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    text = [{"prompt": "w5 w6", "chosen": "w7", "rejected": "w9"}] * 4
    kinds = [DPO_TYPES.get(name, name) for name in loss]
    config = DPOConfig(
        loss_type=kinds,
        loss_weights=[1.0, 0.5][: len(kinds)],
        label_smoothing=knobs.label_smoothing,
        **common(folder, knobs),
    )
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(text),
        processing_class=tokenizer(),
    )
    examples = []
    for row in rows:
        (prompt, chosen), (_, rejected) = (parts(s) for s in row.responses)
        examples.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    value = trainer.compute_loss(trainer.model.train(), trainer.data_collator(examples))
    value.backward()
    return value.item(), gradients(model)


def kto(
    model, reference, sequences: list[Sequence], labels: list[bool], off_prompt: list[Sequence],
    knobs: Knobs, folder,
) -> Found:  # fmt: skip
    """KTOTrainer's; off_prompt: what its reference point is found of."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    text = [{"prompt": "w5 w6", "completion": "w7", "label": bool(i % 2)} for i in range(4)]
    config = KTOConfig(
        loss_type="kto",
        desirable_weight=knobs.desirable_weight,
        undesirable_weight=knobs.undesirable_weight,
        **common(folder, knobs),
    )
    trainer = KTOTrainer(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(text),
        processing_class=tokenizer(),
    )
    examples = []
    for sequence, label, other in zip(sequences, labels, off_prompt):
        prompt, completion = parts(sequence)
        example = {"prompt_ids": prompt, "completion_ids": completion, "label": label}
        examples.append({**example, "KL_completion_ids": parts(other)[1]})
    value = trainer.compute_loss(trainer.model.train(), trainer.data_collator(examples))
    value.backward()
    return value.item(), gradients(model)


def without_reference(model, rows: list[Comparison], loss: str, knobs: Knobs) -> Found:
    """ORPOTrainer's odds ratio and CPOTrainer's SimPO, on TRL's own mean log-probabilities.

    ORPO's supervised part is the paper's, the mean over a response's tokens: TRL's is the mean over
    the batch's tokens, the prompts' among them.
    """
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    sequences = [row.responses[side] for side in (0, 1) for row in rows]
    longest = max(len(s.tokens) for s in sequences)
    ids = torch.tensor([[*s.tokens, *[PAD] * (longest - len(s.tokens))] for s in sequences])
    mask = torch.tensor([[i < len(s.tokens) for i in range(longest)] for s in sequences])
    labels = ids.masked_fill(~mask, -100)
    for i, s in enumerate(sequences):
        labels[i, : s.prompt_length] = -100
    logits = model(input_ids=ids, attention_mask=mask.long()).logits
    means = ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    chosen, rejected = means.chunk(2)
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    own = SimpleNamespace(
        beta=knobs.beta,
        accelerator=accelerator,
        alpha=0.0,
        loss_type="simpo",
        label_smoothing=0.0,
        simpo_gamma=knobs.gamma_beta_ratio * knobs.beta,
    )
    if loss == "orpo":
        ratio = ORPOTrainer.odds_ratio_loss(own, chosen, rejected)[0]
        value = -chosen.mean() - ratio.mean()
    else:
        value = CPOTrainer.cpo_loss(own, chosen, rejected)[0].mean()
    value.backward()
    return value.item(), gradients(model)
