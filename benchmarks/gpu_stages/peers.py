"""`transformers.generate` with the same shape and lengths; whether TRL and vLLM are there."""

from importlib.metadata import PackageNotFoundError, version

import torch
from common import alternate, median, seconds

from gpu_stages.shared import Say, Sizes, made_prompts
from src.parallel.setup import pick_device


def measure(sizes: Sizes, say: Say) -> None:
    for package in ("trl", "vllm"):
        try:
            say(package=package, version=version(package))
        except PackageNotFoundError:
            say(package=package, version=None)
    from transformers import LlamaConfig, LlamaForCausalLM

    device, shape = pick_device(), sizes.decoder
    config = LlamaConfig(
        hidden_size=shape.dim,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        intermediate_size=shape.hidden_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_seq_len,
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    low, high = sizes.new_tokens
    for n in (sizes.batches[0], sizes.batches[-1]):
        prompts = made_prompts(n, lambda i: sizes.context, shape.vocab_size)
        ids = torch.tensor(prompts, device=device)

        def generate(new_tokens: int, ids=ids) -> None:
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                eos_token_id=None,
            )

        took = alternate(
            {
                "low": lambda: seconds(lambda: generate(low)),
                "high": lambda: seconds(lambda: generate(high)),
            },
            min(sizes.rounds, 2),
        )
        step = (median(took["high"]) - median(took["low"])) / (high - low)
        say(batch=n, ms=1e3 * step, tokens_per_s=n / step)
