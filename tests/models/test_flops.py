"""Operations of a training step, counted once more from the sizes written here."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from src.models.config import ModelConfig
from src.models.flops import TrainingFlops, attention_pairs
from src.models.lora import LoRAConfig, add_lora, freeze_layers
from src.models.transformer import Transformer, build

DIM, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 24, 3, 6, 2, 10, 40, 50
LLAMA = ModelConfig(DIM, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB)
EXPERTS, PER_TOKEN = 5, 2
MIXTRAL = replace(LLAMA, family="mixtral", n_experts=EXPERTS, experts_per_token=PER_TOKEN)
# biases and norms are no products
QWEN = replace(LLAMA, family="qwen", qkv_bias=True, qk_norm=True)
TIED = replace(LLAMA, tie_word_embeddings=True)

PROJECTIONS = {  # in, out
    "wq": (DIM, HEADS * HEAD_DIM),
    "wk": (DIM, KV_HEADS * HEAD_DIM),
    "wv": (DIM, KV_HEADS * HEAD_DIM),
    "wo": (HEADS * HEAD_DIM, DIM),
    "w1": (DIM, HIDDEN),
    "w2": (HIDDEN, DIM),
    "w3": (DIM, HIDDEN),
}
ATTENTION = sum(PROJECTIONS[x][0] * PROJECTIONS[x][1] for x in ("wq", "wk", "wv", "wo"))
FEED_FORWARD = 3 * DIM * HIDDEN
LAYER = ATTENTION + FEED_FORWARD
# the router sees all experts, a token only two
EXPERT_LAYER = ATTENTION + EXPERTS * DIM + PER_TOKEN * FEED_FORWARD
OUTPUT = DIM * VOCAB
# forward, of one layer: q·k and the value it weighs, a product and a sum for each number
PAIR = 2 * 2 * HEADS * HEAD_DIM
ONE_RANK = SimpleNamespace(mp_rank=0, mp_size=1, device="cpu")


def same(flops: TrainingFlops, per_token: float, per_target: float, per_pair: float) -> None:
    """Where every token is needed, what is counted is the model's weights and its head's.

    That is the sum of what is counted for tokens and for those needed.
    """
    counts = (flops.per_token + flops.per_needed, flops.per_pair)
    assert counts == pytest.approx((per_token + per_target, per_pair))


def test_past_the_last_attention_only_what_the_loss_needs_is_counted():
    past = PROJECTIONS["wo"][0] * PROJECTIONS["wo"][1] + FEED_FORWARD
    assert TrainingFlops.of(Transformer(LLAMA)).per_needed == 6 * OUTPUT + 6 * past
    assert TrainingFlops.of(Transformer(LLAMA.with_head("score"))).per_needed == 6 * past
    # the experts' balance counts every token
    assert TrainingFlops.of(Transformer(MIXTRAL)).per_needed == 6 * OUTPUT
    model = Transformer(LLAMA)
    add_lora(model, LoRAConfig(2, targets=("wq", "w2")), 0, ONE_RANK)
    adapter = 2 * sum(PROJECTIONS["w2"])
    assert TrainingFlops.of(model).per_needed == 4 * OUTPUT + 4 * past + 6 * adapter


FAMILIES = {"llama": (LLAMA, LAYER), "qwen": (QWEN, LAYER), "mixtral": (MIXTRAL, EXPERT_LAYER)}


@pytest.mark.parametrize("config, layer", FAMILIES.values(), ids=FAMILIES)
def test_full_training_is_six_per_weight(config, layer):
    same(TrainingFlops.of(Transformer(config)), 6 * LAYERS * layer, 6 * OUTPUT, 3 * LAYERS * PAIR)


def test_a_tied_output_layer_counts_at_the_targets_and_the_embedding_s_rows_nowhere():
    same(TrainingFlops.of(Transformer(TIED)), 6 * LAYERS * LAYER, 6 * OUTPUT, 3 * LAYERS * PAIR)


@pytest.mark.parametrize("config", (LLAMA, TIED), ids=("untied", "tied"))
def test_a_score_head_has_no_targets(config):
    flops = TrainingFlops.of(Transformer(config.with_head("score")))
    same(flops, 6 * LAYERS * LAYER, 0, 3 * LAYERS * PAIR)


@pytest.mark.parametrize(
    "config, layer", ((LLAMA, LAYER), (MIXTRAL, EXPERT_LAYER)), ids=("llama", "mixtral")
)
@pytest.mark.parametrize("frozen", range(1, LAYERS + 1))
def test_frozen_layers_go_forward_only(config, layer, frozen):
    model = Transformer(config)
    freeze_layers(model, frozen)
    trained = LAYERS - frozen
    per_token, per_pair = (2 * frozen + 6 * trained) * layer, (frozen + 3 * trained) * PAIR
    same(TrainingFlops.of(model), per_token, 6 * OUTPUT, per_pair)


def test_a_tied_output_layer_is_frozen_with_the_embedding():
    model = Transformer(TIED)
    freeze_layers(model, 1)
    same(TrainingFlops.of(model), (2 + 6 * 2) * LAYER, 4 * OUTPUT, (1 + 3 * 2) * PAIR)


def test_frozen_layers_above_a_trained_embedding_have_gradients_all_the_same():
    model = Transformer(LLAMA)
    for block in list(model.layers)[:2]:
        block.requires_grad_(False)
    same(TrainingFlops.of(model), (2 * 4 + 6) * LAYER, 6 * OUTPUT, 3 * LAYERS * PAIR)
    model.tok_embeddings.requires_grad_(False)
    same(TrainingFlops.of(model), (2 * 2 + 6) * LAYER, 6 * OUTPUT, (2 + 3) * PAIR)


def test_a_frozen_layer_above_a_trained_one_hands_its_gradient_down():
    model = Transformer(LLAMA)
    freeze_layers(model, 1)
    model.layers[2].requires_grad_(False)
    same(TrainingFlops.of(model), (2 + 6 + 4) * LAYER, 6 * OUTPUT, (1 + 3 + 3) * PAIR)


@pytest.mark.parametrize("head", ("lm", "score"))
@pytest.mark.parametrize("targets", (tuple(PROJECTIONS), ("wq", "wv"), ("w2",)), ids=",".join)
@pytest.mark.parametrize("rank", (1, 4))
def test_lora_is_four_per_frozen_weight_and_six_per_number_of_an_adapter(rank, targets, head):
    """Counted by whole layers.

    Also the gradients that the lowest layer's first products would hand further down.
    """
    model = Transformer(LLAMA.with_head(head))
    add_lora(model, LoRAConfig(rank, targets=targets), 0, ONE_RANK)
    adapters = sum(rank * sum(PROJECTIONS[x]) for x in targets)
    per_token, per_target = LAYERS * (4 * LAYER + 6 * adapters), 4 * OUTPUT * (head == "lm")
    same(TrainingFlops.of(model), per_token, per_target, 3 * LAYERS * PAIR)


def test_lora_of_experts_counts_the_adapters_of_those_a_token_goes_through():
    model = Transformer(MIXTRAL)
    add_lora(model, LoRAConfig(4, targets=("wq", "w1", "w2")), 0, ONE_RANK)
    of_attention = 4 * sum(PROJECTIONS["wq"])
    of_expert = 4 * sum(PROJECTIONS["w1"] + PROJECTIONS["w2"])
    adapters = of_attention + PER_TOKEN * of_expert
    per_token = LAYERS * (4 * EXPERT_LAYER + 6 * adapters)
    same(TrainingFlops.of(model), per_token, 4 * OUTPUT, 3 * LAYERS * PAIR)


@pytest.mark.parametrize(
    "config", (LLAMA, QWEN, MIXTRAL, TIED), ids=("llama", "qwen", "mixtral", "tied")
)
@pytest.mark.parametrize("n", (2, 4))
def test_any_rank_counts_the_whole_model(config, n):
    """The vocabulary, the heads and the widths do not divide by 4: padding is not counted."""
    flops = TrainingFlops.of(Transformer(config))
    for rank in (0, n - 1):
        assert TrainingFlops.of(build(config, rank, n, torch.float32)) == flops


def test_a_step_adds_up_tokens_those_needed_and_pairs():
    flops = TrainingFlops(2.0, 30.0, 500.0)
    assert flops(tokens=7, needed=3, pairs=11) == 7 * 2 + 3 * 30 + 11 * 500


def counted(config: ModelConfig, length: int, prefix: int) -> float:
    pairs = 0
    for layer in range(config.n_layers):
        windowed = config.sliding_window and layer >= config.first_window_layer
        for query in range(prefix, prefix + length):
            for key in range(prefix + length):
                pairs += key <= query and (not windowed or query - key < config.sliding_window)
    return pairs / config.n_layers


@pytest.mark.parametrize("first", (0, 1, 3, 9))
@pytest.mark.parametrize("window", (0, 1, 3, 6, 100))
def test_attention_pairs_one_by_one(window, first):
    config = replace(LLAMA, sliding_window=window, first_window_layer=first)
    for length in (1, 2, 3, 7):
        for prefix in (0, 1, 2, 3, 5, 6, 8):
            wanted = pytest.approx(counted(config, length, prefix))
            assert attention_pairs(config, length, prefix) == wanted, (length, prefix)
        assert attention_pairs(config, length) == pytest.approx(counted(config, length, 0))


@pytest.mark.parametrize("prefix, length", ((1, 6), (4, 3)))
def test_a_sequence_s_pairs_are_those_of_its_prompt_and_of_what_goes_on_from_it(prefix, length):
    config = replace(LLAMA, sliding_window=4, first_window_layer=1)
    parts = attention_pairs(config, prefix) + attention_pairs(config, length, prefix)
    assert parts == pytest.approx(attention_pairs(config, prefix + length))
