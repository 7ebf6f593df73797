"""Proximal policy optimisation of a solver with a verifier's scores, a rule's verdicts, or both.

    torchrun --nproc_per_node 8 ppo_train.py --actor_ckpt_dir SOLVER --actor_save_dir OUT --critic_ckpt_dir VERIFIER \
        --critic_save_dir OUT2 --reward_model_ckpt_dir VERIFIER --train_file train.json --max_batch_size 6 --max_buffer_size 96

Rows of the train file: {"instruction": "...", "label": "..."}; the label is needed for --reward rule and both. Policy,
value, reference and reward model all stay in memory; nothing is read from disk between the phases. What the code must
satisfy, and the meaning of every logged number: docs/ppo.md.
"""

from typing import Literal

from src.cli import run


def main(
    actor_ckpt_dir: str,
    actor_save_dir: str,
    critic_ckpt_dir: str,
    critic_save_dir: str,
    train_file: str,
    reward_model_ckpt_dir: str | None = None,
    reward: Literal["verifier", "rule", "both"] = "verifier",
    verifier_weight: float = 1.0,
    rule_weight: float = 1.0,
    model_type: str | None = None,
    tokenizer_file: str | None = None,
    config_file: str | None = None,
    use_chat_template: bool = False,
    max_batch_size: int = 6,
    max_tokens_per_batch: int | None = None,
    max_buffer_size: int = 96,
    samples_per_prompt: int = 1,
    rollout_batch_size: int = 384,
    rollout_model_parallel_size: int | None = None,
    kv_cache_gb: float | None = None,
    max_seq_len: int = 1024,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    lr: float = 1e-6,
    critic_lr: float = 5e-6,
    warmup: float = 0.0,
    schedule: Literal["cosine", "linear", "constant"] = "constant",
    epochs: int = 1,
    iterations: int | None = None,
    ppo_epochs: int = 4,
    mini_batches: int = 4,
    gamma: float = 1.0,
    lam: float = 0.95,
    cliprange: float = 0.2,
    cliprange_value: float = 0.2,
    vf_coef: float = 0.1,
    kl_coef: float | None = None,
    kl_target: float | None = None,
    kl_horizon: float = 10000.0,
    truncated: Literal["bootstrap", "zero", "penalty"] = "bootstrap",
    truncation_penalty: float = 1.0,
    max_grad_norm: float = 1.0,
    weight_decay: float = 0.0,
    lora_rank: int = -1,
    lora_alpha: float | None = None,
    lora_targets: list[str] | None = None,
    quantize: Literal["nf4", "int8"] | None = None,
    freeze_layers: int = 0,
    router_aux_loss_coef: float | None = None,
    checkpoint_activations: Literal["none", "selective", "full"] = "none",
    compile: bool = False,
    zero: Literal[0, 1] = 1,
    task: str | None = None,
    label_file: str | None = None,
    eval_batch_size: int = 384,
    log_dir: str | None = None,
    dtype: Literal["bf16", "fp16", "fp32"] | None = None,
    seed: int = 0,
    model_parallel_size: int | None = None,
    timeout: float = 1800.0,
):
    """Train, and evaluate before the first and after every epoch when --task and --label_file are given.

    Args:
        actor_ckpt_dir: the solver to start from; also the reference.
        actor_save_dir: the folder for the trained policy; replaced as a whole when it already holds a checkpoint.
        critic_ckpt_dir: what the value model starts from: the verifier, usually.
        critic_save_dir: the folder for the trained value model.
        train_file: .json or .jsonl rows with "instruction", and "label" for a rule.
        reward_model_ckpt_dir: the verifier whose scores are the reward.
        reward: verifier, rule (1 for a right answer, else 0), or both.
        verifier_weight: of the verifier's score in the reward.
        rule_weight: of the rule's verdict in the reward.
        model_type: a name such as llama-2-7b to check the actor's sizes against.
        tokenizer_file: found in actor_ckpt_dir when not given.
        config_file: the actor's params.json or config.json; found in actor_ckpt_dir when not given.
        use_chat_template: write each instruction as a user's turn, by the checkpoint's chat template or the family's.
        max_batch_size: sequences in one forward and backward, per data-parallel rank.
        max_tokens_per_batch: and their tokens, at most; a longer row goes alone. Optimizer steps stay the same: there are more
            forwards in each. No limit when not given.
        max_buffer_size: rollouts per iteration, over all ranks.
        samples_per_prompt: rollouts of each prompt.
        rollout_batch_size: sequences generated at a time, at most.
        rollout_model_parallel_size: ranks per model while generating, a divisor of --model_parallel_size: more, smaller models,
            whose weights change hands in memory. The same as in training when not given.
        kv_cache_gb: memory for keys and values per rank; half the free memory when not given.
        max_seq_len: prompt and response together; prompts that leave no room are left out and counted.
        max_new_tokens: of one response.
        temperature: of sampling, and of every log-probability.
        lr: the policy's highest learning rate.
        critic_lr: the value model's.
        warmup: share of the iterations in which the learning rates rise.
        schedule: how they fall afterwards.
        epochs: passes over the train file.
        iterations: stop after this many, whatever the epochs.
        ppo_epochs: passes over each buffer of rollouts.
        mini_batches: optimizer steps per pass.
        gamma: discount.
        lam: of generalised advantage estimation.
        cliprange: the probability ratio is clipped to 1 ± this.
        cliprange_value: values are clipped to the old ones ± this.
        vf_coef: weight of the value loss (the value model has its own optimizer: it acts through clipping and Adam's ε).
        kl_coef: weight of the KL penalty in the reward; 0.05, or where the actor's own PPO run left off, when not given.
        kl_target: steer kl_coef towards this KL (nats per response).
        kl_horizon: how slowly, in responses.
        truncated: what follows a response cut at max_new_tokens: its value (bootstrap), nothing (zero), or nothing and a
            penalty on its score.
        truncation_penalty: that penalty.
        max_grad_norm: each model's gradient is scaled down to this norm.
        weight_decay: AdamW's, on matrices.
        lora_rank: rank of the policy's and the value model's adapters; -1 trains all weights.
        lora_alpha: the adapter's output is scaled by lora_alpha / lora_rank; 16 when not given.
        lora_targets: layers to adapt, of wq,wk,wv,wo,w1,w2,w3; all of them when not given (with experts: attention's).
        quantize: keep the frozen weights in 4 or 8 bits; needs --lora_rank.
        freeze_layers: train neither the embedding nor this many layers from the bottom.
        router_aux_loss_coef: weight of the experts' load-balancing loss; the model's own when not given.
        checkpoint_activations: what of each block is computed again in backward, to save memory: nothing (none), all but products
            and attention (selective), or all but its input (full).
        compile: let torch.compile make one kernel each of the norms and of SwiGLU; on the CPU that needs a C++ compiler.
        zero: 1 shares the optimizer's state among the data-parallel ranks (ZeRO stage 1); 0 keeps it whole on each.
        task: what to evaluate on, such as GSM8K; also whose rule --reward rule applies (GSM8K when not given).
        label_file: the task's rows.
        eval_batch_size: sequences generated at a time in evaluations, at most.
        log_dir: for the log, TensorBoard events and evaluation results; ACTOR_SAVE_DIR-logs when not given.
        dtype: of weights and activations; bf16 on a GPU and fp32 on the CPU when not given.
        seed: of everything random.
        model_parallel_size: ranks per model; all of them when not given.
        timeout: seconds that a collective may take before the run is given up.
    """
    settings = dict(locals())
    from src.checkpoint.folder import check_apart
    from src.checkpoint.load import load_model
    from src.checkpoint.save import check_save, save_model
    from src.errors import UserError
    from src.evaluation.tasks import find_task
    from src.evaluation.training import SolverEvaluation
    from src.generation.engine import Engine
    from src.generation.relayout import RelaidEngine
    from src.generation.sampling import Sampling
    from src.inputs import (
        check_flags,
        check_log_dir,
        check_model_flags,
        check_same_tokenizer,
        lora_of,
        open_model,
        ppo_prompts,
    )
    from src.logs import RunLog
    from src.parallel.setup import agreed, pick_dtype, start, stop
    from src.ppo.fit import Schedule, fit, read_kl_coef, write_state
    from src.ppo.rewards import RuleReward, VerifierReward
    from src.ppo.trainer import PPO, KLController, PPOSettings
    from src.trainer.fit import prepare
    from src.trainer.optimizer import Optimizer

    check_flags(settings)
    sampling = Sampling(max_new_tokens, temperature, seed=seed)
    plan = Schedule(lr, critic_lr, warmup, schedule, epochs, iterations, samples_per_prompt, seed)
    ppo_settings = PPOSettings(
        max_batch_size,
        max_buffer_size,
        mini_batches,
        ppo_epochs,
        gamma,
        lam,
        cliprange,
        cliprange_value,
        vf_coef,
        truncated,
        truncation_penalty,
        seed,
        max_tokens_per_batch,
    )
    if temperature == 0:
        raise UserError("--temperature 0: PPO learns from samples; give a temperature above 0")
    if max_buffer_size % samples_per_prompt:
        raise UserError(f"--max_buffer_size {max_buffer_size} is no multiple of --samples_per_prompt {samples_per_prompt}")
    if reward != "rule" and reward_model_ckpt_dir is None:
        raise UserError(f"--reward {reward} needs --reward_model_ckpt_dir; without a verifier: --reward rule")
    parallel = start(model_parallel_size, timeout)
    if max_buffer_size < parallel.dp_size:
        raise UserError(
            f"--max_buffer_size {max_buffer_size}: the {parallel.dp_size} data-parallel ranks share the rollouts, "
            "and each needs one: raise it, or --model_parallel_size"
        )

    if rollout_model_parallel_size is not None and parallel.mp_size % rollout_model_parallel_size:
        raise UserError(
            f"--rollout_model_parallel_size {rollout_model_parallel_size} does not divide the {parallel.mp_size} "
            "ranks that share a model in training (--model_parallel_size)"
        )

    number_type, logs = pick_dtype(dtype, parallel.device), log_dir or f"{actor_save_dir.rstrip('/')}-logs"

    def read_inputs():
        read = {
            "actor_ckpt_dir": actor_ckpt_dir,
            "critic_ckpt_dir": critic_ckpt_dir,
            "reward_model_ckpt_dir": reward_model_ckpt_dir,
            "train_file": train_file,
        }
        check_log_dir(logs, actor_ckpt_dir, critic_ckpt_dir, reward_model_ckpt_dir)
        check_apart({"actor_save_dir": actor_save_dir, "critic_save_dir": critic_save_dir}, {**read, "log_dir": logs})
        chat = {"use_chat_template": use_chat_template, "chat_family": model_type}
        actor = open_model(actor_ckpt_dir, parallel, tokenizer_file, config_file, model_type, head="lm", **chat)
        critic = open_model(critic_ckpt_dir, parallel, tokenizer_file, **chat)
        verifier = None
        if reward != "rule":
            verifier = open_model(reward_model_ckpt_dir, parallel, tokenizer_file, head="score", **chat)
        for model in (actor, critic):
            check_model_flags(settings, model.checkpoint)
        loras = [lora_of(settings, model.checkpoint) for model in (actor, critic)]
        check_save(actor_save_dir, actor.checkpoint, number_type)
        check_save(critic_save_dir, critic.checkpoint, number_type)
        for other in filter(None, (critic, verifier)):
            check_same_tokenizer(actor, other)
        evaluation = SolverEvaluation.read(task, label_file, eval_batch_size, max_new_tokens, max_seq_len)
        rule = find_task(task or "GSM8K") if reward != "verifier" else None
        prompts, warning = ppo_prompts(train_file, actor.tokenizer, rule, max_seq_len)
        kl = KLController(read_kl_coef(actor_ckpt_dir) if kl_coef is None else kl_coef, kl_target, kl_horizon)
        return actor, critic, verifier, loras, evaluation, rule, prompts, warning, kl

    actor, critic, verifier, loras, evaluation, rule, prompts, warning, kl = agreed(read_inputs)
    policy = load_model(actor.checkpoint, parallel, number_type, "lm", seed, quantize, loras[0])
    reference = load_model(actor.checkpoint, parallel, number_type, "lm", seed, quantize).requires_grad_(False)
    value = load_model(critic.checkpoint, parallel, number_type, "score", seed, quantize, loras[1])
    rewards = []
    if verifier is not None:
        scorer = load_model(verifier.checkpoint, parallel, number_type, "score", seed, quantize).requires_grad_(False)
        rewards.append((verifier_weight, VerifierReward(scorer)))
    if rule is not None:
        rewards.append((rule_weight, RuleReward(rule, actor.tokenizer)))
    for model in (policy, value):
        prepare(model, settings, parallel)

    with RunLog(logs, "ppo_train", settings, parallel.rank) as log:
        if warning:
            log.warning(f"{warning} and are left out")
        log.info(
            f"{len(prompts)} prompts; ranks: {parallel.mp_size} model-parallel × {parallel.dp_size} data-parallel; "
            f"kl_coef {kl.kl_coef}"
        )
        if rollout_model_parallel_size in (None, parallel.mp_size):
            engine = Engine(policy, parallel, rollout_batch_size, max_seq_len, kv_cache_gb)
        else:
            engine = RelaidEngine(
                policy, parallel, rollout_model_parallel_size, rollout_batch_size, max_seq_len, kv_cache_gb
            )
        ppo = PPO(
            policy,
            value,
            reference,
            rewards,
            Optimizer(policy, parallel, weight_decay, max_grad_norm, eps=1e-5, zero=zero),
            Optimizer(value, parallel, weight_decay, max_grad_norm, eps=1e-5, zero=zero),
            engine,
            sampling,
            actor.tokenizer.stop_ids,
            kl,
            ppo_settings,
            parallel,
        )
        fit(
            ppo,
            prompts,
            plan,
            log,
            lambda epoch: evaluation.run(f"epoch {epoch}", epoch, policy, actor.tokenizer, parallel, log, settings),
        )
        save_model(
            policy, parallel, actor_save_dir, actor.checkpoint, actor.tokenizer.path, actor.tokenizer.borrowed_template
        )
        save_model(
            value, parallel, critic_save_dir, critic.checkpoint, critic.tokenizer.path, critic.tokenizer.borrowed_template
        )
        if parallel.is_main:
            write_state(actor_save_dir, kl.kl_coef)
        log.info(f"saved the policy to {actor_save_dir} and the value model to {critic_save_dir}")
    stop()


if __name__ == "__main__":
    run(main)
